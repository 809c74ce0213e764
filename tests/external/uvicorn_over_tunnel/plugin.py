"""The pytest plugin: installs the tunnel, deselects what cannot hold, counts the streams of every test."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator

import pytest

from . import memory, server
from .deselected import DESELECTED
from .streams import current

server.install()  # before the tests import uvicorn's names


class Tally:
    """The tests that passed, by the kind of stream they opened."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.relay: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.deselected: dict[str, str] = {}
        self.too_few: list[str] = []

    def count(self, streams: dict[str, int]) -> int:
        return len(self.passed & streams.keys())

    @property
    def none(self) -> list[str]:
        return sorted(self.passed - self.relay.keys() - self.memory.keys())


tally = Tally()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tunnel")
    for kind in ("relay", "memory"):
        group.addoption(f"--at-least-{kind}", type=int, default=0, help=f"tests that must open a stream by {kind}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect by the list, and fail if the list names a test that its file no longer has."""
    names = {name for item in items for name in _names(item)}
    tally.deselected = {name: reason for name, reason in DESELECTED.items() if name in names}
    stale = [name for name in DESELECTED if name.partition("::")[0] in config.args and name not in names]
    if stale:
        raise pytest.UsageError(f"deselected.py names tests that do not exist: {', '.join(stale)}")

    out = [item for item in items if not tally.deselected.keys().isdisjoint(_names(item))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def pytest_collection_finish() -> None:
    mocked = sys.modules.get("tests.protocols.test_http")
    if mocked is not None:
        vars(mocked)["get_connected_protocol"] = memory.get_connected_protocol


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    current.reset()
    result = yield
    if current.relay:
        tally.relay[item.nodeid] = current.relay
    if current.memory:
        tally.memory[item.nodeid] = current.memory
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """The relays are closed by the end of the fixtures, and say whether we broke the protocol."""
    yield
    if current.violations:
        pytest.fail(f"breach of the wire protocol: {'; '.join(current.violations)}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        tally.passed.add(report.nodeid)
    elif report.failed:
        tally.passed.discard(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    for kind, streams in (("relay", tally.relay), ("memory", tally.memory)):
        least = session.config.getoption(f"--at-least-{kind}")
        if tally.count(streams) < least:
            tally.too_few.append(f"{tally.count(streams)} tests opened a stream by {kind}; at least {least} must")
    if tally.too_few and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("streams through the tunnel")
    terminalreporter.line(
        f"{len(tally.passed)} tests passed: {tally.count(tally.relay)} with {sum(tally.relay.values())} visitors "
        f"over a relay, {tally.count(tally.memory)} with {sum(tally.memory.values())} visitors in memory, "
        f"{len(tally.none)} with none"
    )
    for name, count in Counter(name.partition("[")[0] for name in tally.none).items():
        terminalreporter.line(f"no stream: {name}: {count}")
    for name, reason in tally.deselected.items():
        terminalreporter.line(f"deselected: {name}: {reason}")
    for complaint in tally.too_few:
        terminalreporter.line(f"FAILED: {complaint}", red=True)


def _names(item: pytest.Item) -> set[str]:
    """With and without its parameters."""
    return {item.nodeid, item.nodeid.partition("[")[0]}
