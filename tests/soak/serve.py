"""The serving process of the soak: ``tunnel_asgi.Server`` and a pipe through which it tells what it holds.

A line on standard input is answered with one line of JSON on standard output. The end of standard input ends the
process in good order.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tests.soak.app import PlannedError, app, calls
from tunnel_asgi.server import Config, Server

HEAD_LIMIT = 16 * 1024  # bytes of a request head
PATIENCE = 120  # seconds
KEPT = 20  # log lines passed on


class Problems(logging.Handler):
    """Counts what is logged as a warning or worse, and what the app was asked to raise."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.planned = 0

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PlannedError):
            self.planned += 1
            return
        lines = self.errors if record.levelno >= logging.ERROR else self.warnings
        if len(lines) < KEPT:
            lines.append(f"{record.name}: {logging.Formatter().format(record)}")


def main() -> None:
    """Serve until standard input ends."""
    options = _parse_arguments()
    problems = Problems()
    logging.basicConfig(handlers=[problems], level=logging.WARNING)
    config = Config(
        app,
        domain=options.domain,
        server_url=options.server,
        key_id=options.key_id,
        standby=options.standby,
        http=options.http,
        loop=options.loop,
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=HEAD_LIMIT,
        # A driver short of CPU time must not look like a slow visitor, and nobody may send while we close.
        timeout_keep_alive=PATIENCE,
        timeout_first_byte=PATIENCE,
        timeout_request_head=PATIENCE,
        timeout_request_body=PATIENCE,
    )
    # Nobody may be closed to make room for others either, so there is always room.
    assert config.tunnel is not None
    config.tunnel = dataclasses.replace(config.tunnel, max_connections=options.max_connections)
    server = Server(config, on_started=lambda: _listen(server, problems))
    server.run()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--domain", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--key-id", required=True)
    parser.add_argument("--standby", type=int, required=True)
    parser.add_argument("--max-connections", type=int, required=True)
    parser.add_argument("--http", required=True)
    parser.add_argument("--loop", required=True)
    return parser.parse_args()


def _listen(server: Server, problems: Problems) -> None:
    """Answer on the pipe. A reader of the loop needs no task, so it does not show in what it tells."""
    loop = asyncio.get_running_loop()

    def answer() -> None:
        if os.read(0, 4096):
            os.write(1, json.dumps(_state(server, problems)).encode() + b"\n")
        else:
            loop.remove_reader(0)
            server.should_exit = True

    loop.add_reader(0, answer)
    os.write(1, b"{}\n")


def _state(server: Server, problems: Problems) -> dict[str, Any]:
    pool = server.pool
    assert pool is not None
    gc.collect()
    return {
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "timers": _timers(),
        "waiting": pool.waiting,
        "busy": pool.busy,
        "connections": len(server.server_state.connections),
        "requests": len(server.server_state.tasks),
        "blocks": sys.getallocatedblocks(),
        "memory": _resident(),
        "calls": dict(calls),
        "errors": problems.errors,
        "warnings": problems.warnings,
        "planned": problems.planned,
    }


def _timers() -> list[str] | None:
    """What the timers will call; uvloop shows none. A task that sleeps is counted as a task."""
    scheduled = getattr(asyncio.get_running_loop(), "_scheduled", None)
    if scheduled is None:
        return None
    names = [timer._callback.__qualname__ for timer in scheduled if not timer.cancelled()]
    return sorted(name for name in names if name != "_set_result_unless_cancelled")


def _resident() -> int:
    """Bytes of memory in use, after the allocator has given back what it holds in reserve."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
