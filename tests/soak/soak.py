"""Many visitors, many requests, and at the end nothing may be wrong and nothing left. See README.md here.

python -m tests.soak.soak [--requests N] [--visitors N] [--faults | --no-faults] [--http h11|httptools]
                          [--loop asyncio|uvloop] [--seed S] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.faults import Faults, Ground
from tests.soak.kinds import FAULTY_KINDS, GOOD_KINDS, Kind
from tests.soak.process import ServingProcess, State, serving_process
from tests.soak.visitors import HANG, OK, UNEXPLAINED, WRONG, Book, Visitor

__all__ = ["Options", "Report", "run"]

STANDBY = 4  # WebSockets waiting while nobody visits
WARM_UP = 20  # requests of each visitor before memory is measured for the first time
FAULT_EVERY = 150  # requests; in a short run more often
LEAST_FAULTS = 60
RESTART_EVERY = 20_000  # requests, but at least once; each one breaks every connection
QUIET_TIMEOUT = 60.0  # seconds for everything to be given back: drains take up to 30, surplus WebSockets 5
MEETING_TIMEOUT = 120.0  # seconds for every visitor to get a WebSocket
ASK_AGAIN = 60  # times
ASK_PAUSE = 0.2  # seconds
MEMORY_TOLERANCE = 0.10  # of the memory after the warm-up; the allocator never gives all of it back
MEMORY_LEAST = 4 * 1024 * 1024  # bytes, the same for a short run
BLOCKS_TOLERANCE = 1_500  # of memory that Python holds: caches of libraries, never one for each request


@dataclass(frozen=True)
class Options:
    """What is run."""

    requests: int = 100_000
    visitors: int = 1_000
    faults: bool = True
    http: str = "h11"
    loop: str = "asyncio"
    seed: int = 1


@dataclass
class Report:
    """What came of it. ``breaches`` is empty if all is well."""

    options: Options
    seconds: float = 0.0
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    injected: dict[str, int] = field(default_factory=dict)
    at_once: int = 0
    fresh: State | None = None
    warm: State | None = None
    last: State | None = None
    peak_memory: int = 0
    breaches: list[str] = field(default_factory=list)


class Soak:
    """One run."""

    def __init__(self, options: Options) -> None:
        self.report = Report(options)
        self._options = options
        self._ground = Ground()
        self._book = Book()

    async def run(self) -> Report:
        ground, options = self._ground, self._options
        await ground.begin()
        try:
            process = serving_process(
                ground.relay.server_url,
                http=options.http,
                loop=options.loop,
                standby=STANDBY,
                max_connections=2 * options.visitors,
            )
            async with process as serving:
                await self._phases(serving)
        finally:
            await ground.close()
        self._check_relay()
        return self.report

    async def _phases(self, serving: ServingProcess) -> None:
        report, options = self.report, self._options
        report.fresh = await self._quiet(serving)
        await self._visit("warm", options.visitors * WARM_UP, GOOD_KINDS, Book())
        report.warm = await self._quiet(serving, report.fresh)
        started = time.monotonic()
        await self._main_part()
        report.seconds = time.monotonic() - started
        await self._visit("after", options.visitors, GOOD_KINDS, Book())
        report.last = await self._quiet(serving, report.fresh)
        report.peak_memory = serving.peak()
        self._check_state(report.fresh, report.warm, report.last)
        self._expect(await serving.stop() == 0, "the serving process did not end in good order")

    async def _main_part(self) -> None:
        options = self._options
        if not options.faults:
            await self._visit("main", options.requests, GOOD_KINDS, self._book)
        else:
            every = min(FAULT_EVERY, options.requests // LEAST_FAULTS)
            restart_every = min(RESTART_EVERY, options.requests * 2 // 3)
            faults = Faults(self._ground, self._book, every=every, restart_every=restart_every, seed=options.seed)
            injecting = asyncio.create_task(faults.run())
            visiting = asyncio.create_task(self._visit("main", options.requests, GOOD_KINDS + FAULTY_KINDS, self._book))
            await asyncio.wait([injecting, visiting], return_when=asyncio.FIRST_COMPLETED)
            await _cancel(injecting)
            await visiting
            self.report.injected = dict(faults.injected)
        self._note_outcomes()

    async def _visit(self, phase: str, requests: int, kinds: Sequence[Kind], book: Book) -> None:
        """Let all visitors come at once. In every phase but the main one all must be well."""
        visitors = self._options.visitors
        together = asyncio.Barrier(visitors + 1) if phase == "warm" else None
        async with asyncio.TaskGroup() as group:
            for number in range(visitors):
                share = requests * (number + 1) // visitors - requests * number // visitors
                visitor = Visitor(f"{phase}-{number}", self._ground.door, book, kinds, self._options.seed)
                group.create_task(visitor.visit(share, together))
            if together is not None:
                await self._meet(together)
        if book is not self._book:
            self.report.breaches += book.complaints
            self._expect(book.total(OK) == book.done, f"not every request was answered in the phase {phase!r}")

    async def _meet(self, together: asyncio.Barrier) -> None:
        """Every visitor has been served, and all of them are still connected."""
        async with asyncio.timeout(MEETING_TIMEOUT):
            await together.wait()
        self.report.at_once = sum(tunnel.state == "open" for tunnel in self._ground.relay.tunnels)
        self._expect(self.report.at_once == self._options.visitors, "not all visitors were connected at the same time")

    async def _quiet(self, serving: ServingProcess, before: State | None = None) -> State:
        """What the process holds once nobody visits and every surplus WebSocket is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(QUIET_TIMEOUT):
                await self._ground.relay.wait_until(
                    lambda relay: [tunnel.state for tunnel in relay.tunnels] == ["waiting"] * STANDBY
                )
        # The last callbacks of its loop come a moment later.
        state = await serving.ask()
        for _ in range(ASK_AGAIN):
            await asyncio.sleep(ASK_PAUSE)
            previous, state = state, await serving.ask()
            if state.held == (before or previous).held:
                break
        return state

    # Judging

    def _expect(self, good: bool, otherwise: str) -> None:
        if not good:
            self.report.breaches.append(otherwise)

    def _note_outcomes(self) -> None:
        for (kind, outcome), count in sorted(self._book.outcomes.items()):
            self.report.outcomes.setdefault(kind, {})[outcome] = count
        self.report.breaches += self._book.complaints
        bad = self._book.total(WRONG, HANG, UNEXPLAINED)
        self._expect(bad == 0, f"{bad} requests went wrong without an injected fault, or got a wrong answer")
        self._expect(self._book.done >= self._options.requests, f"only {self._book.done} requests were made")

    def _check_state(self, fresh: State, warm: State, last: State) -> None:
        for name, before in fresh.held.items():
            after = last.held[name]
            self._expect(after == before, f"{name}: {before} before the first visitor, {after} after the last")
        allowed = warm.memory + max(int(warm.memory * MEMORY_TOLERANCE), MEMORY_LEAST)
        self._expect(last.memory <= allowed, f"memory: {_mib(last.memory)}, at most {_mib(allowed)} was expected")
        grown = last.blocks - warm.blocks
        self._expect(grown <= BLOCKS_TOLERANCE, f"{grown} blocks of memory more than after the warm-up")
        self._expect("hostile" not in last.calls, f"the app was called {last.calls.get('hostile')} times for garbage")
        self._expect(not last.errors, f"logged: {last.errors}")
        self._expect(self._options.faults or not last.warnings, f"logged: {last.warnings}")

    def _check_relay(self) -> None:
        self._expect(not self._ground.violations, f"the client broke the protocol: {self._ground.violations}")
        self._expect(not self._ground.relay.tunnels, "the relay still has WebSockets")
        self._expect(not self._ground.door.connections, "a visitor has not left")


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel it; an error it ended with before is raised."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def run(options: Options) -> Report:
    """Run it in this loop, in which nothing may be left either."""
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
    report = await Soak(options).run()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    report.breaches += [f"a task is left in the driver: {task}" for task in left]
    report.breaches += [f"the driver's loop heard of {context}" for context in unheard]
    return report


def print_report(report: Report) -> None:
    """The table."""
    done = sum(sum(outcomes.values()) for outcomes in report.outcomes.values())
    print(f"{report.options}")
    print(f"{done} requests in {report.seconds:.1f} s, {done / report.seconds:.0f} a second")
    print(f"{report.at_once} visitors connected at the same time")
    for kind, outcomes in report.outcomes.items():
        failed = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if outcome != OK)
        print(f"  {kind:16}{outcomes.get(OK, 0):8} ok   {failed}")
    if report.injected:
        print("faults: " + ", ".join(f"{count} {name}" for name, count in sorted(report.injected.items())))
    _print_states(report)
    print("\n".join(["BREACHES:", *report.breaches]) if report.breaches else "all is well")


def _print_states(report: Report) -> None:
    states = {"fresh": report.fresh, "warm": report.warm, "last": report.last}
    for name, state in states.items():
        if state is not None:
            held = ", ".join(f"{what} {_count(value)}" for what, value in state.held.items())
            print(f"  {name:6}{_mib(state.memory)}, {state.blocks} blocks, {held}")
    print(f"  peak  {_mib(report.peak_memory)}")


def _count(value: object) -> object:
    return len(value) if isinstance(value, list) else value


def _mib(size: int) -> str:
    return f"{size / 1024 / 1024:.1f} MiB"


def parse_arguments() -> tuple[Options, Path | None]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.soak")
    defaults = Options()
    parser.add_argument("--requests", type=int, default=defaults.requests)
    parser.add_argument("--visitors", type=int, default=defaults.visitors)
    parser.add_argument("--faults", action=argparse.BooleanOptionalAction, default=defaults.faults)
    parser.add_argument("--http", choices=["h11", "httptools"], default=defaults.http)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default=defaults.loop)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--json", type=Path, help="write the report here, too")
    arguments = vars(parser.parse_args())
    file = arguments.pop("json")
    return Options(**arguments), file


def main() -> int:
    """Run, print, and say by the exit code whether all is well."""
    options, file = parse_arguments()
    report = asyncio.run(run(options))
    print_report(report)
    if file is not None:
        file.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return 1 if report.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
