from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncssh
import pytest
from aiohttp import web

from tests.fakes import make_config, run_on_each_loop, run_virtual, settle, watch_unhandled
from tests.support import DOMAIN, KEYS, Visitor, run_async, visiting
from tunnel_asgi import pool as pool_module
from tunnel_asgi.errors import AuthenticationFailed, BadRequest, ConfigError, ListenerClosed, NoCredits, TunnelError
from tunnel_asgi.listener import (
    Streams,
    TunnelListener,
    TunnelStreamReader,
    create_tunnel_server,
    start_tunnel_server,
)
from tunnel_asgi.pool import TunnelPool
from tunnel_asgi.relay import Relay

KIBIBYTE = 1024
MEBIBYTE = 1024 * KIBIBYTE
STALLED = 0.3  # seconds without progress that count as stalled; too short a time cannot fail a test


@asynccontextmanager
async def relaying(**options: Any) -> AsyncIterator[Relay]:
    """A relay that must have seen no breach of the protocol."""
    async with Relay(keys=KEYS, domain=DOMAIN, **options) as relay:
        yield relay
        assert relay.violations == []


@asynccontextmanager
async def listening(relay: Relay, **options: Any) -> AsyncIterator[TunnelListener]:
    """A listener that is left with no visitor."""
    async with TunnelListener(make_config(relay), **options) as listener:
        yield listener


@asynccontextmanager
async def accepting(**options: Any) -> AsyncIterator[tuple[Relay, Visitor, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A relay, a visitor, and the streams of its connection."""
    async with relaying() as relay, listening(relay, **options) as listener, visiting(relay) as visitor:
        reader, writer = await listener.accept()
        try:
            yield relay, visitor, reader, writer
        finally:
            writer.close()


def accept_soon(listener: TunnelListener, calls: int = 1) -> list[asyncio.Task[Streams]]:
    return [asyncio.create_task(listener.accept()) for _ in range(calls)]


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def serve_one(relay: Relay, listener: TunnelListener) -> None:
    """One visitor, from its request to its end, until the WebSocket is recycled."""
    served = relay.visitors_served
    async with visiting(relay) as visitor:
        reader, writer = await listener.accept()
        await visitor.send(b"question")
        visitor.send_eof()
        assert await reader.read() == b"question"
        writer.write(b"answer")
        writer.close()
        assert await visitor.read_all() == b"answer"
    await relay.wait_until(lambda relay: relay.visitors_served > served)
    await relay.wait_for_waiting()


# As many WebSockets wait as there are pending accept() calls


@pytest.mark.parametrize("calls", [1, 2, 7])
@run_async
async def test_as_many_websockets_wait_as_there_are_pending_calls(calls: int) -> None:
    async with relaying() as relay, listening(relay) as listener:
        pending = accept_soon(listener, calls)
        await relay.wait_for_waiting(calls)
        async with visiting(relay) as visitor:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            [(_, writer)] = [call.result() for call in pending if call.done()]
            await settle(20)
            assert relay.dials == calls
            writer.close()
            assert await visitor.read_all() == b""
        await cancel(*[call for call in pending if not call.done()])


@run_async
async def test_a_listener_nobody_waits_at_dials_nothing() -> None:
    async with relaying() as relay, listening(relay):
        await settle()
    assert relay.dials == 0


@run_async
async def test_a_recycled_websocket_takes_the_next_visitor_and_no_other_is_dialled() -> None:
    async with relaying() as relay, listening(relay) as listener:
        for _ in range(5):
            await serve_one(relay, listener)
        assert relay.dials == 1
        assert relay.visitors_served == 5


@run_async
async def test_a_recycled_websocket_is_handed_to_whoever_waits() -> None:
    async with relaying() as relay, listening(relay) as listener:
        async with visiting(relay) as visitor:
            _, writer = await listener.accept()
            relay.hang()  # another WebSocket will not be had
            [waiting] = accept_soon(listener)
            await relay.wait_until(lambda relay: relay.dials == 2)
            visitor.send_eof()
            writer.close()
        async with visiting(relay):
            _, writer = await waiting
            writer.close()


@run_virtual
async def test_a_websocket_nobody_waits_for_is_closed_after_five_seconds() -> None:
    async with relaying() as relay, listening(relay) as listener:
        loop = asyncio.get_running_loop()
        await serve_one(relay, listener)
        recycled_at = loop.time()
        await relay.wait_until(lambda relay: not relay.tunnels)
        assert 5 <= loop.time() - recycled_at < 6


@run_virtual
async def test_the_websocket_of_a_cancelled_call_is_closed_after_five_seconds() -> None:
    async with relaying() as relay, listening(relay) as listener:
        loop = asyncio.get_running_loop()
        calls = accept_soon(listener, 3)
        await relay.wait_for_waiting(3)
        cancelled_at = loop.time()
        await cancel(*calls[:2])
        await relay.wait_until(lambda relay: len(relay.tunnels) == 1)
        assert 5 <= loop.time() - cancelled_at < 6
        await asyncio.sleep(60)
        assert len(relay.tunnels) == 1
        assert relay.dials == 3
        await cancel(calls[2])


@run_async
async def test_the_dial_of_a_cancelled_call_serves_the_next_call() -> None:
    async with relaying() as relay, listening(relay) as listener:
        relay.hang()
        first = accept_soon(listener)
        await relay.wait_until(lambda relay: relay.dials == 1)
        await cancel(*first)
        relay.accept()
        await serve_one(relay, listener)
        assert relay.dials == 1


@pytest.mark.parametrize("ending", ["client first", "visitor first", "dropped", "dropped after its end"])
@run_async
async def test_reset_is_sent_only_when_both_directions_have_ended(ending: str) -> None:
    async with relaying() as relay, listening(relay) as listener:
        async with visiting(relay) as visitor:
            reader, writer = await listener.accept()
            if ending == "client first":
                writer.close()
                assert await visitor.read_all() == b""
                visitor.send_eof()
            elif ending == "visitor first":
                visitor.send_eof()
                assert await reader.read() == b""
                writer.close()
                assert await visitor.read_all() == b""
            elif ending == "dropped":
                visitor.reset()
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            else:
                visitor.send_eof()
                assert await reader.read() == b""
                await relay.tunnels[0].drop("the router burns")
                with pytest.raises(ConnectionResetError):
                    await writer.wait_closed()
            writer.close()
        await relay.wait_for_waiting()
        await serve_one(relay, listener)
        assert relay.dials == 1


# accept(), close() and failures


def test_a_listener_can_be_made_before_there_is_a_loop() -> None:
    listener: list[TunnelListener] = []

    @run_async
    async def accept_and_close() -> None:
        async with relaying() as relay:
            listener.append(TunnelListener(make_config(relay)))

    @run_async
    async def use() -> None:
        async with relaying() as relay:
            listener[0].config = make_config(relay)
            async with listener[0] as one:
                await serve_one(relay, one)

    accept_and_close()
    use()


@run_async
async def test_accept_after_close_says_that_the_listener_is_closed() -> None:
    async with relaying() as relay:
        listener = TunnelListener(make_config(relay))
        listener.close()
        listener.close()
        await listener.wait_closed()
        for _ in range(2):
            with pytest.raises(ListenerClosed, match="closed"):
                await listener.accept()
        assert relay.dials == 0


@run_async
async def test_close_wakes_every_pending_call() -> None:
    async with relaying() as relay, listening(relay) as listener:
        pending = accept_soon(listener, 3)
        await relay.wait_for_waiting(3)
        listener.close()
        for call in pending:
            with pytest.raises(ListenerClosed):
                await call
        await listener.wait_closed()
        await relay.wait_until(lambda relay: not relay.tunnels)


@run_async
async def test_close_ends_a_dial_that_hangs() -> None:
    async with relaying() as relay, listening(relay) as listener:
        relay.hang()
        pending = accept_soon(listener)
        await relay.wait_until(lambda relay: relay.dials == 1)
        listener.close()
        await asyncio.wait(pending)
        with pytest.raises(ListenerClosed):
            pending[0].result()


@pytest.mark.parametrize("first", ["close", "cancel"])
@run_async
async def test_a_call_cancelled_while_the_listener_closes_is_cancelled(first: str) -> None:
    async with relaying() as relay, listening(relay) as listener:
        [call] = accept_soon(listener)
        await relay.wait_for_waiting()
        if first == "close":
            listener.close()
        call.cancel()
        listener.close()
        await asyncio.wait([call])
        assert call.cancelled()


@run_async
async def test_wait_closed_waits_for_close_and_for_the_visitors() -> None:
    async with relaying() as relay, visiting(relay):
        listener = TunnelListener(make_config(relay))
        closed = asyncio.create_task(listener.wait_closed())
        _, writer = await listener.accept()
        await settle()
        assert not closed.done()
        listener.close()
        await settle()
        assert not closed.done()
        writer.close()
        await closed


@run_async
async def test_async_for_serves_visitors_until_the_listener_is_closed() -> None:
    served = 0
    async with relaying() as relay, listening(relay) as listener:

        async def visit() -> bytes:
            async with visiting(relay) as visitor:
                await visitor.send(b"x")
                visitor.send_eof()
                return await visitor.read_all()

        visits = [asyncio.create_task(visit()) for _ in range(3)]
        async for reader, writer in listener:
            assert await reader.read() == b"x"
            writer.write(b"%d" % served)
            writer.close()
            served += 1
            if served == 3:
                listener.close()
        assert sorted(await asyncio.gather(*visits)) == [b"0", b"1", b"2"]


@run_async
async def test_leaving_the_block_by_an_exception_resets_the_visitors() -> None:
    async with relaying() as relay, visiting(relay) as visitor:
        listener = TunnelListener(make_config(relay))
        streams = []

        async def fail() -> None:
            async with listener:
                reader, writer = await listener.accept()
                streams.append(reader)
                writer.write(b"x")
                assert await visitor.read(1) == b"x"
                raise RuntimeError("of the app")

        with pytest.raises(RuntimeError, match="of the app"):
            await fail()
        [reader] = streams
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionResetError):
            await visitor.read_all()


@run_async
async def test_leaving_the_block_by_an_exception_before_the_first_call_is_simple() -> None:
    with pytest.raises(RuntimeError, match="of the app"):
        async with TunnelListener(make_config()):
            raise RuntimeError("of the app")


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AuthenticationFailed), (403, AuthenticationFailed), (402, NoCredits), (404, BadRequest)]
)
@run_async
async def test_a_refusal_for_good_is_raised_by_every_pending_call_and_every_later_one(
    status: int, kind: type[TunnelError]
) -> None:
    async with relaying() as relay, listening(relay) as listener:
        relay.refuse(status)
        for call in await asyncio.gather(*accept_soon(listener, 3), return_exceptions=True):
            assert type(call) is kind
        relay.accept()
        with pytest.raises(kind):
            await listener.accept()
        assert relay.dials <= 2 * 3


@run_async
async def test_an_unreadable_ca_is_raised_by_accept(tmp_path: Path) -> None:
    config = make_config("wss://127.0.0.1:9/tunnels", trust_ca=tmp_path / "missing.pem")
    async with TunnelListener(config) as listener:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"missing\.pem"):
                await listener.accept()


@pytest.mark.parametrize("status", [429, 500, 503])
@run_async
async def test_a_server_in_trouble_is_waited_out(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "FIRST_DELAY", 0.01)
    async with relaying() as relay, listening(relay) as listener:
        relay.refuse(status, times=2)
        await serve_one(relay, listener)
        assert relay.dials == 3
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


# Visitors that come when nobody waits


async def accept_and_cancel_at_once(relay: Relay, listener: TunnelListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancel a call in the very moment in which its visitor comes."""
    [call] = accept_soon(listener)
    await relay.wait_for_waiting()
    hand_over = listener._hand_over

    def hand_over_and_cancel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hand_over(reader, writer)
        call.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(listener, "_hand_over", hand_over_and_cancel)
        async with visiting(relay) as visitor:
            await visitor.send(b"hello")
            visitor.send_eof()
            await asyncio.wait([call])
            assert call.cancelled()
            patch.undo()
            reader, writer = await listener.accept()
            assert await reader.read() == b"hello"
            writer.close()


@run_async
async def test_the_visitor_of_a_call_that_was_cancelled_at_that_moment_goes_to_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with relaying() as relay, listening(relay) as listener:
        await accept_and_cancel_at_once(relay, listener, monkeypatch)
        assert relay.dials == 1


@run_async
async def test_the_visitor_of_a_call_that_was_cancelled_at_that_moment_goes_to_another_pending_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with relaying() as relay, listening(relay) as listener:
        first, second = accept_soon(listener, 2)
        await relay.wait_for_waiting(2)
        hand_over = listener._hand_over

        def hand_over_and_cancel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hand_over(reader, writer)
            first.cancel()

        monkeypatch.setattr(listener, "_hand_over", hand_over_and_cancel)
        async with visiting(relay):
            _, writer = await second
            assert first.cancelled()
            writer.close()


@run_async
async def test_a_visitor_who_comes_while_nobody_waits_is_kept_for_the_next_call() -> None:
    async with relaying() as relay, listening(relay) as listener:
        await serve_one(relay, listener)
        async with visiting(relay) as visitor:
            await visitor.send(b"early")
            await relay.wait_until(lambda relay: relay.tunnels[0].state == "open")
            reader, writer = await listener.accept()
            assert await reader.readexactly(5) == b"early"
            writer.close()
        assert relay.dials == 1


@run_async
async def test_calls_that_are_over_are_skipped_when_a_visitor_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relaying() as relay, listening(relay) as listener:
        over, pending = accept_soon(listener, 2)
        await relay.wait_for_waiting(2)
        hand_over = listener._hand_over

        def cancel_and_hand_over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            over.cancel()
            hand_over(reader, writer)

        monkeypatch.setattr(listener, "_hand_over", cancel_and_hand_over)
        async with visiting(relay):
            _, writer = await pending
            assert over.cancelled()
            writer.close()


@run_async
async def test_close_ends_visitors_nobody_has_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relaying() as relay, listening(relay) as listener:
        await serve_one(relay, listener)
        came = asyncio.Event()
        hand_over = listener._hand_over

        def hand_over_and_tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hand_over(reader, writer)
            came.set()

        monkeypatch.setattr(listener, "_hand_over", hand_over_and_tell)
        async with visiting(relay) as visitor:
            await came.wait()
            listener.close()
            assert await visitor.read_all() == b""


@run_async
async def test_close_ends_the_visitor_of_a_call_that_was_cancelled_at_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with relaying() as relay, listening(relay) as listener:
        [call] = accept_soon(listener)
        await relay.wait_for_waiting()
        hand_over = listener._hand_over

        def hand_over_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hand_over(reader, writer)
            monkeypatch.undo()
            call.cancel()
            listener.close()

        monkeypatch.setattr(listener, "_hand_over", hand_over_and_close)
        async with visiting(relay) as visitor:
            assert await visitor.read_all() == b""
        assert call.cancelled()


# Streams


@run_on_each_loop
async def test_every_way_to_read_gives_the_visitors_bytes() -> None:
    async with accepting() as (_, visitor, reader, writer):
        await visitor.send(b"line 1\nhead|12345rest\nlast line\nno newline")
        visitor.send_eof()
        assert await reader.readline() == b"line 1\n"
        assert await reader.readuntil(b"|") == b"head|"
        assert await reader.readexactly(5) == b"12345"
        assert await reader.read(0) == b""
        assert await reader.read(4) == b"rest"
        assert [line async for line in reader] == [b"\n", b"last line\n", b"no newline"]
        assert await reader.read() == await reader.read(10) == await reader.readline() == b""
        for read in (reader.readexactly(1), reader.readuntil(b"x")):
            with pytest.raises(asyncio.IncompleteReadError):
                await read
        assert reader.at_eof()
        assert reader.exception() is None
        writer.close()
        await writer.wait_closed()


@run_on_each_loop
async def test_what_is_written_reaches_the_visitor_in_order() -> None:
    async with accepting() as (_, visitor, _, writer):
        writer.write(b"one ")
        writer.write(b"")  # on the wire this would be the end
        writer.writelines([b"two ", b"three "])
        await writer.drain()
        writer.write(bytearray(b"four"))
        writer.write_eof()
        assert await visitor.read_all() == b"one two three four"
        with pytest.raises(RuntimeError):
            writer.write(b"five")


@run_async
async def test_a_writer_knows_its_visitor() -> None:
    async with accepting() as (relay, _, reader, writer):
        visitor = relay.tunnels[0].visitor
        assert visitor is not None
        assert writer.get_extra_info("peername") == ("127.0.0.1", 0)
        assert writer.get_extra_info("connection_id") == visitor.id
        assert writer.get_extra_info("domain") == str(DOMAIN)
        assert writer.get_extra_info("nothing", "default") == "default"
        assert isinstance(reader, TunnelStreamReader)


@run_on_each_loop
async def test_the_visitors_end_leaves_us_writing() -> None:
    async with accepting() as (_, visitor, reader, writer):
        visitor.send_eof()
        assert await reader.read() == b""
        for n in range(3):
            writer.write(b"%d" % n)
            await writer.drain()
            assert await visitor.read(1) == b"%d" % n
        writer.close()
        assert await visitor.read_all() == b""


@run_on_each_loop
async def test_our_end_leaves_the_visitor_writing() -> None:
    async with accepting() as (_, visitor, reader, writer):
        writer.write_eof()
        assert await visitor.read_all() == b""
        for n in range(3):
            await visitor.send(b"%d" % n)
            assert await reader.readexactly(1) == b"%d" % n
        visitor.send_eof()
        assert await reader.read() == b""


CAME = b"first line\nsecond line\nthe rest"


async def _read_all_lines(reader: asyncio.StreamReader) -> bytes:
    return b"".join([line async for line in reader])


@pytest.mark.parametrize("fault", ["drop", "cut"])
@pytest.mark.parametrize("size", [5, len(CAME), 1000])
@run_async
async def test_read_gives_the_bytes_that_came_before_a_failure_and_then_raises(size: int, fault: str) -> None:
    async with failed_after(CAME, fault) as (reader, _):
        got = b""
        while len(got) < len(CAME):
            got += await reader.read(size)
        assert got == CAME
        assert await reader.read(0) == b""
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                await reader.read(size)


@run_async
async def test_readline_gives_the_lines_and_the_rest_that_came_before_a_drop_and_then_raises() -> None:
    async with failed_after(CAME) as (reader, _):
        assert [await reader.readline() for _ in range(3)] == CAME.splitlines(keepends=True)
        with pytest.raises(ConnectionResetError, match="the router burns"):
            await reader.readline()


@run_async
async def test_async_for_gives_the_lines_that_came_before_a_drop_and_then_raises() -> None:
    lines = []

    async def read_lines(reader: asyncio.StreamReader) -> None:
        async for line in reader:
            lines.append(line)

    async with failed_after(CAME) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await read_lines(reader)
    assert lines == CAME.splitlines(keepends=True)


@run_async
async def test_readexactly_gives_what_came_before_a_drop_and_then_raises() -> None:
    async with failed_after(CAME) as (reader, _):
        assert await reader.readexactly(6) == CAME[:6]
        with pytest.raises(asyncio.IncompleteReadError) as incomplete:
            await reader.readexactly(1000)
        assert incomplete.value.partial == CAME[6:]
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


@run_async
async def test_readuntil_gives_what_came_before_a_drop_and_then_raises() -> None:
    async with failed_after(CAME) as (reader, _):
        assert await reader.readuntil(b"line") == b"first line"
        with pytest.raises(asyncio.IncompleteReadError) as incomplete:
            await reader.readuntil(b"#")
        assert incomplete.value.partial == CAME[10:]
        with pytest.raises(ConnectionResetError):
            await reader.readuntil(b"#")


@run_async
async def test_reading_up_to_an_end_that_never_came_raises() -> None:
    async with failed_after(CAME) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()


@pytest.mark.parametrize(
    "read",
    [
        lambda reader: reader.read(),
        lambda reader: reader.read(1),
        lambda reader: reader.readline(),
        lambda reader: reader.readexactly(1),
        lambda reader: reader.readuntil(b"|"),
        _read_all_lines,
    ],
    ids=["everything", "read", "readline", "readexactly", "readuntil", "async for"],
)
@pytest.mark.parametrize("fault", ["drop", "cut"])
@run_async
async def test_a_read_that_waits_when_the_visitor_fails_raises(
    read: Callable[[asyncio.StreamReader], Awaitable[bytes]], fault: str
) -> None:
    async with accepting() as (relay, _, reader, _):
        reading = asyncio.ensure_future(read(reader))
        await settle()
        await fail(relay, fault)
        with pytest.raises(ConnectionResetError):
            await reading


@asynccontextmanager
async def failed_after(
    data: bytes, fault: str = "drop"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """The streams of a visitor of whom this came and then a failure."""
    async with accepting() as (relay, visitor, reader, writer):
        await visitor.send(data)
        while len(reader._buffer) < len(data):  # type: ignore[attr-defined]
            await reader._wait_for_data("read")  # type: ignore[attr-defined]
        await fail(relay, fault)
        with pytest.raises(ConnectionResetError):
            await writer.wait_closed()
        yield reader, writer


async def fail(relay: Relay, fault: str) -> None:
    if fault == "drop":
        await relay.tunnels[0].drop("the router burns")
    else:
        relay.tunnels[0].cut()


@run_async
async def test_everything_that_came_before_a_drop_is_read_by_a_reader_who_was_far_behind() -> None:
    sent = [random.randbytes(140 * KIBIBYTE), random.randbytes(30 * KIBIBYTE), b"the end"]
    async with accepting() as (relay, _, reader, writer):
        for data in sent:
            await relay.tunnels[0].send_raw(data)
        await relay.tunnels[0].drop("the router burns")
        for data in sent:
            assert await reader.readexactly(len(data)) == data
        with pytest.raises(ConnectionResetError, match="the router burns"):
            await reader.read(1)
        with pytest.raises(ConnectionResetError):
            await writer.drain()


@run_async
async def test_drain_raises_after_a_failure() -> None:
    async with failed_after(b"") as (_, writer):
        writer.write(b"x")
        for _ in range(2):
            with pytest.raises(ConnectionResetError, match="the router burns"):
                await writer.drain()


@pytest.mark.parametrize("fault", ["drop", "cut"])
@run_async
async def test_a_drain_that_waits_when_the_visitor_fails_raises(fault: str) -> None:
    async with accepting() as (relay, visitor, _, writer):
        visitor.pause()
        draining = asyncio.create_task(write_until_stalled(writer, 64 * MEBIBYTE))
        await asyncio.wait([draining], timeout=STALLED)
        await fail(relay, fault)
        with pytest.raises(ConnectionResetError):
            await draining


@run_async
async def test_an_end_that_came_before_the_failure_stays_an_end() -> None:
    async with accepting() as (relay, visitor, reader, writer):
        await visitor.send(b"all of it")
        visitor.send_eof()
        assert await reader.readexactly(9) == b"all of it"
        assert await reader.read() == b""
        await relay.tunnels[0].drop("the router burns")
        with pytest.raises(ConnectionResetError):
            await writer.wait_closed()
        assert await reader.read() == b""
        with pytest.raises(ConnectionResetError):
            await writer.drain()


# Back-pressure


async def write_until_stalled(writer: asyncio.StreamWriter, most: int) -> int:
    """Write at most this many bytes, as fast as they are taken; how many were."""
    chunk = bytes(64 * KIBIBYTE)
    taken = 0
    while taken < most:
        writer.write(chunk)
        try:
            async with asyncio.timeout(STALLED):
                await writer.drain()
        except TimeoutError:
            break
        taken += len(chunk)
    return taken


@run_on_each_loop
async def test_a_visitor_who_does_not_read_stops_our_drain() -> None:
    async with accepting() as (_, visitor, _, writer):
        visitor.pause()
        taken = await write_until_stalled(writer, 64 * MEBIBYTE)
        assert taken < 32 * MEBIBYTE  # the kernel's buffers take a few
        assert writer.transport.get_write_buffer_size() < 256 * KIBIBYTE
        visitor.resume()
        writer.write_eof()
        got = await visitor.read_all()
        assert len(got) == taken + 64 * KIBIBYTE
        assert not any(got)


@run_on_each_loop
async def test_a_reader_who_does_not_read_stops_the_visitor() -> None:
    async with accepting() as (_, visitor, reader, writer):
        taken = await write_until_stalled(visitor.writer, 64 * MEBIBYTE)
        assert taken < 32 * MEBIBYTE
        assert len(reader._buffer) < 256 * KIBIBYTE  # type: ignore[attr-defined]
        visitor.send_eof()
        got = await reader.read()
        assert len(got) == taken + 64 * KIBIBYTE
        writer.close()


@run_async
async def test_a_short_limit_bounds_lines_and_the_readers_memory() -> None:
    async with accepting(limit=100) as (_, visitor, reader, _):
        await visitor.send(b"x" * 1000 + b"\n")
        with pytest.raises(ValueError, match="limit"):
            await reader.readline()


# create_tunnel_server and start_tunnel_server


@asynccontextmanager
async def serving_with(opening: Awaitable[TunnelPool]) -> AsyncIterator[TunnelPool]:
    pool = await opening
    try:
        yield pool
    finally:
        await pool.aclose()


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def eof_received(self) -> bool:
        self.transport.write_eof()
        return True


@run_on_each_loop
async def test_any_asyncio_protocol_is_served() -> None:
    async with relaying() as relay, serving_with(create_tunnel_server(Echo, make_config(relay))) as pool:
        assert isinstance(pool, asyncio.AbstractServer)
        assert pool.is_serving()
        data = random.randbytes(MEBIBYTE)
        for _ in range(3):
            async with visiting(relay) as visitor:
                sending = asyncio.create_task(visitor.send(data))
                assert await visitor.read(len(data)) == data
                await sending
                visitor.send_eof()
                assert await visitor.read_all() == b""


@run_async
async def test_standby_says_how_many_websockets_wait() -> None:
    async with relaying() as relay:
        opening = create_tunnel_server(Echo, make_config(relay), standby=lambda visitors: 2 + visitors)
        async with serving_with(opening):
            await relay.wait_for_waiting(2)
            async with visiting(relay):
                await relay.wait_for_waiting(3)


@run_async
async def test_a_server_is_left_by_async_with_and_by_serve_forever() -> None:
    async with relaying() as relay:
        async with await create_tunnel_server(Echo, make_config(relay)) as server:
            assert server.is_serving()
        assert not server.is_serving()
        other = await create_tunnel_server(Echo, make_config(relay))
        forever = asyncio.create_task(other.serve_forever())
        await settle()
        await cancel(forever)
        await relay.wait_until(lambda relay: not relay.tunnels)


@run_async
async def test_a_server_that_can_never_work_does_not_start() -> None:
    async with relaying() as relay:
        with pytest.raises(AuthenticationFailed):
            await create_tunnel_server(Echo, make_config(relay, key="wrong"))
        assert relay.tunnels == []


@run_async
async def test_a_start_that_is_cancelled_leaves_nothing_behind() -> None:
    async with relaying() as relay:
        relay.hang()
        opening = asyncio.create_task(create_tunnel_server(Echo, make_config(relay)))
        await relay.wait_until(lambda relay: relay.dials == 4)
        await cancel(opening)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    name = await reader.readline()
    writer.write(b"hello " + name)
    await writer.drain()
    writer.close()


@run_on_each_loop
async def test_start_tunnel_server_calls_a_coroutine_for_each_visitor() -> None:
    async with relaying() as relay, serving_with(start_tunnel_server(greet, make_config(relay))):
        for name in (b"ann\n", b"bob\n"):
            async with visiting(relay) as visitor:
                await visitor.send(name)
                assert await visitor.read_all() == b"hello " + name


@run_async
async def test_start_tunnel_server_calls_a_plain_function_for_each_visitor() -> None:
    visitors: asyncio.Queue[Streams] = asyncio.Queue()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.put_nowait((reader, writer))

    async with (
        relaying() as relay,
        serving_with(start_tunnel_server(take, make_config(relay), limit=10)),
        visiting(relay) as visitor,
    ):
        await visitor.send(b"a line of more than ten bytes\n")
        reader, writer = await visitors.get()
        with pytest.raises(ValueError, match="limit"):
            await reader.readline()
        writer.close()
        assert await visitor.read_all() == b""


@run_async
async def test_a_callback_that_fails_ends_its_visitor_and_no_other() -> None:
    reports = watch_unhandled()

    async def fail_or_greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1) == b"!":
            raise RuntimeError("of the callback")
        await greet(reader, writer)

    async with (
        relaying() as relay,
        serving_with(start_tunnel_server(fail_or_greet, make_config(relay))),
        visiting(relay) as bad,
        visiting(relay) as good,
    ):
        await bad.send(b"!")
        assert await bad.read_all() == b""
        await good.send(b"?ann\n")
        assert await good.read_all() == b"hello ann\n"
    assert [str(report["exception"]) for report in reports] == ["of the callback"]


@run_on_each_loop
async def test_aiohttp_is_served_without_a_port() -> None:
    async def upload(request: web.Request) -> web.Response:
        digest = hashlib.sha256(await request.read()).hexdigest()
        return web.json_response({"remote": request.remote, "sha256": digest})

    async def echo(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(f"echo {message.data}")
        return ws

    app = web.Application(client_max_size=16 * MEBIBYTE)
    app.add_routes([web.post("/upload", upload), web.get("/echo", echo)])
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    body = random.randbytes(3 * MEBIBYTE)
    async with relaying() as relay, serving_with(create_tunnel_server(runner.server, make_config(relay))):
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{relay.url}/upload", data=io.BytesIO(body)) as response:
                assert await response.json() == {"remote": "127.0.0.1", "sha256": hashlib.sha256(body).hexdigest()}
            async with session.ws_connect(f"{relay.url}/echo") as ws:
                await ws.send_str("ping")
                assert (await ws.receive()).data == "echo ping"
        await runner.cleanup()


class SSHTunnel:
    """What ``asyncssh.listen(tunnel=...)`` asks of a tunnel, on top of ``create_tunnel_server``."""

    def __init__(self, relay: Relay) -> None:
        self._config = make_config(relay)

    async def create_server(self, session_factory: Callable[[str, int], Any], host: str, port: int) -> TunnelPool:
        return await create_tunnel_server(lambda: session_factory("", 0), self._config)

    def close(self) -> None: ...

    async def wait_closed(self) -> None: ...


class AnyUser(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


@run_async
async def test_an_ssh_session_runs_a_command_and_copies_megabytes_without_a_port() -> None:
    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        if process.command == "whoami":
            process.stdout.write(process.get_extra_info("username").encode())
        else:
            process.stdout.write(await process.stdin.read())
        process.exit(0)

    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    key = asyncssh.generate_private_key("ssh-ed25519")
    data = random.randbytes(4 * MEBIBYTE)
    async with relaying() as relay:
        server = await asyncssh.listen(
            tunnel=SSHTunnel(relay),
            server_factory=AnyUser,
            server_host_keys=[key],
            process_factory=handle,
            encoding=None,
        )
        async with asyncssh.connect("127.0.0.1", relay.port, username="ann", known_hosts=None, config=None) as ssh:
            assert (await ssh.run("whoami", check=True)).stdout == "ann"
            assert (await ssh.run("copy", input=data, encoding=None, check=True)).stdout == data
        server.close()
        await server.wait_closed()
        await relay.wait_until(lambda relay: not relay.tunnels)
