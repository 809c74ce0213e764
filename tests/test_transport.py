from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import Recorder, settle, watch_unhandled
from tests.support import run_async
from tunnel_asgi.transport import HELD_LIMIT, HIGH_WATER, PROMPT, READ_SIZE, SLICE, TunnelTransport


class FakeWire:
    """A WebSocket that records, and fails the test if the transport asks for something it must not."""

    def __init__(self) -> None:
        self.writable = True
        self.buffered = 0
        self.sent: list[bytes] = []  # the empty message is EOF, as in PROTOCOL.md 4
        self.calls: list[str] = []
        self.released = False

    def send_data(self, data: bytes | memoryview) -> None:
        assert self.writable
        assert len(data) > 0
        self._send(bytes(data))

    def send_eof(self) -> None:
        self._send(b"")

    def _send(self, message: bytes) -> None:
        assert not self.released
        assert b"" not in self.sent, "something was sent after EOF"
        self.sent.append(message)

    def pause_reading(self) -> None:
        self._call("pause")

    def resume_reading(self) -> None:
        self._call("resume")

    def release(self) -> None:
        assert self.sent[-1:] == [b""], "released before the outgoing direction has ended"
        self._call("release")
        self.released = True

    def _call(self, name: str) -> None:
        assert not self.released
        self.calls.append(name)


class Stage:
    """A transport on a fake wire, started with a recording protocol."""

    def __init__(self, protocol: asyncio.BaseProtocol | None = None, **options: Any) -> None:
        self.wire = FakeWire()
        self.recorder = Recorder(**options)
        self.transport = TunnelTransport(
            self.wire, protocol or self.recorder, extra={"connection_id": "7f3a"}, loop=asyncio.get_running_loop()
        )
        self.transport.start()

    @property
    def events(self) -> list[Any]:
        return self.recorder.events

    def block(self) -> None:
        """The wire takes no more."""
        self.wire.writable = False

    def unblock(self) -> None:
        self.wire.writable = True
        self.transport.wire_writable()

    async def lost(self) -> Any:
        """What connection_lost was called with, the last event of all."""
        await self.recorder.lost.wait()
        await settle()
        assert [event for event in self.events if event == "lost" or isinstance(event, BaseException)] == [
            self.events[-1]
        ]
        return self.events[-1]


# Writing


@run_async
async def test_what_is_written_in_one_loop_iteration_leaves_as_one_message() -> None:
    stage = Stage()
    stage.transport.write(b"head ")
    stage.transport.write(b"body")
    stage.transport.writelines([b" and", bytearray(b" more"), memoryview(b"!")])
    assert stage.wire.sent == []
    assert stage.transport.get_write_buffer_size() == 19
    await asyncio.sleep(0)
    assert stage.wire.sent == [b"head body and more!"]
    stage.transport.write(b"next")
    await asyncio.sleep(0)
    assert stage.wire.sent[1:] == [b"next"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_large_writes_leave_at_once_in_slices() -> None:
    stage = Stage()
    data = bytes(range(256)) * (3 * SLICE // 256) + b"rest"
    stage.transport.write(data)
    assert [len(message) for message in stage.wire.sent] == [SLICE, SLICE, SLICE, 4]
    assert b"".join(stage.wire.sent) == data
    stage.transport.close()
    await stage.lost()


@pytest.mark.parametrize("size", [PROMPT, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE])
@run_async
async def test_no_message_is_larger_than_a_slice_and_none_is_empty(size: int) -> None:
    stage = Stage()
    stage.transport.write(b"x" * size)
    stage.transport.close()
    *messages, eof = stage.wire.sent
    assert eof == b""
    assert sum(map(len, messages)) == size
    assert {len(message) for message in messages[:-1]} <= {SLICE}
    assert 0 < len(messages[-1]) <= SLICE
    await stage.lost()


@run_async
async def test_small_writes_that_had_to_wait_leave_joined() -> None:
    stage = Stage()
    stage.block()
    for _ in range(3 * SLICE // 256):
        stage.transport.write(bytes(range(256)))
    stage.unblock()
    assert [len(message) for message in stage.wire.sent] == [SLICE] * 3
    assert b"".join(stage.wire.sent) == bytes(range(256)) * (3 * SLICE // 256)
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_a_large_write_between_small_ones_keeps_its_place() -> None:
    stage = Stage()
    stage.block()
    writes = [b"a" * 10, b"b" * (SLICE + 10), b"c" * 10, b"d" * SLICE, b"e"]
    stage.transport.writelines(writes)
    stage.unblock()
    assert b"".join(stage.wire.sent) == b"".join(writes)
    assert max(map(len, stage.wire.sent)) <= SLICE
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_an_empty_write_never_goes_out() -> None:
    stage = Stage()
    for empty in (b"", bytearray(), memoryview(b"")):
        stage.transport.write(empty)
    stage.transport.writelines([])
    await settle()
    assert stage.wire.sent == []
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_a_buffer_may_be_changed_once_write_has_returned() -> None:
    stage = Stage()
    buffer = bytearray(b"first")
    stage.transport.write(buffer)
    buffer[:] = b"wrong"
    stage.transport.write(memoryview(buffer)[:0])
    view = memoryview(bytearray(b"again"))
    stage.transport.write(view)
    view[:] = b"WRONG"
    await asyncio.sleep(0)
    assert stage.wire.sent == [b"firstagain"]
    stage.transport.abort()
    await stage.lost()


@pytest.mark.parametrize("data", ["text", 7, None, [1, 2]])
@run_async
async def test_only_bytes_can_be_written(data: Any) -> None:
    stage = Stage()
    with pytest.raises(TypeError, match="bytes-like"):
        stage.transport.write(data)
    stage.transport.close()
    with pytest.raises(TypeError):
        stage.transport.write(data)
    await stage.lost()


@run_async
async def test_a_write_after_close_is_silently_lost() -> None:
    stage = Stage()
    stage.transport.close()
    stage.transport.write(b"late")
    stage.transport.writelines([b"later"])
    await stage.lost()
    stage.transport.write(b"too late")
    await settle()
    assert stage.wire.sent == [b""]


@run_async
async def test_the_end_of_the_outgoing_direction_comes_after_what_was_written() -> None:
    stage = Stage()
    assert stage.transport.can_write_eof()
    stage.transport.write(b"last")
    stage.transport.write_eof()
    stage.transport.write_eof()
    assert stage.wire.sent == [b"last", b""]
    for late in (b"x", b""):
        with pytest.raises(RuntimeError, match="write_eof"):
            stage.transport.write(late)
    assert not stage.transport.is_closing()
    stage.transport.close()
    stage.transport.write_eof()
    assert await stage.lost() == "lost"
    assert stage.wire.sent == [b"last", b""]


@run_async
async def test_write_eof_waits_for_a_wire_that_is_not_writable() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"last")
    stage.transport.write_eof()
    await settle()
    assert stage.wire.sent == []
    stage.unblock()
    assert stage.wire.sent == [b"last", b""]
    stage.transport.abort()
    await stage.lost()


# Write watermarks


@run_async
async def test_the_protocol_is_paused_once_above_high_water_and_resumed_once_below_low_water() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"x" * HIGH_WATER)
    assert stage.events == ["made"]
    stage.transport.write(b"x" * SLICE)
    stage.transport.write(b"x" * SLICE)
    await settle()
    assert stage.events == ["made", "pause"]
    assert stage.transport.get_write_buffer_size() == HIGH_WATER + 2 * SLICE
    stage.unblock()
    assert stage.events == ["made", "pause", "resume"]
    assert stage.transport.get_write_buffer_size() == 0
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_many_small_writes_are_noticed_in_the_same_loop_iteration() -> None:
    stage = Stage()
    stage.transport.set_write_buffer_limits(high=100)
    stage.block()
    stage.transport.write(b"x" * 101)
    await asyncio.sleep(0)
    assert stage.events == ["made", "pause"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_a_protocol_may_write_from_within_resume_writing() -> None:
    stage = Stage()
    stage.recorder.on["resume"] = lambda: stage.transport.write(b"more" * SLICE)
    stage.block()
    stage.transport.write(b"x" * (HIGH_WATER + 1))
    stage.unblock()
    assert b"".join(stage.wire.sent) == b"x" * (HIGH_WATER + 1) + b"more" * SLICE
    assert stage.events == ["made", "pause", "resume"]
    stage.transport.abort()
    await stage.lost()


@pytest.mark.parametrize(
    ("limits", "low", "high"),
    [
        ({}, HIGH_WATER // 4, HIGH_WATER),
        ({"high": 1000}, 250, 1000),
        ({"low": 1000}, 1000, 4000),
        ({"high": 10, "low": 10}, 10, 10),
        ({"high": 0}, 0, 0),
    ],
)
@run_async
async def test_write_buffer_limits_default_as_in_asyncio(limits: dict[str, int], low: int, high: int) -> None:
    stage = Stage()
    assert stage.transport.get_write_buffer_limits() == (HIGH_WATER // 4, HIGH_WATER)
    stage.transport.set_write_buffer_limits(**limits)
    assert stage.transport.get_write_buffer_limits() == (low, high)
    stage.transport.abort()
    await stage.lost()


@pytest.mark.parametrize("limits", [{"high": 1, "low": 2}, {"high": -1}, {"low": -1}, {"high": 1, "low": -1}])
@run_async
async def test_write_buffer_limits_that_make_no_sense_change_nothing(limits: dict[str, int]) -> None:
    stage = Stage()
    with pytest.raises(ValueError, match="must be >= low"):
        stage.transport.set_write_buffer_limits(**limits)
    assert stage.transport.get_write_buffer_limits() == (HIGH_WATER // 4, HIGH_WATER)
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_new_write_buffer_limits_hold_at_once() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"x" * 1000)
    stage.transport.set_write_buffer_limits(high=999)
    assert stage.events == ["made", "pause"]
    stage.transport.set_write_buffer_limits(high=4000)
    assert stage.events == ["made", "pause", "resume"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_a_high_water_of_zero_pauses_for_every_byte_that_has_to_wait() -> None:
    stage = Stage()
    stage.transport.set_write_buffer_limits(high=0)
    stage.transport.write(b"goes at once")
    await asyncio.sleep(0)
    assert stage.events == ["made"]
    stage.block()
    stage.transport.write(b"x")
    await asyncio.sleep(0)
    assert stage.events == ["made", "pause"]
    stage.unblock()
    assert stage.events == ["made", "pause", "resume"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_the_write_buffer_size_counts_the_sockets_buffer() -> None:
    stage = Stage()
    stage.wire.buffered = 500
    stage.transport.write(b"x" * 11)
    assert stage.transport.get_write_buffer_size() == 511
    stage.transport.abort()
    assert stage.transport.get_write_buffer_size() == 0
    await stage.lost()


@run_async
async def test_a_protocol_that_was_paused_is_not_called_back_once_it_is_lost() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"x" * (HIGH_WATER + 1))
    stage.transport.abort()
    stage.transport.set_write_buffer_limits(high=0)
    stage.transport.wire_writable()
    await stage.lost()
    assert stage.events == ["made", "pause", "lost"]


# The end


@run_async
async def test_close_flushes_first_and_then_sends_eof() -> None:
    stage = Stage()
    stage.transport.write(b"answer")
    stage.transport.close()
    assert stage.wire.sent == [b"answer", b""]
    assert stage.wire.released
    assert stage.transport.is_closing()
    assert await stage.lost() == "lost"


@run_async
async def test_close_while_the_wire_is_not_writable_waits_for_it() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"answer")
    stage.transport.close()
    await settle()
    assert stage.wire.sent == []
    assert not stage.wire.released
    assert stage.events == ["made"]
    stage.unblock()
    assert stage.wire.sent == [b"answer", b""]
    assert await stage.lost() == "lost"


@run_async
async def test_a_slow_wire_gets_what_was_written_before_close_piece_by_piece() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"x" * (4 * SLICE))
    stage.transport.close()
    sent = stage.wire.send_data

    def take_one(data: bytes | memoryview) -> None:
        sent(data)
        stage.block()

    stage.wire.send_data = take_one  # type: ignore[method-assign]
    for n in range(1, 5):
        stage.unblock()
        assert [len(message) for message in stage.wire.sent if message] == [SLICE] * n
    assert stage.wire.sent[-1] == b""
    await stage.lost()


@run_async
async def test_abort_discards_what_is_not_sent_yet() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"lost")
    stage.transport.abort()
    assert stage.wire.sent == [b""]
    assert stage.wire.released
    stage.unblock()
    assert await stage.lost() == "lost"
    assert stage.wire.sent == [b""]


@run_async
async def test_abort_ends_a_close_that_waits() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"lost")
    stage.transport.close()
    stage.transport.abort()
    assert stage.wire.released
    assert await stage.lost() == "lost"


ENDS: dict[str, Callable[[TunnelTransport], None]] = {
    "close": lambda transport: transport.close(),
    "abort": lambda transport: transport.abort(),
    "drop": lambda transport: transport.feed_drop("gone"),
    "wire lost": lambda transport: transport.wire_lost(ConnectionResetError("cut")),
    "eof": lambda transport: transport.feed_eof(),
}


@pytest.mark.parametrize("last", ENDS)
@pytest.mark.parametrize("first", ENDS)
@run_async
async def test_connection_lost_comes_once_and_never_from_within_a_call(first: str, last: str) -> None:
    stage = Stage()
    ENDS[first](stage.transport)
    if first != "eof":
        assert stage.events == ["made"]
    ENDS[last](stage.transport)
    assert await stage.lost() in ("lost", stage.events[-1])
    for end in ENDS.values():
        end(stage.transport)
    await stage.lost()


@run_async
async def test_connection_lost_goes_to_the_protocol_of_that_moment() -> None:
    stage = Stage()
    late = Recorder()
    stage.transport.close()
    stage.transport.set_protocol(late)
    assert stage.transport.get_protocol() is late
    await late.lost.wait()
    assert late.events == ["lost"]
    assert stage.events == ["made"]


@run_async
async def test_close_from_within_connection_lost_does_nothing() -> None:
    stage = Stage()
    stage.recorder.on["lost"] = lambda exc: stage.transport.close()
    stage.transport.close()
    stage.transport.close()
    await stage.lost()
    assert stage.events == ["made", "lost"]
    assert stage.wire.sent == [b""]


@run_async
async def test_a_lost_wire_is_a_reset_and_is_never_touched_again() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"lost")
    error = ConnectionResetError("cut")
    stage.transport.wire_lost(error)
    stage.transport.write(b"late")
    stage.unblock()
    assert await stage.lost() is error
    assert stage.wire.sent == []
    assert stage.wire.calls == []


@run_async
async def test_a_wire_lost_while_it_was_paused_is_not_resumed() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"x" * (HELD_LIMIT + 1))
    stage.transport.wire_lost(ConnectionResetError("cut"))
    await stage.lost()
    assert stage.wire.calls == ["pause"]


# Reading


@run_async
async def test_bytes_go_to_the_protocol_in_the_same_call() -> None:
    stage = Stage()
    stage.transport.feed_data(b"one")
    assert stage.events == ["made", b"one"]
    stage.transport.feed_data(b"two")
    assert stage.recorder.data == b"onetwo"
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_nothing_is_delivered_while_reading_is_paused_and_all_of_it_in_order_afterwards() -> None:
    stage = Stage()
    assert stage.transport.is_reading()
    stage.transport.pause_reading()
    stage.transport.pause_reading()
    assert not stage.transport.is_reading()
    for data in (b"a", b"b", b"c"):
        stage.transport.feed_data(data)
    stage.transport.feed_eof()
    await settle()
    assert stage.events == ["made"]
    stage.transport.resume_reading()
    assert stage.transport.is_reading()
    assert stage.events == ["made"], "resume_reading called back from within"
    stage.transport.feed_data(b"d")
    await settle()
    assert stage.events == ["made", b"abcd", "eof", "lost"]


@run_async
async def test_resume_without_a_pause_is_harmless() -> None:
    stage = Stage()
    stage.transport.resume_reading()
    await settle()
    stage.transport.feed_data(b"x")
    stage.transport.resume_reading()
    await settle()
    assert stage.events == ["made", b"x"]
    stage.transport.close()
    stage.transport.pause_reading()
    stage.transport.resume_reading()
    assert not stage.transport.is_reading()
    await stage.lost()


@run_async
async def test_a_protocol_that_pauses_after_every_message_gets_one_at_a_time() -> None:
    stage = Stage()
    stage.recorder.on["data"] = lambda data: stage.transport.pause_reading()
    for n in range(3):
        stage.transport.feed_data(bytes([n]))
    for n in range(3):
        await settle()
        assert stage.recorder.data == bytes(range(n + 1))
        stage.transport.resume_reading()
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_pausing_again_before_the_resume_took_effect_delivers_nothing() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"x")
    stage.transport.resume_reading()
    stage.transport.pause_reading()
    await settle()
    assert stage.events == ["made"]
    stage.transport.resume_reading()
    stage.transport.pause_reading()
    stage.transport.resume_reading()
    await settle()
    assert stage.events == ["made", b"x"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_the_wire_is_paused_only_when_much_is_held_and_resumed_when_all_is_delivered() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"x" * HELD_LIMIT)
    assert stage.wire.calls == []
    stage.transport.feed_data(b"x")
    stage.transport.feed_data(b"x")
    assert stage.wire.calls == ["pause"]
    stage.recorder.on["data"] = lambda data: stage.transport.pause_reading()
    for calls in (["pause"], ["pause"], ["pause"], ["pause", "resume"]):
        stage.transport.resume_reading()
        await settle()
        assert stage.wire.calls == calls
    assert len(stage.recorder.data) == HELD_LIMIT + 2
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_a_large_message_is_delivered_in_pieces_and_a_pause_between_two_of_them_is_heeded() -> None:
    stage = Stage()
    data = bytes(range(256)) * (2 * READ_SIZE // 256) + b"rest"
    sizes: list[int] = []

    def pause(data: bytes) -> None:
        sizes.append(len(data))
        stage.transport.pause_reading()

    stage.recorder.on["data"] = pause
    stage.transport.feed_data(data)
    stage.transport.feed_eof()
    for n in range(1, 3):
        await settle()
        assert sizes == [READ_SIZE] * n
        assert stage.wire.calls == ["pause"]
        stage.transport.resume_reading()
    await settle()
    assert sizes == [READ_SIZE, READ_SIZE, 4]
    assert stage.recorder.data == data
    stage.transport.resume_reading()
    await stage.lost()
    assert stage.wire.calls[:2] == ["pause", "resume"]


@run_async
async def test_the_wire_reads_on_after_a_resume_even_if_nothing_is_held_any_more() -> None:
    stage = Stage()
    stage.recorder.on["data"] = lambda data: stage.transport.pause_reading()
    stage.transport.feed_data(b"x" * (READ_SIZE + 1))
    stage.transport.resume_reading()
    await settle()
    assert len(stage.recorder.data) == READ_SIZE + 1
    assert stage.wire.calls == ["pause"]
    stage.transport.resume_reading()
    await settle()
    assert stage.wire.calls == ["pause", "resume"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_closing_forgets_what_is_held_and_lets_the_wire_read_on() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"x" * (HELD_LIMIT + 1))
    stage.transport.feed_eof()
    stage.transport.resume_reading()
    stage.transport.close()
    assert stage.wire.calls == ["pause", "resume", "release"]
    stage.transport.feed_data(b"late")
    stage.transport.feed_eof()
    await stage.lost()
    assert stage.events == ["made", "lost"]


@run_async
async def test_eof_closes_unless_the_protocol_wants_to_write_on() -> None:
    stage = Stage()
    stage.transport.feed_eof()
    assert stage.wire.sent == [b""]
    assert await stage.lost() == "lost"
    assert stage.events == ["made", "eof", "lost"]


@run_async
async def test_each_direction_ends_on_its_own() -> None:
    stage = Stage(half_close=True)
    stage.transport.feed_data(b"question")
    stage.transport.feed_eof()
    stage.transport.write(b"answer")
    await settle()
    assert not stage.transport.is_closing()
    assert stage.wire.sent == [b"answer"]
    stage.transport.close()
    await stage.lost()
    assert stage.events == ["made", b"question", "eof", "lost"]

    stage = Stage()
    stage.transport.write_eof()
    stage.transport.feed_data(b"more")
    stage.transport.feed_eof()
    assert await stage.lost() == "lost"
    assert stage.events == ["made", b"more", "eof", "lost"]
    assert stage.wire.sent == [b""]


# DROP


@run_async
async def test_a_dropped_visitor_is_a_reset_with_the_servers_reason() -> None:
    stage = Stage()
    stage.transport.feed_drop("it left")
    assert stage.wire.released
    error = await stage.lost()
    assert isinstance(error, ConnectionResetError)
    assert "it left" in str(error)


@run_async
async def test_bytes_sent_before_a_drop_are_delivered_first() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"last words")
    stage.transport.feed_drop("it left")
    await settle()
    assert stage.events == ["made"]
    assert not stage.wire.released
    stage.transport.resume_reading()
    assert isinstance(await stage.lost(), ConnectionResetError)
    assert stage.events[:2] == ["made", b"last words"]


@run_async
async def test_writing_to_a_dropped_visitor_ends_at_once() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"unread")
    stage.transport.feed_drop("it left")
    stage.transport.writelines([b"answer", b"more"])
    assert isinstance(await stage.lost(), ConnectionResetError)
    assert stage.events[:-1] == ["made"]
    assert stage.wire.sent == [b""]


@run_async
async def test_closing_a_dropped_visitor_is_no_error() -> None:
    stage = Stage()
    stage.transport.pause_reading()
    stage.transport.feed_data(b"unread")
    stage.transport.feed_drop("it left")
    stage.transport.close()
    assert await stage.lost() == "lost"


@run_async
async def test_a_drop_after_the_visitors_eof_ends_a_connection_that_is_still_written_to() -> None:
    stage = Stage(half_close=True)
    stage.transport.feed_eof()
    stage.block()
    stage.transport.write(b"answer")
    stage.transport.feed_drop("it left")
    assert isinstance(await stage.lost(), ConnectionResetError)
    assert stage.wire.sent == [b""]


@run_async
async def test_a_drop_ends_a_close_that_waits_for_the_wire() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"answer")
    stage.transport.close()
    stage.transport.feed_drop("it left")
    assert isinstance(await stage.lost(), ConnectionResetError)
    assert stage.wire.released


# Faulty protocols


class Fault(Exception):
    pass


def fail(*_: Any) -> None:
    raise Fault


PROVOCATIONS: dict[str, Callable[[Stage], None]] = {
    "data": lambda stage: stage.transport.feed_data(b"x"),
    "eof": lambda stage: stage.transport.feed_eof(),
    "pause": lambda stage: stage.transport.write(b"x" * (HIGH_WATER + 1)),
    "resume": lambda stage: stage.unblock(),
    "lost": lambda stage: stage.transport.close(),
}


@pytest.mark.parametrize("callback", PROVOCATIONS)
@run_async
async def test_an_exception_in_the_protocol_ends_this_visitor_and_is_reported(callback: str) -> None:
    reports = watch_unhandled()
    stage = Stage()
    if callback in ("pause", "resume"):
        stage.block()
    if callback == "resume":
        PROVOCATIONS["pause"](stage)
    stage.recorder.on[callback] = fail
    PROVOCATIONS[callback](stage)
    await settle()
    assert stage.wire.released
    [report] = reports
    assert isinstance(report["exception"], Fault)
    assert report["transport"] is stage.transport
    assert report["protocol"] is stage.recorder
    if callback != "lost":
        assert isinstance(stage.events[-1], Fault), "connection_lost did not tell why"
    assert stage.wire.sent[-1] == b""


@run_async
async def test_an_exception_in_connection_made_ends_the_visitor() -> None:
    reports = watch_unhandled()
    stage = Stage(made=fail)
    assert stage.wire.released
    assert isinstance(await stage.lost(), Fault)
    assert len(reports) == 1


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
@run_async
async def test_what_ends_the_process_passes_through(exception: type[BaseException]) -> None:
    def leave(data: bytes) -> None:
        raise exception

    stage = Stage(data=leave)
    with pytest.raises(exception):
        stage.transport.feed_data(b"x")
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_a_cancellation_within_a_callback_ends_only_this_visitor() -> None:
    reports = watch_unhandled()

    def cancel(data: bytes) -> None:
        raise asyncio.CancelledError

    stage = Stage(data=cancel)
    stage.transport.feed_data(b"x")
    assert isinstance(await stage.lost(), asyncio.CancelledError)
    assert len(reports) == 1


# BufferedProtocol


class BufferedRecorder(asyncio.BufferedProtocol):
    """Takes so many bytes at a time; ``updated`` is called after each."""

    def __init__(self, size: int, updated: Callable[[], None] = lambda: None) -> None:
        self.buffer = bytearray(size)
        self.chunks: list[bytes] = []
        self.updated = updated
        self.error: BaseException | None = None

    def get_buffer(self, sizehint: int) -> bytearray:
        assert sizehint > 0
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.chunks.append(bytes(self.buffer[:nbytes]))
        self.updated()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc


@run_async
async def test_a_buffered_protocol_gets_its_own_buffer_filled() -> None:
    protocol = BufferedRecorder(4)
    stage = Stage(protocol)
    stage.transport.feed_data(b"0123456789")
    assert protocol.chunks == [b"0123", b"4567", b"89"]
    stage.transport.feed_data(b"ab")
    assert protocol.chunks[3:] == [b"ab"]
    stage.transport.feed_eof()
    await settle()
    assert stage.wire.released


@run_async
async def test_a_buffered_protocol_may_pause_between_two_buffers() -> None:
    protocol = BufferedRecorder(4)
    stage = Stage(protocol)
    protocol.updated = stage.transport.pause_reading
    stage.transport.feed_data(b"01234567")
    stage.transport.feed_data(b"89")
    stage.transport.feed_eof()
    for n in range(1, 4):
        await settle()
        assert protocol.chunks == [b"0123", b"4567", b"89"][:n]
        assert not stage.wire.released
        stage.transport.resume_reading()
    await settle()
    assert stage.wire.released


@run_async
async def test_a_buffered_protocol_that_closes_gets_no_more() -> None:
    protocol = BufferedRecorder(4)
    stage = Stage(protocol)
    protocol.updated = stage.transport.close
    stage.transport.feed_data(b"01234567")
    assert protocol.chunks == [b"0123"]
    await settle()
    assert stage.wire.released


@run_async
async def test_a_protocol_that_takes_over_between_two_buffers_gets_the_rest() -> None:
    protocol = BufferedRecorder(4)
    stage = Stage(protocol)
    protocol.updated = lambda: stage.transport.set_protocol(stage.recorder)
    stage.transport.feed_data(b"01234567")
    assert protocol.chunks == [b"0123"]
    assert stage.events == [b"4567"]
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_an_empty_buffer_ends_the_visitor() -> None:
    reports = watch_unhandled()
    protocol = BufferedRecorder(0)
    stage = Stage(protocol)
    stage.transport.feed_data(b"x")
    await settle()
    assert stage.wire.released
    assert isinstance(protocol.error, RuntimeError)
    assert len(reports) == 1


# What it tells about itself


@run_async
async def test_repr_shows_the_connection_id_and_no_data() -> None:
    stage = Stage()
    stage.block()
    stage.transport.write(b"sesame out")
    stage.transport.pause_reading()
    stage.transport.feed_data(b"sesame in")
    assert repr(stage.transport) == "<TunnelTransport 7f3a open>"
    stage.transport.close()
    assert repr(stage.transport) == "<TunnelTransport 7f3a closing>"
    stage.transport.abort()
    await stage.lost()


@run_async
async def test_extra_info_is_what_the_pool_gave() -> None:
    stage = Stage()
    assert stage.transport.get_extra_info("connection_id") == "7f3a"
    assert stage.transport.get_extra_info("socket") is None
    assert stage.transport.get_extra_info("socket", 7) == 7
    stage.transport.abort()
    await stage.lost()


# Compared with asyncio's own transport on a pair of sockets


class SocketStage:
    """asyncio's transport and a recording protocol at one end, the test at the other."""

    @classmethod
    async def open(cls, **options: Any) -> SocketStage:
        stage = cls()
        ours, stage.peer = socket.socketpair()
        stage.peer.setblocking(False)
        stage.recorder = Recorder(**options)
        stage.transport, _ = await asyncio.get_running_loop().create_connection(lambda: stage.recorder, sock=ours)
        stage.output = b""
        stage.output_ended = False
        return stage

    transport: asyncio.Transport
    recorder: Recorder
    peer: socket.socket
    output: bytes
    output_ended: bool

    def feed_data(self, data: bytes) -> None:
        with suppress(OSError):  # the transport is closed already
            self.peer.send(data)

    def feed_eof(self) -> None:
        with suppress(OSError):
            self.peer.shutdown(socket.SHUT_WR)

    def read_output(self) -> None:
        with suppress(BlockingIOError):
            while not self.output_ended:
                data = self._receive()
                self.output += data
                self.output_ended = not data

    def _receive(self) -> bytes:
        try:
            return self.peer.recv(65536)
        except ConnectionResetError:  # closed over bytes it had not read
            return b""


OPERATIONS = st.one_of(
    st.tuples(st.just("feed_data"), st.binary(min_size=1, max_size=5)),
    st.tuples(st.just("write"), st.binary(max_size=5)),
    st.tuples(
        st.sampled_from(["feed_eof", "write_eof", "close", "abort", "pause_reading", "resume_reading"]), st.none()
    ),
)


def perform(target: Any, name: str, argument: Any) -> str:
    """Call it; the kind of exception it raised."""
    try:
        getattr(target, name)(*[] if argument is None else [argument])
    except Exception as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.timeout(300)  # a loop and a socket pair for each of a hundred examples
@settings(deadline=None)
@given(half_close=st.booleans(), operations=st.lists(OPERATIONS, max_size=12))
def test_it_behaves_as_asyncios_own_transport(half_close: bool, operations: list[tuple[str, Any]]) -> None:
    @run_async
    async def compare() -> None:
        ours, theirs = Stage(half_close=half_close), await SocketStage.open(half_close=half_close)
        fed_eof = False
        for name, argument in operations:
            if name.startswith("feed"):
                if fed_eof:
                    continue
                fed_eof = name == "feed_eof"
                getattr(ours.transport, name)(*[] if argument is None else [argument])
                getattr(theirs, name)(*[] if argument is None else [argument])
            elif fed_eof and name.endswith("_reading"):
                continue  # asyncio tells a protocol that resumes of the same end again; we tell it once
            else:
                assert perform(ours.transport, name, argument) == perform(theirs.transport, name, argument)
            await settle(8)
            assert ours.transport.is_closing() == theirs.transport.is_closing()
            assert ours.transport.is_reading() == theirs.transport.is_reading()
            assert ours.events == theirs.recorder.events
        theirs.read_output()
        assert b"".join(ours.wire.sent) == theirs.output
        assert (b"" in ours.wire.sent) == theirs.output_ended
        for transport in (ours.transport, theirs.transport):
            transport.abort()
        theirs.peer.close()
        await settle()

    compare()
