"""The targets of ``tests/fuzz`` without a fuzzer: every input that was kept, and a few hundred made from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.tape import Tape
from tests.fuzz.targets import TARGETS, corpus

EXAMPLES = 150

targets = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@targets
def test_every_input_kept_keeps_the_laws(name: str) -> None:
    inputs = corpus(name)
    assert inputs
    for data in inputs:
        TARGETS[name](data)


@targets
def test_any_bytes_keep_the_laws(name: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.binary(max_size=200))
    def law(data: bytes) -> None:
        TARGETS[name](data)

    law()


@targets
def test_whatever_is_pieced_together_from_the_inputs_keeps_the_laws(name: str) -> None:
    inputs = st.sampled_from(corpus(name))
    piece = st.builds(lambda data, start, size: data[start:][:size], inputs, st.integers(0, 100), st.integers(1, 100))

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(
        inputs, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 5), piece | st.binary(max_size=3)), max_size=4)
    )
    def law(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
        for position, removed, added in changes:
            data = data[:position] + added + data[position + removed :]
        TARGETS[name](data)

    law()


def test_a_tape_that_is_over_goes_on_with_zeros() -> None:
    tape = Tape(b"\x02ab\x01")
    assert tape.chunk() == b"ab"
    assert tape.flag()
    assert not tape
    assert (tape.byte(), tape.chunk(), tape.choose("xyz")) == (0, b"", "x")
