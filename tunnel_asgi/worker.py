"""One of several processes: its life as the parent sees it, and what it does itself.

They talk through a pipe. The worker says when it is ready, answers when asked how it is, and says why it failed.
The parent tells it to retire: to finish with its visitors while its successor takes the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from uvicorn.config import STARTUP_FAILURE

from tunnel_asgi.errors import AppLoadFailed, LifespanFailed, TunnelError
from tunnel_asgi.server import Config, Server
from tunnel_asgi.tracebacks import print_app_frames

__all__ = ["KILL_MARGIN", "READY", "SIGHUP", "WORN_OUT", "Failed", "Worker"]

logger: logging.Logger = logging.getLogger("uvicorn.error")

SIGHUP: int | None = getattr(signal, "SIGHUP", None)

_spawn = multiprocessing.get_context("spawn")

KILL_MARGIN = 5.0  # seconds a worker may take beyond its own graceful shutdown
PING_INTERVAL = 1.0  # seconds between two questions whether a worker's loop still turns
LAST_WORDS = 1  # seconds for WebSockets to end when a retired worker's time is up

# What a worker is told, and what it says.
PING, RETIRE = "ping", "retire"
PONG, READY, WORN_OUT = "pong", "ready", "worn out"


@dataclass(frozen=True)
class Failed:
    """A worker's last word: it could not start, or not go on."""

    reason: str
    mendable: bool
    """Whether a change of the app's code may help."""


class Worker:
    """One process, seen from the parent."""

    def __init__(self, config: Config) -> None:
        self.pipe: Connection[Any, Any]
        self.pipe, childs_end = _spawn.Pipe()
        self.process: SpawnProcess = _spawn.Process(target=_work, args=(config, childs_end, _stdin_fileno()))
        self.mute: bool = False
        """Nothing more comes through the pipe."""
        self.failure: Failed | None = None
        self.hangs: bool = False
        self.worn_out: bool = False
        """It has served ``limit_max_requests``."""
        self.started_at: float = time.monotonic()
        self.kill_at: float = math.inf
        self.check_at: float = math.inf
        """When to ask whether it is well; once asked, when it must have answered."""
        self._asked = False
        self.process.start()
        childs_end.close()  # only the child may hold it, or its death would not show here

    def close(self) -> None:
        self.process.join()
        self.pipe.close()

    def messages(self) -> Iterator[object]:
        try:
            while not self.mute and self.pipe.poll():
                yield self.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self.mute = True

    @property
    def was_killed(self) -> bool:
        """Whether it was ended from outside: that says nothing about the next one."""
        return (self.process.exitcode or 0) < 0

    def epitaph(self, what: str) -> str:
        return f"{what}: {self.failure.reason}" if self.failure else f"{what} (exit code {self.process.exitcode})"

    # Its health.

    def check(self, now: float, patience: float) -> bool:
        """Ask it whether it is well if it is time to. True when it has just failed to answer."""
        if now < self.check_at:
            return False
        if self._asked:
            self.hangs, self.check_at = True, math.inf
            return True
        self._asked, self.check_at = True, now + patience
        self._tell(PING)
        return False

    def answered(self) -> None:
        self._asked = self.hangs = False
        self.check_at = time.monotonic() + PING_INTERVAL

    # Its end.

    def retire(self, grace: float) -> None:
        """Another one serves: finish with the visitors that are there, and exit."""
        self.kill_at = time.monotonic() + grace
        self._tell(RETIRE)

    def stop(self, grace: float) -> None:
        """Drain and exit."""
        self.kill_at = min(self.kill_at, time.monotonic() + grace)
        self.process.terminate()

    def kill_if_late(self, now: float) -> None:
        if now >= self.kill_at:
            self.kill_at = math.inf
            logger.warning("Worker [%s] did not leave in time, killing it", self.process.pid)
            self.process.kill()

    def _tell(self, message: str) -> None:
        with contextlib.suppress(OSError):  # it is gone, or going
            self.pipe.send(message)


def _stdin_fileno() -> int | None:
    """What a debugger in a worker would read from; multiprocessing gives its processes none."""
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return None


# The worker's side.


class _WorkerServer(Server):
    """A server that can also hand over to its successor."""

    def __init__(self, config: Config, tell_parent: Callable[[object], None]) -> None:
        super().__init__(config, on_started=lambda: tell_parent(READY))
        self._tell_parent = tell_parent
        self._retired = False
        self._hand_over_timeout: asyncio.Timeout | None = None
        # uvicorn would end at once when it is reached; here the parent is asked for a successor first.
        self._share, self.limit_max_requests = self.limit_max_requests, None

    def obey(self, order: str) -> None:
        """Do what the parent says. Called in a thread of its own."""
        if self.pool is None or self._loop is None:
            os.kill(os.getpid(), signal.SIGTERM)  # no visitor yet, so nothing to hand over
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is as good as gone
            self._loop.call_soon_threadsafe(self._retire if order == RETIRE else self._answer)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT:
            return  # Ctrl+C reaches the whole process group; the parent alone decides, and sends SIGTERM
        if self._retired:  # the successor goes as well: this is now an ordinary shutdown
            self._retired = False
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._hurry)
            return
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._share is not None and self.server_state.total_requests >= self._share:
            self._share = None
            self._tell_parent(WORN_OUT)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._retired and self.pool is not None:
            await self._hand_over()
        await super().shutdown()

    def _answer(self) -> None:
        self._tell_parent(PONG)

    def _retire(self) -> None:
        assert self.pool is not None
        self._retired = True
        self.pool.close()
        closing = (b"connection", b"close")
        self.config.encoded_headers.append(closing)
        self.server_state.default_headers.append(closing)
        self.should_exit = True

    async def _hand_over(self) -> None:
        """Finish with the visitors that are there, and take no new ones.

        A shutdown closes idle ones at once, and that would cross with their next request.
        """
        assert self.pool is not None
        logger.info("Handing over, %d connections are still open", self.pool.busy)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown) as self._hand_over_timeout:
                await self.pool.wait_closed()
        self._hand_over_timeout = None
        if self._retired and self.pool.busy:  # the time is up
            self.config.timeout_graceful_shutdown = LAST_WORDS
            # Once the shutdown has told WebSockets 1012; most apps end by themselves when the visitor is gone.
            asyncio.get_running_loop().call_soon(self.pool.close_clients)

    def _hurry(self) -> None:
        if self._hand_over_timeout is not None:
            self._hand_over_timeout.reschedule(0)


def _work(config: Config, pipe: Connection, stdin: int | None) -> None:
    """The main function of a worker process."""
    for number in (signal.SIGINT, SIGHUP):
        if number is not None:  # these are for the parent; a handler, unlike SIG_IGN, is not left to the app's children
            signal.signal(number, lambda number, frame: None)
    if stdin is not None:
        sys.stdin = open(stdin, closefd=False)  # noqa: SIM115  (as long as the process)
    config.configure_logging()

    def tell_parent(message: object) -> None:
        with contextlib.suppress(OSError):  # it is gone; the thread below sees to that
            pipe.send(message)

    server = _WorkerServer(config, tell_parent)
    threading.Thread(target=_obey_parent, args=(pipe, server), daemon=True).start()
    try:
        config.load_app()  # before signals are caught, so that a long import can be ended at once
        server.run()
    except TunnelError as error:
        tell_parent(Failed(str(error), mendable=isinstance(error, AppLoadFailed | LifespanFailed)))
        sys.exit(1 if server.started else STARTUP_FAILURE)
    except Exception as error:
        print_app_frames(error)
        sys.exit(1)


def _obey_parent(pipe: Connection, server: _WorkerServer) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            server.obey(pipe.recv())
    # The parent is gone, however it went: nobody else would end this process.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep((server.config.timeout_graceful_shutdown or 0) + KILL_MARGIN)
    os._exit(1)
