"""The servers that are compared, each running the same app in processes of its own."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.entrances import Entrance, PortEntrance, TunnelEntrance

DOMAIN = "www-bench-local.t00.localhost"
SECRET = "a secret for measurements only 0123456789"
KEY_ID = "bench"
APP = "benchmarks.app:app"
START_TIMEOUT = 30.0  # seconds
STOP_TIMEOUT = 15.0  # seconds; a graceful shutdown takes up to 10

# The same for all: what is compared is how bytes come and go. Nobody is closed for being idle.
COMMON = ["--no-access-log", "--no-proxy-headers", "--timeout-keep-alive", "600"]


@dataclass(frozen=True)
class Stack:
    """The parser and the event loop of the serving process."""

    http: str
    loop: str

    def __str__(self) -> str:
        return f"{self.http}+{self.loop}"

    @property
    def options(self) -> list[str]:
        return ["--http", self.http, "--loop", self.loop, *COMMON]


_STACKS = (Stack("h11", "asyncio"), Stack("h11", "uvloop"), Stack("httptools", "uvloop"))
STACKS = {str(stack): stack for stack in _STACKS}


@dataclass(frozen=True)
class Running:
    """A contender that serves: where visitors come in, and the processes that are charged for it."""

    entrance: Entrance
    pids: list[int]


@dataclass
class Child:
    """A child process and the last lines of its log."""

    pid: int
    log: deque[bytes] = field(default_factory=lambda: deque(maxlen=20))
    match: re.Match[bytes] | None = None


class ChildFailed(Exception):
    """A child ended before it served."""


@asynccontextmanager
async def child(module: str, *arguments: str, ready: bytes) -> AsyncIterator[Child]:
    """Run a module until the block is left. The block begins when its log has a line that matches ``ready``.

    Raises:
        ChildFailed: it ended first, or took more than 30 seconds.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"SMALLWARE_KEY": SECRET, "SMALLWARE_KEY_ID": KEY_ID},
        cwd=Path(__file__).parent.parent,
    )
    running = Child(process.pid)
    found = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(_read_log(process, running, ready, found))
    try:
        await asyncio.wait([found, reading], timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise ChildFailed(b"".join([f"{module} does not serve:\n".encode(), *running.log]).decode())
        yield running
    finally:
        await _stop(process)
        await reading


async def _read_log(
    process: asyncio.subprocess.Process, running: Child, ready: bytes, found: asyncio.Future[None]
) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        running.log.append(line)
        if not found.done() and (match := re.search(ready, line)):
            running.match = match
            found.set_result(None)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@asynccontextmanager
async def serve_port(stack: Stack) -> AsyncIterator[Running]:
    """uvicorn on a port."""
    async with _uvicorn(stack) as (server, port):
        yield Running(PortEntrance(port), [server.pid])


@asynccontextmanager
async def serve_tunnel(stack: Stack, *, standby: int = 4, upgrade_delay: float = 0.0) -> AsyncIterator[Running]:
    """tunnel-asgi through a tunnel."""
    async with AsyncExitStack() as closing:
        entrance = await closing.enter_async_context(TunnelEntrance(upgrade_delay=upgrade_delay))
        tunnel = ["--domain", DOMAIN, "--server", entrance.url, "--standby", str(standby)]
        serving = child("tunnel_asgi", APP, *stack.options, *tunnel, ready=rb"Serving at")
        server = await closing.enter_async_context(serving)
        await entrance.wait_for_waiting(standby)
        yield Running(entrance, [server.pid])


@asynccontextmanager
async def serve_forward(stack: Stack) -> AsyncIterator[Running]:
    """uvicorn on a port, and smallware-tunnel forwarding to it."""
    async with AsyncExitStack() as closing:
        entrance = await closing.enter_async_context(TunnelEntrance())
        server, port = await closing.enter_async_context(_uvicorn(stack))
        arguments = [DOMAIN, str(port), "--server", entrance.url]
        forwarder = child("benchmarks.smallware_tunnel", *arguments, ready=rb"Forwarding")
        client = await closing.enter_async_context(forwarder)
        await entrance.wait_for_waiting(4)
        yield Running(entrance, [server.pid, client.pid])


@asynccontextmanager
async def serve_one_accept(stack: Stack, *, upgrade_delay: float) -> AsyncIterator[Running]:
    """uvicorn on a port, and a forwarder that keeps one WebSocket waiting, as the published client does."""
    async with AsyncExitStack() as closing:
        entrance = await closing.enter_async_context(TunnelEntrance(upgrade_delay=upgrade_delay))
        server, port = await closing.enter_async_context(_uvicorn(stack))
        forwarder = child("benchmarks.one_accept", DOMAIN, str(port), entrance.url, ready=rb"Forwarding")
        client = await closing.enter_async_context(forwarder)
        await entrance.wait_for_waiting(1)
        yield Running(entrance, [server.pid, client.pid])


@asynccontextmanager
async def _uvicorn(stack: Stack) -> AsyncIterator[tuple[Child, int]]:
    async with child("uvicorn", APP, *stack.options, "--port", "0", ready=rb"running on http://[^:]+:(\d+)") as server:
        assert server.match is not None
        yield server, int(server.match[1])


CONTENDERS: dict[str, Callable[[Stack], AbstractAsyncContextManager[Running]]] = {
    "port": serve_port,
    "tunnel": serve_tunnel,
    "forward": serve_forward,
}
