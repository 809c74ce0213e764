"""The instrument works; what it measures is no matter of a test."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks import contenders, report
from benchmarks.contenders import STACKS, Running, Stack
from benchmarks.entrances import PortEntrance, Wrong
from benchmarks.goals import verdict
from benchmarks.loads import LOADS
from benchmarks.measuring import Pace, measure, measure_stack
from benchmarks.results import Figure, Results, Sample
from tests.support import run_async

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")

ROOT = Path(__file__).parent.parent
GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
MOMENT = Pace(rounds=1, warm_up=0.01, window=0.05, idle=0.1)


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[Running]:
    """A port of this process whose server says the same to everything. At the end nobody may still be connected."""
    visits: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Running(PortEntrance(server.sockets[0].getsockname()[1]), [os.getpid()])
        await asyncio.gather(*filter(None, visits))


def make_results() -> Results:
    """Two rounds of one load in which the tunnel costs half as much as the port, and one figure."""
    results = Results("2026-01-01", {"processor": "an abacus"}, rounds=2, window=1.0)
    for number in range(2):
        for name, cost in (("port", 2.0), ("tunnel", 1.0)):
            results.samples.append(Sample("h11+asyncio", "get", name, number, 1_000_000, 4.0, cost, 1.0))
        results.note({Figure.WAITING: 41.0})
    return results


@pytest.mark.timeout(120)
def test_the_command_measures_every_contender_and_keeps_what_it_measured(tmp_path: Path) -> None:
    kept = tmp_path / "results.json"
    arguments = ["--quick", "--rounds", "1", "--only", "get", "--stack", "h11+asyncio", "--json", str(kept)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    results = Results.load(kept)
    assert results.failures == []
    assert [sample.contender for sample in results.samples] == ["port", "tunnel", "forward"]
    assert all(sample.operations and sample.cpu_seconds > 0 for sample in results.samples)
    assert report.text_report(results).strip() == run.stdout.strip()


@run_async
async def test_an_answer_that_differs_fails_the_measurement() -> None:
    async with answering(GOOD.replace(b"hello", b"howdy")) as server:
        with pytest.raises(Wrong, match="howdy"):
            await measure(LOADS["get"], server, MOMENT)


@run_async
async def test_a_contender_that_fails_does_not_cost_the_others_their_results() -> None:
    results = make_results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.CONTENDERS, "port", lambda stack: answering(b"HTTP/1.1 500 Oh\r\n\r\n"))
        patch.setitem(contenders.CONTENDERS, "tunnel", lambda stack: answering(GOOD))
        two_rounds = dataclasses.replace(MOMENT, rounds=2)
        await measure_stack(Stack("h11", "asyncio"), [LOADS["get"]], ["port", "tunnel"], two_rounds, results)
    [failure] = results.failures
    assert failure.startswith("h11+asyncio port, small GET")
    assert [sample.contender for sample in results.samples[-2:]] == ["tunnel", "tunnel"]
    assert all(sample.operations for sample in results.samples[-2:])


@run_async
async def test_a_server_that_does_not_start_is_reported_with_its_last_words() -> None:
    with pytest.raises(contenders.ChildFailed, match="No module named"):
        async with contenders.child("benchmarks.nowhere", ready=b"never"):
            pass


def test_ratios_are_taken_within_a_round() -> None:
    results = make_results()
    results.samples[0] = dataclasses.replace(results.samples[0], cpu_seconds=4.0)
    assert results.ratios("h11+asyncio", "get", "tunnel", "port") == [0.25, 0.5]


def test_the_median_decides_whether_a_goal_is_met() -> None:
    assert verdict([0.1, 1.0, 9.0], 1.0) == "met"
    assert verdict([0.1, 1.1, 1.2], 1.0) == "missed"
    assert verdict([], 1.0) == ""


def test_the_tables_of_the_readme_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.update_readme(make_results(), Path("results/plot.png"), readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "(results/plot.png)" in text
    assert "0.500 (0.500 to 0.500) met" in text
    assert "41.0 (41.0 to 41.0) missed" in text


def test_the_readme_shows_the_last_run_that_is_kept() -> None:
    kept = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not kept:
        return
    plot = kept[-1].with_suffix(".png").relative_to(report.README.parent)
    assert report.markdown_report(Results.load(kept[-1]), plot) in report.README.read_text()


def test_what_was_measured_survives_its_file(tmp_path: Path) -> None:
    make_results().save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == make_results()


def test_every_stack_has_a_name_of_its_own() -> None:
    assert STACKS.keys() == {"h11+asyncio", "h11+uvloop", "httptools+uvloop"}
