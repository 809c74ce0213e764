"""The soak of ``tests/soak``, short enough for every run of the tests. Its README says what is checked."""

from __future__ import annotations

import asyncio

import pytest

from tests.soak.soak import Options, print_report, run

# Python 3.11 drops, unclosed, the sockets it accepted in the very iteration in which a server is closed: here, those of
# visitors who come while the relay restarts. Later versions close them.
restarts = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@restarts
@pytest.mark.timeout(300)  # a few seconds of work, but an outage is waited for with real backoff
@pytest.mark.parametrize("faults", [False, True], ids=["no faults", "faults"])
def test_every_request_gets_its_own_answer_or_fails_for_a_known_fault_and_nothing_is_left(faults: bool) -> None:
    report = asyncio.run(run(Options(requests=1_500, visitors=60, faults=faults)))
    print_report(report)
    assert report.breaches == []


@restarts
@pytest.mark.timeout(300)
def test_the_other_parser_and_the_other_loop_pass_the_same() -> None:
    pytest.importorskip("httptools")
    pytest.importorskip("uvloop")
    report = asyncio.run(run(Options(requests=500, visitors=30, faults=True, http="httptools", loop="uvloop")))
    print_report(report)
    assert report.breaches == []
