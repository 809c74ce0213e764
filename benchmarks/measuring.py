"""Run loads on contenders, by turns."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.accounting import cpu_seconds
from benchmarks.contenders import CONTENDERS, ChildFailed, Running, Stack
from benchmarks.entrances import Wrong
from benchmarks.loads import Load
from benchmarks.results import Results, Sample
from benchmarks.visitors import Meter

LIMIT = 10.0  # seconds for beginning and for ending a load, far beyond any good run


@dataclass(frozen=True)
class Pace:
    """How long, in seconds, and how often."""

    rounds: int
    warm_up: float
    window: float
    idle: float
    """Seconds of one look at an idle process."""


async def measure_stack(
    stack: Stack, loads: Collection[Load], contenders: Collection[str], pace: Pace, results: Results
) -> None:
    """Measure loads on contenders, by turns within each round. What fails is noted, and the rest goes on."""
    async with AsyncExitStack() as closing:
        running: dict[str, Running] = {}
        for name in contenders:
            with noting(f"{stack} {name}", results):
                running[name] = await closing.enter_async_context(CONTENDERS[name](stack))
        for load in loads:
            print(f"{stack}: {load.title}", file=sys.stderr, flush=True)
            await _measure_load(stack, load, running, pace, results)


async def _measure_load(stack: Stack, load: Load, running: dict[str, Running], pace: Pace, results: Results) -> None:
    healthy = dict(running)
    for number in range(pace.rounds):
        for name in list(healthy):
            failures = len(results.failures)
            with noting(f"{stack} {name}, {load.title}", results):
                spent = await measure(load, healthy[name], pace)
                results.samples.append(Sample(str(stack), load.name, name, number, *spent))
            if len(results.failures) > failures:
                del healthy[name]  # it need not fail in every round


async def measure(load: Load, contender: Running, pace: Pace) -> tuple[int, float, float, float]:
    """Operations in a steady window, and what passed in it: seconds, CPU seconds of the contender, and ours.

    Raises:
        Wrong: an answer was not what it should have been.
        TimeoutError: nothing came.
    """
    with metering() as meter:
        async with asyncio.timeout(LIMIT):
            await load.begin(meter, contender.entrance)
        await meter.run_for(pace.warm_up)
        before = _look(meter, contender)
        await meter.run_for(pace.window)
        after = _look(meter, contender)
        async with asyncio.timeout(LIMIT):
            await meter.end()
    operations, seconds, cpu, own = (end - start for start, end in zip(before, after, strict=True))
    if not operations:
        raise Wrong("nothing was completed")
    return int(operations), seconds, cpu, own


def _look(meter: Meter, contender: Running) -> tuple[float, float, float, float]:
    return meter.operations, time.perf_counter(), cpu_seconds(contender.pids), time.process_time()


@contextmanager
def metering() -> Iterator[Meter]:
    """A meter that fails with whatever goes wrong in a callback of the loop. Nobody is left behind."""
    meter = Meter()
    loop = asyncio.get_running_loop()

    def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        meter.fail(context.get("exception") or Wrong(context["message"]))

    before = loop.get_exception_handler()
    loop.set_exception_handler(fail)
    try:
        yield meter
    finally:
        meter.abandon()
        loop.set_exception_handler(before)


@contextmanager
def noting(what: str, results: Results) -> Iterator[None]:
    """Note a failure instead of passing it on: it must not cost the others their results."""
    try:
        yield
    except (Wrong, ChildFailed, OSError) as error:  # a TimeoutError is an OSError
        results.failures.append(f"{what}: {str(error) or type(error).__name__}")
        print(f"FAILED {results.failures[-1]}", file=sys.stderr, flush=True)
