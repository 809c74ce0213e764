from __future__ import annotations

import asyncio
import email.utils
import itertools
import logging
import re
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ProxyError
from websockets.frames import Close, Frame, Opcode

from tests.fakes import (
    QUIET,
    FakeOwner,
    Line,
    Recorder,
    VirtualTimeLoop,
    make_config,
    run_on_each_loop,
    run_virtual,
    settle,
    unused_port,
    virtual_loop,
    watch_unhandled,
)
from tests.support import DOMAIN, KEYS, SECRET, make_tls_contexts, run_async, visiting
from tunnel_asgi import connection as connection_module
from tunnel_asgi.auth import JwtManager
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.connection import CLOSE_TIMEOUT, LAST_BYTES, WRITE_LIMIT, TunnelConnection, dial
from tunnel_asgi.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    NoCredits,
    ProtocolError,
    ServerError,
    TunnelError,
    UpgradeRefused,
    WebSocketError,
)
from tunnel_asgi.protocol import MAX_TEXT
from tunnel_asgi.relay import Relay
from tunnel_asgi.transport import HELD_LIMIT, SLICE

CONNECT = "CONNECT: 203.0.113.7, 7f3a"
EOF = b""


def binary(data: bytes, *, fin: bool = True) -> Frame:
    return Frame(Opcode.BINARY, data, fin)


def text(data: bytes, *, fin: bool = True) -> Frame:
    return Frame(Opcode.TEXT, data, fin)


def more(data: bytes, *, fin: bool = False) -> Frame:
    return Frame(Opcode.CONT, data, fin)


# Frames in, events out


@run_async
async def test_a_visitor_is_served_from_connect_to_reset() -> None:
    line = await Line.open()
    assert line.owner.log == ["ready"]
    assert line.state() == "waiting"
    line.send(CONNECT)
    assert line.state() == "open"
    assert line.owner.visitors[0].ip == "203.0.113.7"
    assert line.connection.connection_id == "7f3a"
    line.send(b"question")
    line.visitor().transport.write(b"answer")
    await asyncio.sleep(0)
    line.send(EOF)
    assert line.visitor().events == ["made", b"question", "eof"]
    assert line.received() == [b"answer", EOF, "RESET"]
    assert line.state() == "waiting"
    assert "id=None" in repr(line.connection)
    assert line.owner.log == ["ready", "visitor", "recycled"]
    await line.close()


@run_async
async def test_visitor_bytes_in_the_same_segment_as_the_upgrade_are_not_lost() -> None:
    line = Line()
    assert line.state() == "dialling"
    handshake = asyncio.ensure_future(line.connection.handshake())
    await asyncio.sleep(0)
    line.answer_upgrade(text(CONNECT.encode()), binary(b"early"), binary(EOF))
    await handshake
    assert line.visitor().events[:3] == ["made", b"early", "eof"]
    await line.close()


@run_async
async def test_bytes_may_arrive_one_at_a_time() -> None:
    line = await Line.open()
    for message in (CONNECT, b"question", EOF):
        line.server.send_text(message.encode()) if isinstance(message, str) else line.server.send_binary(message)
        for byte in b"".join(line.server.data_to_send()):
            line.deliver(bytes([byte]))
    assert line.visitor().events == ["made", b"question", "eof"]
    await line.close()


@pytest.mark.parametrize(
    ("frames", "events"),
    [
        ([binary(b"ab", fin=False)], [b"ab"]),
        ([binary(b"ab", fin=False), more(b"cd"), more(b"ef", fin=True)], [b"abcdef"]),
        ([binary(b"", fin=False), more(b"ab", fin=True)], [b"ab"]),
        ([binary(b"ab", fin=False), more(b"", fin=True)], [b"ab"]),
        ([binary(b"ab", fin=False), more(b""), more(b""), more(b"cd", fin=True)], [b"abcd"]),
        ([binary(b"", fin=False), more(b""), more(b"", fin=True)], ["eof"]),
        ([binary(b"", fin=True)], ["eof"]),
        ([binary(b"", fin=False), more(b"")], []),
        ([binary(b"ab", fin=False), more(b"", fin=True), binary(b"")], [b"ab", "eof"]),
        ([binary(b"", fin=False), Frame(Opcode.PING, b"x"), more(b"", fin=True)], ["eof"]),
        ([binary(b"ab"), text(b"DR", fin=False), more(b"OP: it left", fin=True)], [b"ab", "reset"]),
        ([text(b"", fin=False), more(b"DROP: it left"), more(b"", fin=True)], ["reset"]),
        ([text(b"UNK", fin=False), more(b"NOWN", fin=True), binary(b"ab")], [b"ab"]),
        ([text(b""), binary(b"ab")], [b"ab"]),
        ([text(b"\xff\xfe"), binary(b"ab")], [b"ab"]),
        ([Frame(Opcode.PONG, b"unasked"), binary(b"ab")], [b"ab"]),
    ],
)
@run_async
async def test_fragments_change_nothing(frames: list[Frame], events: list[Any]) -> None:
    line = await Line.open()
    line.send(CONNECT, *frames)
    await settle()
    seen = ["reset" if isinstance(event, ConnectionResetError) else event for event in line.visitor().events]
    assert seen[1:] in (events, [*events, "lost"])
    assert line.owner.error is None
    await line.close()


@run_async
async def test_each_fragment_is_passed_on_as_it_comes() -> None:
    line = await Line.open()
    line.send(CONNECT, binary(b"ab", fin=False))
    assert line.visitor().data == b"ab"
    line.send(more(b"cd"))
    assert line.visitor().data == b"abcd"
    await line.close()


@run_async
async def test_a_message_may_be_larger_than_the_limit_if_its_fragments_are_not() -> None:
    line = await Line.open(max_message_size=1000)
    line.send(CONNECT, binary(b"x" * 1000, fin=False), *[more(b"x" * 1000) for _ in range(9)], more(b"", fin=True))
    assert len(line.visitor().data) == 10_000
    await line.close()


@run_async
async def test_a_frame_that_is_too_large_closes_with_1009() -> None:
    line = await Line.open(max_message_size=1000)
    line.send(CONNECT, binary(b"x" * 1001))
    [close] = line.received()
    assert close.code == 1009
    assert isinstance(line.owner.error, ProtocolError)
    await settle()
    assert isinstance(line.visitor().events[-1], ConnectionResetError)
    await line.close()


@pytest.mark.parametrize("fragments", [1, 2, 9])
@run_async
async def test_a_text_message_that_is_too_long_closes_with_1002_before_it_is_complete(fragments: int) -> None:
    line = await Line.open()
    line.send(text(b"x" * MAX_TEXT, fin=False), *[more(b"") for _ in range(fragments)])
    assert line.received() == []
    line.send(more(b"x"))
    [close] = line.received()
    assert close == Close(1002, f"received a text message of more than {MAX_TEXT} bytes")
    assert isinstance(line.owner.error, ProtocolError)
    await line.close()


STATES: dict[str, list[Any]] = {
    "waiting": [],
    "open": [CONNECT, b"x"],
    "visitor done": [CONNECT, EOF],
    "dropped": [CONNECT, "DROP: it left"],
    "we are done": [CONNECT, "our EOF"],
    "recycled": [CONNECT, EOF, "our EOF"],
}
ILLEGAL: list[tuple[str, Any, str]] = [
    ("waiting", b"x", "received data while the direction is idle"),
    ("waiting", EOF, "received EOF while the direction is idle"),
    ("open", "CONNECT: 203.0.113.8", "received CONNECT while the direction is open"),
    ("visitor done", b"x", "received data while the direction is done"),
    ("visitor done", EOF, "received EOF while the direction is done"),
    ("visitor done", "CONNECT: 203.0.113.8", "received CONNECT while the direction is done"),
    ("we are done", "CONNECT: 203.0.113.8", "received CONNECT while the direction is open"),
    ("recycled", b"late", "received data while the direction is idle"),
    ("recycled", EOF, "received EOF while the direction is idle"),
]
# Without a mask, as servers send them; the last one is the answer to another question altogether.
ILLEGAL_BYTES = {
    "continuation of nothing": b"\x80\x01x",
    "reserved bit": b"\xc2\x01x",
    "reserved opcode": b"\x83\x01x",
    "masked": b"\x82\x81\x00\x00\x00\x00x",
    "fragmented ping": b"\x09\x01x",
    "ping too long": b"\x89\x7e\x00\x7e" + b"x" * 126,
    "message within a message": b"\x01\x01x\x81\x01x",
    "close within a message": b"\x01\x01x\x88\x00",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
}


async def line_in(state: str) -> Line:
    line = await Line.open()
    line.owner.protocols.append(Recorder(half_close=True))
    for step in STATES[state]:
        if step == "our EOF":
            line.visitor(0).transport.close()
        else:
            line.send(step)
    line.received()
    return line


async def expect_breach(line: Line, reason: str) -> None:
    [close] = line.received()
    assert close.code == 1002
    assert reason in close.reason
    assert isinstance(line.owner.error, ProtocolError)
    assert reason in str(line.owner.error)
    assert line.state() == "closed"
    await settle()
    for transport in line.owner.transports:
        assert transport.is_closing()
    await line.close()


@pytest.mark.parametrize(("state", "message", "reason"), ILLEGAL)
@run_async
async def test_every_illegal_message_closes_with_1002_and_says_why(state: str, message: Any, reason: str) -> None:
    line = await line_in(state)
    line.send(message, b"and", "more", EOF)
    await expect_breach(line, reason)


@pytest.mark.parametrize("garbage", ILLEGAL_BYTES)
@pytest.mark.parametrize("state", STATES)
@run_async
async def test_every_breach_of_rfc_6455_closes_with_1002_in_every_state(state: str, garbage: str) -> None:
    line = await line_in(state)
    line.deliver(ILLEGAL_BYTES[garbage] + b"and more")
    await expect_breach(line, "")


@pytest.mark.parametrize("state", STATES)
@run_async
async def test_text_that_means_nothing_here_is_ignored_in_every_state(state: str) -> None:
    line = await line_in(state)
    before = line.state()
    line.send("RDSD", "RESET", "HELLO: world", "", "DROP", "connect: 203.0.113.8")
    assert line.received() == []
    assert line.state() == before
    await line.close()


@run_async
async def test_a_dropped_visitor_leaves_a_websocket_that_is_good() -> None:
    line = await Line.open()
    line.send(CONNECT, "DROP: it left")
    assert line.received() == [EOF, "RESET"]
    line.send("DROP: it left, again", CONNECT)
    assert line.state() == "open"
    await line.close()


@run_async
async def test_a_drop_while_the_visitors_end_is_awaited_recycles() -> None:
    line = await Line.open()
    line.send(CONNECT)
    line.visitor().transport.close()
    assert line.received() == [EOF]
    assert line.state() == "draining"
    line.send("DROP: it left")
    assert line.received() == ["RESET"]
    await line.close()


FRAMES = st.one_of(
    st.sampled_from(
        [
            text(CONNECT.encode()),
            text(b"DROP: it left"),
            text(b"RESET"),
            binary(EOF),
            binary(b"", fin=False),
            more(b""),
            more(b"", fin=True),
            Frame(Opcode.PING, b"x"),
            Frame(Opcode.CLOSE, Close(1000, "").serialize()),
        ]
    ),
    st.builds(binary, st.binary(max_size=50), fin=st.booleans()),
    st.builds(text, st.binary(max_size=50), fin=st.booleans()),
    st.builds(more, st.binary(max_size=50), fin=st.booleans()),
).map(lambda frame: bytes(frame.serialize(mask=False)))


@settings(deadline=None)
@given(
    pieces=st.lists(FRAMES | st.binary(max_size=10), max_size=30),
    cuts=st.lists(st.integers(1, 60), min_size=1),
    closes=st.booleans(),
)
def test_nothing_a_server_can_send_raises_or_outlives_the_websocket(
    pieces: list[bytes], cuts: list[int], closes: bool
) -> None:
    @run_async
    async def test() -> None:
        line = await Line.open(drain_limit=60, max_message_size=40)
        line.owner.make_protocol = lambda: Recorder(half_close=not closes)
        data = b"".join(pieces)
        cut = itertools.cycle(cuts)
        while data and line.state() != "closed":
            size = next(cut)
            line.deliver(data[:size])
            data = data[size:]
            await asyncio.sleep(0)
            if closes and line.connection.visitor is not None:
                line.connection.visitor.close()
        if line.state() == "closed":
            before = [recorder.data for recorder in recorders(line)]
            line.deliver(b"".join(pieces))
            assert [recorder.data for recorder in recorders(line)] == before
        await line.close()
        log = line.owner.log
        assert log[0] == "ready"
        assert log[-2:] == ["ending", "lost"]
        assert all(kind in ("visitor", "recycled") for kind in log[1:-2])
        assert log.count("recycled") <= log.count("visitor") <= log.count("recycled") + 1
        for recorder in recorders(line):
            assert recorder.lost.is_set()

    test()


def recorders(line: Line) -> list[Recorder]:
    return [protocol for protocol in line.owner.protocols if isinstance(protocol, Recorder)]


# The end of the WebSocket


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012, 4001])
@pytest.mark.parametrize("state", STATES)
@run_async
async def test_a_close_by_the_server_is_answered_and_reported(state: str, code: int) -> None:
    line = await line_in(state)
    line.send(Frame(Opcode.CLOSE, Close(code, "bye").serialize()))
    assert line.received() == [Close(code, "bye")]
    assert type(line.owner.error) is WebSocketError
    assert str(code) in str(line.owner.error)
    assert "bye" in str(line.owner.error)
    await line.close()


@run_async
async def test_a_close_without_a_code_or_with_a_silly_one_is_survived() -> None:
    line = await Line.open()
    line.send(Frame(Opcode.CLOSE, b""))
    assert "closed by the server" in str(line.owner.error)
    await line.close()
    line = await Line.open()
    line.send(Frame(Opcode.CLOSE, b"\x00"))
    assert isinstance(line.owner.error, ProtocolError)
    await line.close()


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (b"going\r\nINFO: a forged line\x1b[2J", "goingINFO: a forged line[2J"),
        (b"x" * 120, "x" * 40),
        (b"no eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJjdXN0b21lciJ9.c2ln for you", "no *** for you"),
    ],
)
@run_async
async def test_the_reason_of_a_close_is_one_short_line_without_a_token(reason: bytes, shown: str) -> None:
    line = await Line.open()
    line.send(Frame(Opcode.CLOSE, Close(1008, "").serialize() + reason))
    error = str(line.owner.error)
    assert shown in error
    assert error.isprintable()
    assert len(error) < 100
    assert "eyJ" not in error
    await line.close()


@run_async
async def test_a_visitor_without_an_id_gets_one_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tunnel_asgi")
    line = await Line.open()
    for _ in range(2):
        line.send("CONNECT: 203.0.113.7", EOF)
    await settle()
    labels = [record.getMessage().partition(" ")[0] for record in caplog.records if "connected" in record.getMessage()]
    assert all(re.fullmatch(r"\[#\d+\]", label) for label in labels)
    assert len(set(labels)) == 2
    assert line.owner.visitors[0].connection_id is None, "what the server did not say is not made up for the app"
    await line.close()


@pytest.mark.parametrize("end", [EOF, "DROP: it left"])
@run_async
async def test_a_visitors_end_and_a_close_in_one_segment_recycle_nothing(end: Any) -> None:
    line = await Line.open()
    line.send(CONNECT)
    line.send(end, Frame(Opcode.CLOSE, Close(1001, "bye").serialize()))
    assert "RESET" not in line.received()
    assert line.owner.log == ["ready", "visitor", "ending"]
    await line.close()


@run_async
async def test_what_an_app_writes_into_a_closing_websocket_is_lost_without_an_error() -> None:
    line = await Line.open()
    line.owner.protocols.append(Recorder(data=lambda data: line.visitor().transport.write(b"x" * SLICE)))
    line.send(CONNECT, b"question", Frame(Opcode.CLOSE, Close(1001, "bye").serialize()))
    assert line.received() == [Close(1001, "bye")]
    await settle()
    assert isinstance(line.visitor().events[-1], ConnectionResetError)
    await line.close()


@pytest.mark.parametrize("state", STATES)
@run_async
async def test_a_cut_resets_the_visitor_and_no_other(state: str) -> None:
    line = await line_in(state)
    had_visitor = line.connection.visitor is not None
    line.connection.connection_lost(ConnectionResetError("cut"))
    await settle()
    assert str(line.owner.error) == "connection lost: cut"
    assert line.owner.log[-2:] == ["ending", "lost"]
    if had_visitor:
        assert isinstance(line.visitor().events[-1], ConnectionResetError)
    line.socket.closed = True


@pytest.mark.parametrize("state", STATES)
@run_async
async def test_the_end_of_the_tcp_stream_is_a_cut(state: str) -> None:
    line = await line_in(state)
    line.connection.eof_received()
    assert line.owner.log[-1] == "ending"
    assert str(line.owner.error) == "connection lost: end of stream"
    for transport in line.owner.transports:
        transport.write(b"late")
        transport.close()
    await settle()
    assert line.received() == []
    assert line.socket.closed
    assert line.owner.log[-2:] == ["ending", "lost"]


@run_async
async def test_a_cut_in_the_middle_of_a_frame_is_a_cut() -> None:
    line = await Line.open()
    line.send(CONNECT)
    line.server.send_binary(b"half a frame")
    line.deliver(b"".join(line.server.data_to_send())[:-3])
    line.connection.eof_received()
    await settle()
    assert line.visitor().data == b""
    assert isinstance(line.visitor().events[-1], ConnectionResetError)


@pytest.mark.parametrize("size", [1, 65536])
@run_async
async def test_a_flood_after_the_end_is_not_read_to_its_end(size: int) -> None:
    line = await Line.open()
    line.connection.close(1000)
    flood = b"\x82\x7f" + (2**32).to_bytes(8) + b"x" * size  # a frame that goes on for ever
    for _ in range(LAST_BYTES // len(flood)):
        line.deliver(flood)
    cut = [line.socket.aborted]  # the server's close frame may still come
    line.deliver(flood)
    assert [*cut, line.socket.aborted] == [False, True]
    assert line.owner.error is None
    await line.close()


@run_virtual
async def test_a_server_that_does_not_answer_our_close_is_cut_off() -> None:
    line = await Line.open()
    start = virtual_loop().time()
    line.connection.close(1000, "done")
    assert line.received() == [Close(1000, "done")]
    assert line.owner.log == ["ready", "ending"]
    assert line.owner.error is None
    line.connection.close(1001)
    assert line.received() == []
    closed = asyncio.Event()
    line.owner.on["lost"] = closed.set
    await closed.wait()
    assert line.socket.aborted
    assert virtual_loop().time() - start == pytest.approx(CLOSE_TIMEOUT)


@run_async
async def test_closing_while_reading_is_paused_reads_on_for_the_servers_answer() -> None:
    line = await Line.open()
    line.send(CONNECT)
    line.visitor().transport.pause_reading()
    line.send(b"x" * (HELD_LIMIT + 1))
    assert not line.reading()
    line.connection.close(1001)
    assert line.reading()
    line.send(b"late", EOF, CONNECT)
    await settle()
    assert line.visitor().data == b""
    assert len(line.owner.visitors) == 1
    await line.close()


@run_async
async def test_an_owner_may_close_a_connection_that_has_just_come_or_come_back() -> None:
    for event in ("ready", "recycled"):
        line = Line()
        line.owner.on[event] = line.connection.close
        handshake = asyncio.ensure_future(line.connection.handshake())
        await asyncio.sleep(0)
        line.answer_upgrade(text(CONNECT.encode()), binary(EOF))
        await handshake
        await settle()
        assert line.owner.log.count("ending") == 1
        assert line.owner.error is None
        assert line.state() == "closed"
        for recorder in line.owner.protocols:
            assert isinstance(recorder, Recorder)
            assert recorder.lost.is_set()
        await line.close()


@run_async
async def test_an_answer_that_is_no_upgrade_is_none_of_the_owners_business() -> None:
    for answer in (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b"\x00" * 9000 + b"\n"):
        line = Line()
        handshake = asyncio.ensure_future(line.connection.handshake())
        await asyncio.sleep(0)
        line.deliver(answer)
        await asyncio.wait([handshake])
        assert handshake.exception() is not None
        assert line.owner.log == []
        assert line.socket.closed


@run_async
async def test_repr_shows_the_state_and_no_data() -> None:
    line = Line()
    assert repr(line.connection) == "<TunnelConnection dialling id=None>"
    line = await Line.open()
    line.send(CONNECT, b"sesame")
    assert repr(line.connection) == "<TunnelConnection open id=7f3a>"
    line.connection.close()
    assert repr(line.connection) == "<TunnelConnection closed id=7f3a>"
    await line.close()


# Between two visitors


@run_virtual
async def test_a_visitor_that_does_not_end_is_waited_for_so_long_and_no_longer() -> None:
    line = await Line.open(drain_timeout=7)
    line.send(CONNECT)
    start = virtual_loop().time()
    line.visitor().transport.close()
    await asyncio.sleep(6.9)
    assert line.received() == [EOF]
    ending = asyncio.Event()
    line.owner.on["ending"] = ending.set
    await ending.wait()
    assert virtual_loop().time() - start == pytest.approx(7)
    assert line.received() == [Close(1000, "the visitor did not end its direction")]
    assert line.owner.error is None
    await line.close()


@run_virtual
async def test_the_drain_timer_of_one_visitor_does_not_hit_the_next() -> None:
    line = await Line.open(drain_timeout=7, ping_interval=1000)
    line.send(CONNECT)
    line.visitor().transport.close()
    await asyncio.sleep(5)
    line.send(EOF, CONNECT)
    await asyncio.sleep(60)
    assert line.state() == "open"
    line.visitor().transport.close()
    await asyncio.sleep(6.9)
    assert line.state() == "draining"
    await line.close()


@run_async
async def test_a_visitor_that_goes_on_sending_is_discarded_up_to_the_limit() -> None:
    line = await Line.open(drain_limit=100)
    for _ in range(2):  # each visitor has a limit of its own
        line.send(CONNECT)
        line.visitor().transport.close()
        line.send(b"x" * 60, b"x" * 40, EOF)
        assert line.received() == [EOF, "RESET"]
    line.send(CONNECT)
    line.visitor().transport.close()
    line.send(b"x" * 60, b"x" * 41, b"more", EOF)
    assert line.received() == [EOF, Close(1000, "the visitor kept sending after the end")]
    assert line.visitor().data == b""
    await line.close()


@run_async
async def test_too_much_to_discard_and_a_close_in_one_segment_are_no_error() -> None:
    line = await Line.open(drain_limit=100)
    line.send(CONNECT)
    line.visitor().transport.close()
    line.received()
    line.send(b"x" * 101, Frame(Opcode.CLOSE, Close(1001, "bye").serialize()))
    assert line.received() == [Close(1001, "bye")]
    assert line.owner.log == ["ready", "visitor", "ending"]
    await line.close()


@run_async
async def test_nothing_is_drained_or_recycled_when_the_owner_wants_no_more_visitors() -> None:
    line = await Line.open()
    line.send(CONNECT)
    line.owner.accepting = False
    line.visitor().transport.write(b"answer")
    line.visitor().transport.close()
    assert line.received() == [b"answer", EOF, Close(1000, "")]
    await line.close()

    line = await Line.open()
    line.owner.protocols.append(Recorder(half_close=True))
    line.send(CONNECT, EOF)
    line.owner.accepting = False
    line.visitor().transport.close()
    assert line.received() == [EOF, Close(1000, "")]
    await line.close()


# Keep-alive and back-pressure


@run_virtual
async def test_a_silent_server_is_pinged_and_then_given_up() -> None:
    line = await Line.open(ping_interval=20, ping_timeout=15)
    line.send(CONNECT)
    start = virtual_loop().time()
    await asyncio.sleep(19.9)
    assert line.received() == []
    await asyncio.sleep(0.2)
    assert line.received() == [Opcode.PING]
    await line.visitor().lost.wait()
    assert virtual_loop().time() - start == pytest.approx(35)
    assert str(line.owner.error) == "the tunnel server was silent for 35 s"
    assert line.socket.aborted


@pytest.mark.parametrize(("interval", "timeout"), [(20, 20), (1, 20), (20, 1)])
@run_virtual
async def test_a_server_that_answers_pings_is_alive_for_ever(interval: float, timeout: float) -> None:
    line = await Line.open(ping_interval=interval, ping_timeout=timeout)
    pings = 0
    for _ in range(1000):
        await asyncio.sleep(0.5)
        if Opcode.PING in line.received():  # the fake server has queued its pong
            pings += 1
            line.send()
    assert pings > 10
    assert line.state() == "waiting"
    await line.close()


@run_virtual
async def test_any_byte_is_a_sign_of_life() -> None:
    line = await Line.open(ping_interval=20, ping_timeout=20)
    line.send(CONNECT)
    for _ in range(100):
        await asyncio.sleep(19)
        line.send(b"x")
    assert line.received() == []
    await asyncio.sleep(21)
    assert line.received() == [Opcode.PING]
    await asyncio.sleep(18)
    line.send(b"x")
    await asyncio.sleep(19)
    assert line.state() == "open"
    await line.close()


@run_virtual
async def test_our_own_back_pressure_is_not_mistaken_for_a_dead_server() -> None:
    line = await Line.open(ping_interval=20, ping_timeout=20)
    line.send(CONNECT)
    line.visitor().transport.pause_reading()
    line.send(b"x" * (HELD_LIMIT + 1))
    assert not line.reading()
    await asyncio.sleep(3600)
    assert line.state() == "open"
    assert line.received() == []
    line.visitor().transport.resume_reading()
    await asyncio.sleep(19)
    assert line.reading()
    assert line.state() == "open"
    await line.close()


@run_virtual
async def test_a_pong_that_lay_unread_while_we_paused_counts() -> None:
    line = await Line.open(ping_interval=20, ping_timeout=20)
    line.send(CONNECT)
    await asyncio.sleep(20.5)
    assert line.received() == [Opcode.PING]
    line.visitor().transport.pause_reading()
    line.connection.pause_reading()  # as after HELD_LIMIT bytes; the pong is behind them
    await asyncio.sleep(19)
    line.connection.resume_reading()
    await asyncio.sleep(1)  # the deadline of the ping passes before the pong is read
    assert line.state() == "open"
    await line.visitor().lost.wait()
    assert "silent" in str(line.owner.error)


@run_virtual
async def test_a_ping_that_was_answered_while_we_were_stuck_ourselves_is_sent_again() -> None:
    line = await Line.open(ping_interval=20, ping_timeout=20)
    await asyncio.sleep(20.5)
    assert line.received() == [Opcode.PING]
    virtual_loop().advance(3600)  # the machine sleeps, or the app blocks the loop
    await asyncio.sleep(0.5)
    assert line.received() == [Opcode.PING]
    line.send()  # its pong
    await asyncio.sleep(21)
    assert line.state() == "waiting"
    await asyncio.sleep(60)
    assert line.state() == "closed"


@run_async
async def test_a_ping_is_answered() -> None:
    line = await Line.open()
    line.send(Frame(Opcode.PING, b"hello"))
    assert line.received() == [Opcode.PONG]
    await line.close()


@run_async
async def test_a_flood_of_pings_by_a_server_that_reads_no_pongs_ends_the_websocket() -> None:
    line = await Line.open()
    line.pause()
    line.send(Frame(Opcode.PING, b"x"))
    assert line.state() == "waiting"
    line.socket.buffer_size = WRITE_LIMIT + 1
    line.send(Frame(Opcode.PING, b"x"))
    assert line.socket.aborted
    assert "pings" in str(line.owner.error)
    await line.close()


@run_virtual
async def test_a_send_without_progress_ends_the_websocket() -> None:
    line = await Line.open(write_timeout=10, ping_interval=1000)
    line.send(CONNECT)
    line.pause(buffered=1000)
    start = virtual_loop().time()
    for buffered in (900, 800, 700):
        await asyncio.sleep(9)
        line.socket.buffer_size = buffered
        await asyncio.sleep(1)
    assert line.state() == "open"
    await line.visitor().lost.wait()
    assert virtual_loop().time() - start == pytest.approx(40)
    assert str(line.owner.error) == "a send made no progress for 10 s"
    assert line.socket.aborted


@run_virtual
async def test_a_socket_that_takes_bytes_again_is_not_watched_any_more() -> None:
    line = await Line.open(write_timeout=10, ping_interval=1000)
    line.send(CONNECT)
    line.pause()
    line.visitor().transport.write(b"x" * SLICE)
    await asyncio.sleep(9)
    assert line.received() == []
    line.resume()
    assert line.received() == [b"x" * SLICE]
    await asyncio.sleep(100)
    assert line.state() == "open"
    await line.close()


@run_virtual
async def test_a_send_is_given_another_chance_after_we_were_stuck_ourselves() -> None:
    line = await Line.open(write_timeout=10, ping_interval=1000)
    line.pause()
    virtual_loop().advance(3600)
    await asyncio.sleep(1)
    assert line.state() == "waiting"
    await asyncio.sleep(10)
    assert line.state() == "closed"


@run_virtual
async def test_a_visitor_who_does_not_read_is_not_mistaken_for_a_dead_server() -> None:
    line = await Line.open(write_timeout=600, ping_interval=20, ping_timeout=20)
    line.send(CONNECT)
    await asyncio.sleep(20.5)
    assert line.received() == [Opcode.PING]
    line.pause()  # before its pong came: the server is busy with what the visitor does not take
    await asyncio.sleep(500)
    assert line.state() == "open"
    assert line.received() == []
    line.resume()
    await asyncio.sleep(19)
    assert line.state() == "open"
    await line.visitor().lost.wait()
    assert "silent" in str(line.owner.error)


@run_virtual
async def test_a_write_timeout_of_zero_lets_a_visitor_read_nothing_for_ever() -> None:
    line = await Line.open(write_timeout=0)
    line.send(CONNECT)
    line.pause()
    await asyncio.sleep(24 * 3600)
    assert line.state() == "open"
    line.resume()
    await line.close()


@run_virtual
async def test_no_timer_is_left_when_the_connection_is_lost() -> None:
    line = await Line.open()
    line.send(CONNECT)
    line.pause()
    line.visitor().transport.close()
    await line.close()
    loop: Any = asyncio.get_running_loop()
    waiting = [timer for timer in loop._scheduled if not timer.cancelled()]
    assert [timer for timer in waiting if "Tunnel" in repr(timer)] == []


# Dialling


async def dial_once(config: TunnelConfig, owner: FakeOwner | None = None) -> FakeOwner:
    owner = owner or FakeOwner()
    jwt = JwtManager(config.access_key, config.tunnel_domain.customer_id)
    await dial(config, jwt, config.make_ssl_context(), owner)
    return owner


def http_date(seconds_from_now: float) -> str:
    return email.utils.formatdate(time.time() + seconds_from_now, usegmt=True)


@asynccontextmanager
async def relay_serving() -> AsyncIterator[Relay]:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        yield relay


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (401, AuthenticationFailed, False),
        (403, AuthenticationFailed, False),
        (402, NoCredits, False),
        (429, ServerError, True),
        (500, ServerError, True),
        (503, ServerError, True),
        (599, ServerError, True),
        (400, BadRequest, False),
        (404, BadRequest, False),
        (426, BadRequest, False),
        (301, BadRequest, False),
        (200, BadRequest, False),
    ],
)
@run_on_each_loop
async def test_each_refusal_has_its_class(status: int, kind: type[UpgradeRefused], retryable: bool) -> None:
    async with relay_serving() as relay:
        relay.refuse(status)
        with pytest.raises(UpgradeRefused) as raised:
            await dial_once(make_config(relay))
        assert type(raised.value) is kind
        assert raised.value.retryable is retryable
        assert raised.value.status == status
        assert (raised.value.domain, raised.value.key_id) == (str(DOMAIN), "test-key")
        assert raised.value.retry_after is None
        assert raised.value.clock_skew == pytest.approx(0, abs=10)
        assert relay.dials == (2 if status == 401 else 1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        (" 7 ", 7),
        ("0", 0),
        (600, pytest.approx(600, abs=30)),
        (-600, 0),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("1 Jan 99999999999999999999 00:00", None),
    ],
)
@run_async
async def test_retry_after_is_read_in_both_forms(value: str | int, seconds: Any) -> None:
    async with relay_serving() as relay:
        relay.refuse(429, headers={"Retry-After": value if isinstance(value, str) else http_date(value)})
        with pytest.raises(ServerError) as raised:
            await dial_once(make_config(relay))
        assert raised.value.retry_after == seconds


@pytest.mark.parametrize(
    ("date", "skew"),
    [
        (600, pytest.approx(-600, abs=30)),
        (-600, pytest.approx(600, abs=30)),
        ("yesterday", None),
    ],
)
@run_async
async def test_a_refusal_tells_how_far_our_clock_is_off(date: str | int, skew: Any) -> None:
    async with relay_serving() as relay:
        relay.refuse(401, headers={"Date": date if isinstance(date, str) else http_date(date)})
        with pytest.raises(AuthenticationFailed) as raised:
            await dial_once(make_config(relay))
        assert raised.value.clock_skew == skew
        assert ("clock" in str(raised.value)) is (skew is not None)


@given(st.text(max_size=60) | st.from_regex(r"\w{3}, \d+ (Jan|Feb) \d+ \d+:\d+:\d+ ([+-]\d+|GMT)", fullmatch=True))
def test_no_header_a_server_may_send_is_more_than_ignored(value: str) -> None:
    assert isinstance(connection_module._retry_after(value), float | None)
    assert isinstance(connection_module._clock_skew(value), float | None)


@run_async
async def test_a_401_is_answered_once_with_a_fresh_token() -> None:
    async with relay_serving() as relay:
        config = make_config(relay)
        now = [time.time()]
        jwt = JwtManager(config.access_key, "acme", clock=lambda: now[0])
        first = jwt.get_token()
        now[0] += 2
        relay.refuse(401, times=1)
        owner = FakeOwner()
        await dial(config, jwt, None, owner)
        assert owner.log == ["ready"]
        assert (relay.dials, relay.refused) == (2, 1)
        assert jwt.get_token() != first


@run_async
async def test_a_403_is_not_tried_again() -> None:
    async with relay_serving() as relay:
        relay.refuse(403, times=1)
        with pytest.raises(AuthenticationFailed):
            await dial_once(make_config(relay))
        assert relay.dials == 1


@pytest.mark.parametrize("target", ["{server}/elsewhere", "wss://other.example/", "https://other.example/", "//[", ""])
@run_async
async def test_a_redirect_is_not_followed(target: str) -> None:
    async with relay_serving() as relay:
        relay.refuse(302, headers={"Location": target.format(server=relay.server_url)})
        with pytest.raises(BadRequest):
            await dial_once(make_config(relay))
        assert relay.dials == 1


@run_on_each_loop
async def test_a_port_nobody_listens_on_is_a_failed_connection() -> None:
    with pytest.raises(ConnectionFailed) as raised:
        await dial_once(make_config(f"ws://127.0.0.1:{unused_port()}/tunnels"))
    assert raised.value.retryable
    assert "cannot reach the tunnel server ws://127.0.0.1:" in str(raised.value)


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "x" * 70 + ".example"])
@run_on_each_loop
async def test_a_name_that_does_not_resolve_is_a_failed_connection(host: str) -> None:
    with pytest.raises(ConnectionFailed, match=host):
        await dial_once(make_config(f"ws://{host}/tunnels", allow_insecure_server=True, open_timeout=5))


@run_virtual
async def test_an_upgrade_that_hangs_is_given_up_in_time() -> None:
    async with relay_serving() as relay:
        relay.hang()
        start = virtual_loop().time()
        with pytest.raises(ConnectionFailed, match="did not answer in time"):
            await dial_once(make_config(relay, open_timeout=12))
        assert virtual_loop().time() - start == pytest.approx(12)


@run_virtual
async def test_a_tls_handshake_that_hangs_is_given_up_in_time() -> None:
    async with raw_server(lambda reader, writer: None) as port:
        with pytest.raises(ConnectionFailed, match="did not answer in time"):
            await dial_once(make_config(f"wss://127.0.0.1:{port}/tunnels", open_timeout=12))


@asynccontextmanager
async def raw_server(connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[int]:
    """A TCP server that is no tunnel server; its port."""
    writers = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        result = connected(reader, writer)
        if result is not None:
            await result

    server = await asyncio.start_server(serve_one, "127.0.0.1")
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection during the upgrade"),
        (b"HTTP/1.1 101 Switch", "closed the connection during the upgrade"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "valid HTTP response"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "Connection header"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "Accept"),
    ],
)
@run_on_each_loop
async def test_an_answer_that_is_no_upgrade_is_a_failed_connection(answer: bytes, reason: str) -> None:
    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.write_eof()

    async with raw_server(serve_one) as port:
        with pytest.raises(ConnectionFailed, match=reason):
            await dial_once(make_config(f"ws://127.0.0.1:{port}/tunnels"))


@run_on_each_loop
async def test_a_reset_during_the_upgrade_is_a_failed_connection() -> None:
    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with raw_server(serve_one) as port:
        with pytest.raises(ConnectionFailed):
            await dial_once(make_config(f"ws://127.0.0.1:{port}/tunnels"))


@run_on_each_loop
async def test_a_dial_that_is_cancelled_leaves_nothing_behind() -> None:
    async with relay_serving() as relay:
        relay.hang()
        owner = FakeOwner()
        dialling = asyncio.ensure_future(dial_once(make_config(relay), owner))
        await relay.wait_until(lambda relay: relay.dials == 1)
        dialling.cancel()
        await asyncio.wait([dialling])
        assert dialling.cancelled()
        assert owner.log == []


# Proxies


@run_async
async def test_no_proxy_is_used_for_a_server_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "ws_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with relay_serving() as relay:
        owner = await dial_once(make_config(relay))
        assert owner.log == ["ready"]


@run_async
async def test_a_proxy_is_used_for_any_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    async with raw_server(serve_one) as port:
        monkeypatch.setenv("https_proxy", f"http://user:proxy-secret@127.0.0.1:{port}")
        with pytest.raises(ConnectionFailed, match="proxy") as raised:
            await dial_once(make_config("wss://tunnel.example/tunnels"))
    assert requests[0].startswith(b"CONNECT tunnel.example:443 HTTP/1.1\r\n")
    assert b"Bearer" not in requests[0]
    assert_no_secret("".join(traceback.format_exception(raised.value)), "proxy-secret")


@pytest.mark.parametrize("proxy", ["http://user:proxy-secret@", "gopher://user:proxy-secret@127.0.0.1"])
@run_async
async def test_a_proxy_that_is_none_is_named_without_its_password(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ConfigError, match="proxy") as raised:
        await dial_once(make_config("wss://tunnel.example/tunnels"))
    assert_no_secret("".join(traceback.format_exception(raised.value)), "proxy-secret")


@run_async
async def test_a_socks_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"socks5://127.0.0.1:{unused_port()}")
    with pytest.raises(ConnectionFailed, match="proxy"):
        await dial_once(make_config("wss://tunnel.example/tunnels"))


@run_async
async def test_a_socks_proxy_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_installed(*_: Any, **__: Any) -> None:
        raise ImportError("connecting through a SOCKS proxy requires python-socks")

    monkeypatch.setattr("websockets.asyncio.client.connect_socks_proxy", not_installed)
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"tunnel-asgi\[socks\]"):
        await dial_once(make_config("wss://tunnel.example/tunnels"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProxyError("the proxy failed"), "the proxy failed"),
        (OSError(), "OSError"),
        (OSError(113, "No route to host"), "No route to host"),
    ],
)
def test_every_failure_has_a_reason_in_words(error: Exception, reason: str) -> None:
    assert reason in connection_module._reason(error)


def test_a_proxy_that_failed_says_how() -> None:
    error = ProxyError("failed to connect to the proxy")
    error.__cause__ = OSError("it is asleep")
    assert connection_module._reason(error) == "failed to connect to the proxy: it is asleep"


# TLS


@asynccontextmanager
async def tls_server(folder: Path) -> AsyncIterator[tuple[str, Path]]:
    """A tunnel server over TLS that echoes one visitor; its URL and its CA."""
    server_context, _ = make_tls_contexts(folder)

    async def serve_one(ws: ServerConnection) -> None:
        await ws.send(CONNECT)
        await ws.send(b"x" * 100_000)
        await ws.send(EOF)
        async for message in ws:
            if message == "RESET":
                await ws.close()

    async with serve(serve_one, "127.0.0.1", ssl=server_context, compression=None, logger=QUIET) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"wss://127.0.0.1:{port}/tunnels", folder / "certificate.pem"


@run_on_each_loop
async def test_a_server_with_a_ca_of_its_own_is_trusted_with_trust_ca(tmp_path: Path) -> None:
    async with tls_server(tmp_path) as (url, ca):
        owner = FakeOwner()
        ending = asyncio.Event()
        owner.on["lost"] = ending.set
        owner.protocols.append(Recorder(made=lambda transport: transport.write(b"y" * 1_000_000)))
        await dial_once(make_config(url, trust_ca=ca), owner)
        await ending.wait()
        assert owner.log == ["ready", "visitor", "recycled", "ending", "lost"]
        assert isinstance(owner.protocols[0], Recorder)
        assert len(owner.protocols[0].data) == 100_000


@run_on_each_loop
async def test_a_certificate_nobody_vouches_for_names_trust_ca(tmp_path: Path) -> None:
    watch_unhandled()  # in debug mode asyncio reports what the server cannot help
    async with tls_server(tmp_path) as (url, _):
        with pytest.raises(ConnectionFailed, match=r"certificate is not trusted.*--trust-ca"):
            await dial_once(make_config(url))


@run_on_each_loop
async def test_a_certificate_for_another_name_is_not_trusted(tmp_path: Path) -> None:
    watch_unhandled()  # in debug mode asyncio reports what the server cannot help
    async with tls_server(tmp_path) as (url, ca):
        with pytest.raises(ConnectionFailed, match="certificate is not trusted"):
            await dial_once(make_config(url.replace("127.0.0.1", "localhost"), trust_ca=ca))


@run_on_each_loop
async def test_a_server_without_tls_is_a_failed_connection() -> None:
    async with relay_serving() as relay:
        with pytest.raises(ConnectionFailed):
            await dial_once(make_config(relay.server_url.replace("ws:", "wss:")))


# Over real sockets


class Echo(Recorder):
    """Sends back what it gets, closes at EOF, honours back-pressure."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()


@run_on_each_loop
async def test_an_echo_gives_back_every_byte_however_late_the_visitor_reads() -> None:
    async with relay_serving() as relay:
        owner = FakeOwner()
        recycled = asyncio.Event()
        owner.on["recycled"] = recycled.set
        echo = Echo(half_close=False)
        owner.protocols.append(echo)
        await dial_once(make_config(relay), owner)
        data = bytes(range(256)) * 4 * 32 * 1024  # more than the buffers of all the sockets on its way
        async with visiting(relay) as visitor:
            sending = asyncio.ensure_future(visitor.send(data))
            await echo.until(lambda events: "pause" in events)
            assert await visitor.read(len(data)) == data
            await sending
            visitor.send_eof()
            assert await visitor.read_all() == b""
        await recycled.wait()
        assert echo.events.count("pause") == echo.events.count("resume") > 0
        assert relay.violations == []


@run_on_each_loop
async def test_a_stalled_path_is_found_dead_by_keep_alive() -> None:
    async with relay_serving() as relay:
        owner = FakeOwner()
        recorder = Recorder()
        owner.protocols.append(recorder)
        await dial_once(make_config(relay, ping_interval=0.01, ping_timeout=0.01), owner)
        async with visiting(relay) as visitor:
            await visitor.send(b"x")
            await recorder.until(lambda events: b"x" in events)
            relay.tunnels[0].stall()
            await recorder.lost.wait()
            assert isinstance(recorder.events[-1], ConnectionResetError)
            assert "silent" in str(owner.error)


@run_on_each_loop
async def test_a_server_that_reads_nothing_ends_the_websocket() -> None:
    async with relay_serving() as relay:
        owner = FakeOwner()
        recorder = Recorder()
        owner.protocols.append(recorder)
        await dial_once(make_config(relay, write_timeout=0.05), owner)
        async with visiting(relay):
            await recorder.until(lambda events: "made" in events)
            relay.tunnels[0].stall()
            recorder.transport.write(b"x" * (64 * 1024 * 1024))
            await recorder.lost.wait()
            assert "no progress" in str(owner.error)
            assert recorder.events[1:-1] == ["pause"]


async def keep_alive_checks(connection: TunnelConnection, n: int) -> None:
    """Wait until keep-alive has looked this many times."""
    looked = asyncio.Semaphore(0)
    check = connection._check_silence

    def look() -> None:
        looked.release()
        check()

    connection._check_silence = look  # type: ignore[method-assign]
    for _ in range(n):
        await looked.acquire()


@run_on_each_loop
async def test_an_app_that_does_not_read_stops_the_visitor_and_not_the_websocket() -> None:
    async with relay_serving() as relay:
        owner = FakeOwner()
        recorder = Recorder(half_close=True, made=lambda transport: transport.pause_reading())
        owner.protocols.append(recorder)
        await dial_once(make_config(relay, ping_interval=0.01, ping_timeout=0.01), owner)
        data = b"x" * (32 * 1024 * 1024)
        async with visiting(relay) as visitor:
            sending = asyncio.ensure_future(visitor.send(data))
            await recorder.until(lambda events: "made" in events)
            await keep_alive_checks(owner.connections[0], 10)
            assert not sending.done()
            assert recorder.events == ["made"]
            assert relay.tunnels[0].state == "open"
            assert owner.error is None
            recorder.transport.resume_reading()
            await sending
            visitor.send_eof()
            await recorder.until(lambda events: events[-1] == "eof")
            assert recorder.data == data
            recorder.transport.close()


@pytest.mark.parametrize("leave", ["close", "abort", "cut", "server closes"])
@run_on_each_loop
async def test_a_websocket_that_ends_in_any_way_takes_its_visitor_and_leaves_nothing(leave: str) -> None:
    async with relay_serving() as relay:
        owner = FakeOwner()
        lost = asyncio.Event()
        owner.on["lost"] = lost.set
        recorder = Recorder()
        owner.protocols.append(recorder)
        await dial_once(make_config(relay), owner)
        async with visiting(relay) as visitor:
            await visitor.send(b"x")
            await recorder.until(lambda events: b"x" in events)
            connection = owner.connections[0]
            if leave == "close":
                connection.close(1001)
            elif leave == "abort":
                connection.abort()
            elif leave == "cut":
                relay.tunnels[0].cut()
            else:
                await relay.tunnels[0].close(1012, "restart")
            await lost.wait()
            await recorder.lost.wait()
        await relay.wait_until(lambda relay: not relay.tunnels)
        assert isinstance(recorder.events[-1], ConnectionResetError)
        assert (owner.error is None) == (leave in ("close", "abort"))
        assert relay.violations == []


# Secrets


def assert_no_secret(text: str, *more_secrets: str) -> None:
    for secret in (SECRET, "Bearer", "Authorization", "eyJ", *more_secrets):
        assert secret not in text


@pytest.mark.parametrize("status", [None, 401, 402, 403, 404, 429, 500, "refused", "hangs", "garbage"])
def test_no_token_or_secret_is_logged_at_any_level_or_stands_in_an_error(
    status: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(1)
    for name in ("tunnel_asgi", "tunnel_asgi.websocket", "websockets", "websockets.client", "asyncio"):
        caplog.set_level(1, name)
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    monkeypatch.setattr(asyncio.events, "new_event_loop", VirtualTimeLoop)
    errors: list[str] = []

    @run_async
    async def test() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0  # so that every callback is logged
        async with relay_serving() as relay:
            config = make_config(relay, open_timeout=3)
            if isinstance(status, int):
                relay.refuse(status)
            if status == "hangs":
                relay.hang()
            if status == "refused":
                config = make_config(f"ws://127.0.0.1:{unused_port()}/tunnels")
            try:
                owner = await dial_once(config)
                async with visiting(relay) as visitor:
                    await visitor.send(b"x")
                    await relay.wait_until(lambda relay: relay.tunnels[0].state == "open")
                    await settle()
                    await relay.tunnels[0].send_raw("CONNECT: 1.2.3.4")
                    with pytest.raises(ConnectionResetError):
                        await visitor.read_all()
                errors.append(repr(owner.error))
            except TunnelError as error:
                errors.extend([str(error), repr(error), *traceback.format_exception(error)])
            errors.append(repr(config))

    test()
    assert errors
    assert_no_secret("".join(errors))
    assert any(record.name == "asyncio" for record in caplog.records)
    assert_no_secret("\n".join(f"{record.getMessage()} {record.exc_text} {record.args}" for record in caplog.records))


@run_async
async def test_the_logger_of_websockets_cannot_be_switched_on() -> None:
    logging.getLogger("tunnel_asgi.websocket").setLevel(1)
    assert not connection_module._silent_logger.isEnabledFor(logging.CRITICAL)
    assert connection_module._silent_logger is not logging.getLogger("tunnel_asgi.websocket")
