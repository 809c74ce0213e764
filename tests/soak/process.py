"""The driver's hand on the serving process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import DOMAIN, KEY_ID, SECRET

__all__ = ["ServingProcess", "State", "serving_process"]

PATIENCE = 30.0  # seconds for the process to start, to answer, to end


@dataclass(frozen=True)
class State:
    """What the process holds: see ``serve.py``."""

    tasks: int
    descriptors: int
    timers: list[str] | None
    waiting: int
    busy: int
    connections: int
    requests: int
    blocks: int
    memory: int
    calls: dict[str, int]
    errors: list[str]
    warnings: list[str]
    planned: int

    @property
    def held(self) -> dict[str, Any]:
        """Everything that must be the same whenever nobody visits."""
        names = ("tasks", "descriptors", "timers", "waiting", "busy", "connections", "requests")
        return {name: getattr(self, name) for name in names}


class ServingProcess:
    """``tests.soak.serve`` as a child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self) -> State:
        """What it holds now."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return State(**await self.answer())

    async def answer(self) -> dict[str, Any]:
        """The next line of its standard output."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the serving process ended; its standard error says why")
        return dict(json.loads(line))

    def peak(self) -> int:
        """The most bytes of memory it ever had."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    async def stop(self) -> int:
        """End it in good order; returns its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(PATIENCE):
            return await self._process.wait()


@asynccontextmanager
async def serving_process(
    server_url: str, *, http: str, loop: str, standby: int, max_connections: int
) -> AsyncIterator[ServingProcess]:
    """A serving process whose WebSockets wait at this tunnel server."""
    arguments = {
        "--domain": str(DOMAIN),
        "--server": server_url,
        "--key-id": KEY_ID,
        "--standby": str(standby),
        "--max-connections": str(max_connections),
        "--http": http,
        "--loop": loop,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.soak.serve"),
        *(part for pair in arguments.items() for part in pair),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"SMALLWARE_KEY": SECRET},
    )
    try:
        child = ServingProcess(process)
        await child.answer()
        yield child
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
