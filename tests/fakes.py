"""What tests of the tunnel's client share: loops of other kinds, protocols that record, a network that is none."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import selectors
import socket
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, cast

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from tests import support
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.connection import TunnelConnection
from tunnel_asgi.errors import WebSocketError
from tunnel_asgi.protocol import Connected
from tunnel_asgi.relay import Relay
from tunnel_asgi.transport import TunnelTransport

QUIET = logging.Logger("quiet", level=logging.CRITICAL + 1)

P = ParamSpec("P")


def make_config(server: Relay | str = "ws://127.0.0.1:9/tunnels", **options: Any) -> TunnelConfig:
    """A tunnel for ``support.DOMAIN`` at this server."""
    server_url = server if isinstance(server, str) else server.server_url
    options = {"key": support.SECRET, "key_id": support.KEY_ID, "server_url": server_url} | options
    return TunnelConfig(str(support.DOMAIN), **options)


# Loops


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while there is work to do, and jumps to the next timer when there is none."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let the clock jump now, as if the process had been stopped."""
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    GRACE = 0.001  # real seconds; loopback sockets of one process are ready sooner

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        events = super().select(min(self.GRACE, timeout))
        if not events:
            self._loop.advance(timeout)
        return events


def run_virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """``support.run_async`` on virtual time: an hour takes no longer than what happens in it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.events, "new_event_loop", VirtualTimeLoop)
            patch.setattr(support, "TEST_TIMEOUT", 7 * 24 * 3600.0)
            support.run_async(test)(*args, **kwargs)

    return run


def run_on_each_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """``support.run_async``, once on asyncio's loop and once on uvloop's."""

    @pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
    @functools.wraps(test)
    def run(*args: Any, loop_kind: str, **kwargs: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if loop_kind == "uvloop":
                patch.setattr(asyncio.events, "new_event_loop", pytest.importorskip("uvloop").new_event_loop)
            support.run_async(test)(*args, **kwargs)

    signature = inspect.signature(test)
    loop_kind = inspect.Parameter("loop_kind", inspect.Parameter.KEYWORD_ONLY)
    parametrized: Any = run
    parametrized.__signature__ = signature.replace(parameters=[*signature.parameters.values(), loop_kind])
    return cast(Callable[..., None], parametrized)


async def settle(turns: int = 5) -> None:
    """Let the loop turn a few times: whatever needs no clock and no peer has happened then."""
    for _ in range(turns):
        await asyncio.sleep(0)


def virtual_loop() -> VirtualTimeLoop:
    """The running loop of a ``run_virtual`` test."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


def watch_unhandled() -> list[dict[str, Any]]:
    """From now on, what reaches the loop's exception handler ends in this list and fails no test."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
    return reports


# Protocols


class Recorder(asyncio.Protocol):
    """Records what it is told, bytes in a row as one; ``on[name]`` is called with the arguments of that event."""

    def __init__(self, *, half_close: bool = False, **on: Callable[..., Any]) -> None:
        self.events: list[Any] = []
        self.transport: TunnelTransport
        self.half_close = half_close
        self.on = on
        self.lost = asyncio.Event()
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._note("made", transport)

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        assert data
        if self.events and isinstance(self.events[-1], bytes):
            data_before = self.events.pop()
            self.events.append(data_before + data)
        else:
            self.events.append(data)
        self._call("data", data)

    def eof_received(self) -> bool:
        self._note("eof")
        return self.half_close

    def connection_lost(self, exc: BaseException | None) -> None:
        self.events.append("lost" if exc is None else exc)
        self.lost.set()
        self._call("lost", exc)

    def pause_writing(self) -> None:
        self._note("pause")

    def resume_writing(self) -> None:
        self._note("resume")

    async def until(self, predicate: Callable[[list[Any]], bool]) -> None:
        """Wait until the events are so."""
        while not predicate(self.events):
            self._news.clear()
            await self._news.wait()

    @property
    def data(self) -> bytes:
        """Every byte so far."""
        return b"".join(event for event in self.events if isinstance(event, bytes))

    def _note(self, event: str, *arguments: Any) -> None:
        self.events.append(event)
        self._call(event, *arguments)

    def _call(self, name: str, *arguments: Any) -> None:
        self._news.set()
        if name in self.on:
            self.on[name](*arguments)


# A WebSocket without a network


class FakeSocket(asyncio.Transport):
    """The transport of a TCP connection: ``written`` goes nowhere, what stays in its buffer is set by the test."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.written = bytearray()
        self.buffer_size = 0
        self.reading = True
        self.closed = False
        self.aborted = False
        self.on_closed: Callable[[], None] = lambda: None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.closed:
            self.written += data

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self.on_closed)

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def get_write_buffer_size(self) -> int:
        return self.buffer_size

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing: the test decides when to pause."""

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class FakeOwner:
    """Records what becomes of a connection; each visitor gets the next of ``protocols``, or a new Recorder."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.accepting = True
        self.log: list[str] = []
        self.error: WebSocketError | None = None
        self.connections: list[TunnelConnection] = []
        self.visitors: list[Connected] = []
        self.transports: list[TunnelTransport] = []
        self.protocols: list[asyncio.BaseProtocol] = []
        self.make_protocol: Callable[[], asyncio.BaseProtocol] = Recorder
        self.on: dict[str, Callable[[], None]] = {}

    def _note(self, event: str) -> None:
        self.log.append(event)
        self.on.get(event, lambda: None)()

    def connection_ready(self, connection: TunnelConnection) -> None:
        self.connections.append(connection)
        self._note("ready")

    def visitor_connected(self, connection: TunnelConnection, visitor: Connected) -> TunnelTransport:
        self.visitors.append(visitor)
        if len(self.protocols) < len(self.visitors):
            self.protocols.append(self.make_protocol())
        protocol = self.protocols[len(self.visitors) - 1]
        extra = {"connection_id": visitor.connection_id}
        self.transports.append(TunnelTransport(connection, protocol, extra=extra, loop=self._loop))
        self._note("visitor")
        return self.transports[-1]

    def connection_recycled(self, connection: TunnelConnection) -> None:
        self._note("recycled")

    def connection_ending(self, connection: TunnelConnection, error: WebSocketError | None) -> None:
        self.error = error
        self._note("ending")

    def connection_lost(self, connection: TunnelConnection) -> None:
        self._note("lost")


class Line:
    """A TunnelConnection and a tunnel server that is none: whatever it sends arrives at once, as the test cuts it."""

    def __init__(self, **options: Any) -> None:
        self.config = make_config(**options)
        self.owner = FakeOwner()
        self.socket = FakeSocket()
        self.server = ServerProtocol(logger=QUIET)
        self.connection = TunnelConnection(
            ClientProtocol(self.config.server_uri, max_size=(None, self.config.max_message_size), logger=QUIET),
            self.owner,
            self.config,
        )
        self.socket.on_closed = lambda: self.connection.connection_lost(None)
        self.connection.connection_made(self.socket)

    @classmethod
    async def open(cls, **options: Any) -> Line:
        """A line whose WebSocket waits for its first visitor."""
        line = cls(**options)
        handshake = asyncio.ensure_future(line.connection.handshake())
        await asyncio.sleep(0)
        line.answer_upgrade()
        await handshake
        return line

    def answer_upgrade(self, *frames: Frame) -> None:
        """Accept the upgrade; the frames arrive together with the answer."""
        [request] = self._events()
        assert isinstance(request, Request)
        self.server.send_response(self.server.accept(request))
        assert self.server.state is State.OPEN
        self.send(*frames)

    def send(self, *messages: Frame | str | bytes) -> None:
        """All of them arrive in one piece."""
        for message in messages:
            self.server.send_frame(_frame(message))
        self.deliver(b"".join(self.server.data_to_send()))

    def deliver(self, data: bytes) -> None:
        """These bytes arrive, as asyncio hands them over."""
        if data and not self.socket.closed:
            self.connection.data_received(data)

    def received(self) -> list[Any]:
        """What the client has sent since the last call: str, bytes, Close, or the Opcode of a ping or pong."""
        return [_message(event) for event in self._events()]

    def state(self) -> str:
        """The connection's state."""
        return self.connection.state

    def reading(self) -> bool:
        """Whether the client reads its socket."""
        return self.socket.reading

    def visitor(self, n: int = -1) -> Recorder:
        """The protocol of the nth visitor."""
        protocol = self.owner.protocols[n]
        assert isinstance(protocol, Recorder)
        return protocol

    def pause(self, buffered: int = 100_000) -> None:
        """The client's socket takes no more: it has this many bytes in its buffer."""
        self.socket.buffer_size = buffered
        self.connection.pause_writing()

    def resume(self) -> None:
        """The client's socket has sent everything."""
        self.socket.buffer_size = 0
        self.connection.resume_writing()

    async def close(self) -> None:
        """End of the test: no timer stays behind."""
        self.connection.abort()
        await settle()
        assert self.socket.closed
        assert self.owner.log[-1] == "lost"

    def _events(self) -> list[Any]:
        data, self.socket.written = bytes(self.socket.written), bytearray()
        if data:
            self.server.receive_data(data)
        return self.server.events_received()


def _frame(message: Frame | str | bytes) -> Frame:
    if isinstance(message, Frame):
        return message
    if isinstance(message, str):
        return Frame(Opcode.TEXT, message.encode())
    return Frame(Opcode.BINARY, message)


def _message(event: Any) -> Any:
    assert isinstance(event, Frame)
    if event.opcode is Opcode.TEXT:
        return bytes(event.data).decode()
    if event.opcode is Opcode.BINARY:
        return bytes(event.data)
    return Close.parse(event.data) if event.opcode is Opcode.CLOSE else event.opcode


def unused_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
