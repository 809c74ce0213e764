"""What is no load: first bytes of a burst, memory, start-up, idling. All on the stack that needs no extras."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from benchmarks.accounting import cpu_seconds, memory_kib
from benchmarks.contenders import APP, STACKS, Running, child, serve_one_accept, serve_port, serve_tunnel
from benchmarks.entrances import PortEntrance
from benchmarks.loads import GET
from benchmarks.measuring import LIMIT, Pace, metering, noting
from benchmarks.results import Figure, Results
from benchmarks.visitors import Crowd

STACK = STACKS["h11+asyncio"]
BURST = 50  # visitors at once
UPGRADE_DELAY = 0.05  # seconds that TCP, TLS and the upgrade of a dial shall take
FIRST = 100  # connections before those whose memory is measured: they use up what the start left free
MEASURED = 400  # connections whose memory is measured
FEW = 8  # waiting WebSockets that idle
IDLE_SAMPLES = 6


async def burst(pace: Pace, results: Results) -> None:
    """How long the last of many visitors waits for the first byte, if dials take as long as on a real network."""
    found = {}
    for name, serve in (
        (Figure.BURST_TUNNEL, serve_tunnel(STACK, upgrade_delay=UPGRADE_DELAY)),
        (Figure.BURST_ONE_ACCEPT, serve_one_accept(STACK, upgrade_delay=UPGRADE_DELAY)),
    ):
        async with serve as server, staying(server, BURST) as crowd:
            found[name] = _p99(crowd.first_bytes) * 1000
    results.note(found)


async def memory(pace: Pace, results: Results) -> None:
    """What an idle visitor connection and a waiting WebSocket hold."""
    found = {}
    for name, serve in ((Figure.VISITOR_PORT, serve_port(STACK)), (Figure.VISITOR_TUNNEL, serve_tunnel(STACK))):
        async with serve as server, staying(server, FIRST):
            before = memory_kib(server.pids)
            async with staying(server, MEASURED):
                found[name] = (memory_kib(server.pids) - before) / MEASURED
    async with serve_tunnel(STACK, standby=FIRST) as few, serve_tunnel(STACK, standby=FIRST + MEASURED) as many:
        found[Figure.WAITING] = (memory_kib(many.pids) - memory_kib(few.pids)) / MEASURED
    results.note(found)


async def startup(pace: Pace, results: Results) -> None:
    """From the start of the process to the first byte a visitor gets."""
    found = {}
    for name, module, options in (
        (Figure.START_PORT, "uvicorn", ["--port", "0"]),
        (Figure.START_TUNNEL, "tunnel_asgi", ["--local", "--port", "0"]),
    ):
        started = time.perf_counter()
        serve = child(module, APP, *STACK.options, *options, ready=rb"(?:running on|Serving at) http://[^:]+:(\d+)")
        async with serve as server:
            begun = time.perf_counter() - started
            assert server.match is not None
            running = Running(PortEntrance(int(server.match[1])), [server.pid])
            async with staying(running, 1) as crowd:
                found[name] = (begun + crowd.first_bytes[0]) * 1000
    results.note(found)


async def idle(pace: Pace, results: Results) -> None:
    """What is used while nobody comes; both idle at the same time."""
    async with serve_port(STACK) as port, serve_tunnel(STACK, standby=FEW) as tunnel:
        idlers = {Figure.IDLE_PORT: port.pids, Figure.IDLE_TUNNEL: tunnel.pids}
        await asyncio.sleep(1)  # what a start leaves to do
        for _ in range(IDLE_SAMPLES):
            before = {name: cpu_seconds(pids) for name, pids in idlers.items()}
            started = time.perf_counter()
            await asyncio.sleep(pace.idle)
            seconds = time.perf_counter() - started
            results.note({name: 100 * (cpu_seconds(pids) - before[name]) / seconds for name, pids in idlers.items()})


REPEATED: dict[str, Callable[[Pace, Results], Awaitable[None]]] = {
    "burst": burst,
    "memory": memory,
    "startup": startup,
}
ONCE = {"idle": idle}
FIGURES = REPEATED | ONCE


async def measure_figure(name: str, pace: Pace, results: Results) -> None:
    """Measure one of these. What fails is noted."""
    print(name, file=sys.stderr, flush=True)
    for _ in range(pace.rounds if name in REPEATED else 1):
        with noting(name, results):
            await FIGURES[name](pace, results)


@asynccontextmanager
async def staying(server: Running, size: int) -> AsyncIterator[Crowd]:
    """Let visitors come at once and stay; inside the block each of them has had an answer."""
    with metering() as meter:
        crowd = Crowd(meter, server.entrance, size, GET)
        async with asyncio.timeout(LIMIT):
            await meter.until(crowd.complete)
        yield crowd
        crowd.leave()
        async with asyncio.timeout(LIMIT):
            await meter.end()


def _p99(values: list[float]) -> float:
    """The nearest rank; of 50 values it is the largest."""
    return sorted(values)[-(-99 * len(values) // 100) - 1]
