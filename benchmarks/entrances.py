"""How visitors reach an app: over TCP to a port, or as the tunnel server that hands them to waiting WebSockets.

The generator is the tunnel server itself, so that nothing stands between it and what is measured. It does the least a
tunnel server must (PROTOCOL.md 3 and 4) and none of a relay's work: it believes every token, and has no buffers.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha1
from types import TracebackType
from typing import Protocol, Self, cast

from websockets.speedups import apply_mask

HOST = "127.0.0.1"
VISITOR_IP = "203.0.113.7"
PIECE = 32 * 1024  # bytes of an upload in one message, about what a tunnel server reads at once

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_FIN_TEXT, _FIN_BINARY, _FIN_CLOSE, _FIN_PING, _FIN_PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
_EOF = bytes([_FIN_BINARY, 0])


class Wrong(Exception):
    """What came is not what should have come: nothing measured with it counts."""


class Line(Protocol):
    """A visitor connection, as the visitor has it in hand."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    def end(self) -> None:
        """Send no more. The other side ends, too, and then the visitor is told."""

    def abort(self) -> None:
        """Break the connection."""


class Visitor(Protocol):
    """Somebody with a connection to the app."""

    def connected(self, line: Line) -> None:
        """Begin. Called again if the first line broke before a byte came back."""

    def received(self, data: bytes) -> None:
        """The app sent bytes."""

    def ended(self) -> None:
        """The connection is over."""


class Entrance(Protocol):
    """Where visitors come in."""

    def admit(self, visitor: Visitor) -> None:
        """Connect a visitor."""


# A port


class PortEntrance:
    """Visitors connect to a TCP port of this machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connecting: set[asyncio.Task[object]] = set()

    def admit(self, visitor: Visitor) -> None:
        loop = asyncio.get_running_loop()
        task: asyncio.Task[object] = loop.create_task(
            loop.create_connection(lambda: _TcpLine(visitor), HOST, self._port)
        )
        self._connecting.add(task)
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[object]) -> None:
        self._connecting.discard(task)
        task.result()  # a failure goes to the loop's exception handler


class _TcpLine(asyncio.Protocol):
    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._visitor.connected(self)

    def data_received(self, data: bytes) -> None:
        self._visitor.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._visitor.ended()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def end(self) -> None:
        self._transport.write_eof()

    def abort(self) -> None:
        self._transport.abort()


# A tunnel


class TunnelEntrance:
    """A tunnel server, an async context manager. Visitors who find no waiting WebSocket are held.

    ``upgrade_delay`` is seconds from a dial to its answer: what TCP, TLS and the upgrade take on a real network.
    """

    def __init__(self, *, upgrade_delay: float = 0.0) -> None:
        self.upgrade_delay = upgrade_delay
        self._waiting: dict[_TunnelLine, None] = {}  # oldest first
        self._held: dict[Visitor, None] = {}
        self._enough: tuple[int, asyncio.Future[None]] | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _TunnelLine(self), HOST, 0)
        self.url = f"ws://{HOST}:{self._server.sockets[0].getsockname()[1]}/tunnels"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def wait_for_waiting(self, count: int) -> None:
        """Return once so many WebSockets wait."""
        if len(self._waiting) < count:
            self._enough = count, asyncio.get_running_loop().create_future()
            await self._enough[1]

    def admit(self, visitor: Visitor) -> None:
        if not self._waiting:
            self._held[visitor] = None
            return
        line = next(iter(self._waiting))
        del self._waiting[line]
        line.carry(visitor)

    def offer(self, line: _TunnelLine) -> None:
        """A WebSocket waits."""
        if self._held:
            visitor = next(iter(self._held))
            del self._held[visitor]
            line.carry(visitor)
            return
        self._waiting[line] = None
        if self._enough is not None and len(self._waiting) >= self._enough[0]:
            self._enough[1].set_result(None)
            self._enough = None

    def withdraw(self, line: _TunnelLine) -> None:
        """It waits no more."""
        self._waiting.pop(line, None)


class _TunnelLine(asyncio.Protocol):
    """One WebSocket of a tunnel client, which carries one visitor after the other."""

    def __init__(self, server: TunnelEntrance) -> None:
        self._server = server
        self._visitor: Visitor | None = None
        self._answered = False  # whether the client sent anything to this visitor
        self._ended = False  # whether the visitor's direction is
        self._upgraded = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        self._rest = self._read_frames(data) if self._upgraded else self._read_upgrade(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.withdraw(self)
        visitor, self._visitor = self._visitor, None
        if visitor is None:
            return
        if self._answered:
            visitor.ended()
        else:  # the client let go of a surplus WebSocket while the visitor was on the way
            self._server.admit(visitor)

    # The visitor's side

    def carry(self, visitor: Visitor) -> None:
        """Hand a visitor to the client."""
        self._visitor = visitor
        self._answered = self._ended = False
        self._transport.write(_frame(_FIN_TEXT, f"CONNECT: {VISITOR_IP}, bench".encode()))
        # What a visitor sends comes later than the visitor, as on a port: in a write of its own.
        asyncio.get_running_loop().call_soon(visitor.connected, self)

    def write(self, data: bytes) -> None:
        self._transport.write(_binary_messages(data))

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._transport.write(_EOF)

    def abort(self) -> None:
        self._transport.abort()

    # The client's side

    def _read_upgrade(self, data: bytes) -> bytes:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return data
        key = re.search(rb"^sec-websocket-key: *(\S+)", head, re.IGNORECASE | re.MULTILINE)
        if key is None:
            raise Wrong(f"{head!r} is no upgrade")
        asyncio.get_running_loop().call_later(self._server.upgrade_delay, self._upgrade, key[1])
        return rest

    def _upgrade(self, key: bytes) -> None:
        if self._transport.is_closing():
            return  # the client went while its dial was on the way
        accept = b64encode(sha1(key + _MAGIC, usedforsecurity=False).digest())
        self._transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self._upgraded = True
        self._server.offer(self)

    def _read_frames(self, data: bytes) -> bytes:
        """Take the frames that are complete; returns the rest. A client masks, and sends every message in one frame."""
        position, end = 0, len(data)
        while end - position >= 6:
            length, start = data[position + 1] - 0x80, position + 6
            if length < 0:
                raise Wrong("a client must mask its frames")
            if length == 126:
                start += 2
                length = int.from_bytes(data[position + 2 : position + 4])
            elif length == 127:
                start += 8
                length = int.from_bytes(data[position + 2 : position + 10])
            if start + length > end:
                break
            self._receive(data[position], apply_mask(data[start : start + length], data[start - 4 : start]))
            position = start + length
        return data[position:]

    def _receive(self, kind: int, payload: bytes) -> None:
        if kind == _FIN_BINARY:
            self._receive_binary(payload)
        elif kind == _FIN_TEXT:
            self._receive_text(payload)
        elif kind == _FIN_PING:
            self._transport.write(_frame(_FIN_PONG, payload))
        elif kind == _FIN_CLOSE:
            self._server.withdraw(self)
            self._transport.write(_frame(_FIN_CLOSE, payload))
            self._transport.close()
        elif kind != _FIN_PONG:
            raise Wrong(f"a frame that begins with {kind:#x}")

    def _receive_binary(self, payload: bytes) -> None:
        if self._visitor is None:
            raise Wrong("bytes for no visitor")
        self._answered = True
        if payload:
            self._visitor.received(payload)
        else:
            visitor, self._visitor = self._visitor, None
            self.end()
            visitor.ended()

    def _receive_text(self, payload: bytes) -> None:
        if payload != b"RESET" or self._visitor is not None or not self._ended:
            raise Wrong(f"{payload!r} at the wrong time")
        self._server.offer(self)


@lru_cache(maxsize=64)
def _binary_messages(data: bytes) -> bytes:
    """The frames for what a visitor sends. Visitors repeat themselves, so making them costs nothing."""
    return b"".join(_frame(_FIN_BINARY, data[start : start + PIECE]) for start in range(0, len(data), PIECE))


def _frame(kind: int, payload: bytes) -> bytes:
    """A server masks nothing."""
    if len(payload) < 126:
        return bytes([kind, len(payload)]) + payload
    if len(payload) < 65536:
        return bytes([kind, 126]) + len(payload).to_bytes(2) + payload
    return bytes([kind, 127]) + len(payload).to_bytes(8) + payload
