"""Targets: a WebSocket whose tunnel server sends anything at all, before the upgrade and after it.

After the upgrade the fuzzer also plays the app, the socket and the clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Close, Opcode

from tests.fakes import Line, Recorder
from tests.fuzz import bench
from tests.fuzz.tape import Tape
from tunnel_asgi.connection import _refusal
from tunnel_asgi.protocol import MAX_TEXT, RESET
from tunnel_asgi.transport import HELD_LIMIT, TunnelTransport

__all__ = ["check", "check_upgrade"]

DRAIN_LIMIT = 1000  # bytes
MAX_FRAME = 4096  # bytes
PAYLOADS = [
    b"",
    b"CONNECT: 192.0.2.1, id",
    b"CONNECT: nowhere",
    b"DROP: gone",
    b"RESET",
    b"RDSD",
    b"x" * 500,
    b"x" * 4000,
    b"x" * 5000,
    b"\x03\xe8bye",
    b"\xff\xfe",
]
WAITS = [0, 0.5, 6, 25, 61, 4000]  # seconds: past the close, keep-alive, drain and write timeouts


def check(data: bytes) -> None:
    """A waiting WebSocket, and whatever comes then."""
    bench.run(_drive(Tape(data)))


class Watcher(Recorder):
    """A protocol that knows when it must not be called."""

    def data_received(self, data: bytes) -> None:
        assert self.transport.is_reading(), "bytes came while reading was paused, or after the end"
        super().data_received(data)


async def _drive(tape: Tape) -> None:
    line = await Line.open(drain_limit=DRAIN_LIMIT, max_message_size=MAX_FRAME)
    half_close = tape.flag()
    line.owner.make_protocol = lambda: Watcher(half_close=half_close)
    while tape and not line.socket.closed:
        await tape.choose(STEPS)(line, tape)
    sent = line.received()
    await line.close()
    assert line.server.parser_exc is None, "we sent what is no WebSocket frame"
    _check_messages(sent + line.received())
    _check_log(line.owner.log)
    for recorder in line.owner.protocols:
        _check_recorder(recorder)


# What can happen


async def _frame(line: Line, tape: Tape) -> None:
    """A frame, as good or bad as the fuzzer likes."""
    first, masked = tape.byte(), tape.byte() == 0xFF
    payload = tape.choose(PAYLOADS) if tape.flag() else tape.chunk()
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    mask = bytes([length[0] | 0x80]) + length[1:] + bytes(4) if masked else length
    _deliver(line, bytes([first]) + mask + payload)


async def _message(line: Line, tape: Tape) -> None:
    """A whole good message, so that deep states are reached soon."""
    payload = tape.choose(PAYLOADS[:8])
    opcode = Opcode.TEXT if payload[:1].isupper() else Opcode.BINARY
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    _deliver(line, bytes([0x80 | opcode]) + length + payload)


async def _raw(line: Line, tape: Tape) -> None:
    _deliver(line, tape.chunk())


async def _app(line: Line, tape: Tape) -> None:
    """The app does something with its newest visitor, also if that one is gone."""
    if not line.owner.transports:
        return
    transport = line.owner.transports[-1]
    action = tape.choose(APP)
    if action is not None and not transport._eof_asked:
        transport.write(action)
        return
    tape.choose([transport.close, transport.abort, transport.write_eof, transport.pause_reading])()


async def _resume(line: Line, tape: Tape) -> None:
    if line.owner.transports:
        line.owner.transports[-1].resume_reading()
    await asyncio.sleep(0)


async def _socket(line: Line, tape: Tape) -> None:
    if tape.flag():
        line.pause()
    else:
        line.resume()


async def _time(line: Line, tape: Tape) -> None:
    await asyncio.sleep(tape.choose(WAITS))


async def _end_of_stream(line: Line, tape: Tape) -> None:
    if tape.byte() % 8 == 0:  # seldom, or every run would be short
        line.connection.eof_received()
        line.socket.close()


APP: list[bytes | None] = [None, b"", b"answer", b"x" * 100_000]
STEPS: list[Callable[[Line, Tape], Awaitable[None]]] = [
    _message,
    _frame,
    _raw,
    _app,
    _resume,
    _socket,
    _time,
    _end_of_stream,
]


def _deliver(line: Line, data: bytes) -> None:
    if not line.socket.reading:
        return  # a socket that is not read delivers nothing
    line.deliver(data)
    assert len(line.connection._fragments) <= MAX_TEXT + MAX_FRAME
    for transport in line.owner.transports:
        _check_buffers(transport, len(data))


def _check_buffers(transport: TunnelTransport, delivered: int) -> None:
    held = sum(len(data) for data in transport._held)
    assert held == transport._held_size <= HELD_LIMIT + MAX_FRAME + delivered
    assert sum(len(data) for data in transport._pending) == transport._pending_size


# The laws


def _check_messages(messages: list[Any]) -> None:
    """What the client sends keeps PROTOCOL.md 4, whatever the server does."""
    ended = closed = False
    for message in messages:
        assert not closed, f"{message!r} was sent after the close frame"
        if message == RESET:
            assert ended, "RESET was sent before EOF"
            ended = False
        elif isinstance(message, bytes):
            assert not ended, "something was sent after EOF"
            ended = not message
        elif isinstance(message, Close):
            closed = True
        else:
            assert message in (Opcode.PING, Opcode.PONG), f"{message!r} is nothing a client sends"


def _check_log(log: list[str]) -> None:
    """Ready; visitors who come and go one after the other; the end, and then nothing."""
    assert log[0] == "ready"
    assert log[-2:] == ["ending", "lost"]
    visits = log[1:-2]
    assert visits[::2] == ["visitor"] * len(visits[::2])
    assert visits[1::2] == ["recycled"] * len(visits[1::2])


def _check_recorder(recorder: asyncio.BaseProtocol) -> None:
    assert isinstance(recorder, Recorder)
    first, *_, last = recorder.events
    assert first == "made"
    assert last == "lost" or isinstance(last, Exception)
    ends = [event for event in recorder.events if event == "lost" or isinstance(event, Exception)]
    assert len(ends) == 1, "a visitor was lost twice"


# Before the upgrade


def check_upgrade(data: bytes) -> None:
    """A tunnel server that answers the upgrade with anything; the first byte cuts it into pieces."""
    bench.run(_upgrade(data[:1], data[1:]))


async def _upgrade(cut: bytes, answer: bytes) -> None:
    line = Line()
    handshake = asyncio.ensure_future(line.connection.handshake())
    await asyncio.sleep(0)
    size = ord(cut or b"\0") or len(answer) or 1
    for start in range(0, len(answer), size):
        line.deliver(answer[start : start + size])
        await asyncio.sleep(0)
    line.connection.eof_received()
    line.socket.close()
    try:
        await handshake
    except InvalidStatus as error:
        str(_refusal(error.response, line.config))
    except (OSError, InvalidHandshake):
        pass  # what ``dial`` turns into ConnectionFailed
    else:
        raise AssertionError("a wrong answer opened the WebSocket")
