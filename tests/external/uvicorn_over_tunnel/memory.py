"""The visitor of a tunnel without a socket, for tests that drive an HTTP protocol by hand.

These tests never let the event loop turn: they hand bytes to a protocol, run one task of a mock loop and look at
what was written. A ``TunnelTransport`` can live like that, because all it asks of a loop is ``call_soon``. Below it
is a wire that moves both sides' protocol tables, and nothing else.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.lifespan.off import LifespanOff
from uvicorn.server import ServerState

from tunnel_asgi.guard import Timeouts, guarded
from tunnel_asgi.protocol import ClientSide, Connected, Data, Dropped, Ended, ServerSide
from tunnel_asgi.transport import TunnelTransport

from .server import PARSERS
from .streams import current

__all__ = ["get_connected_protocol"]


class ReadyLoop:
    """As much of an event loop as a transport needs; ``turn`` runs what is ready."""

    def __init__(self) -> None:
        self._ready: deque[Callable[[], object]] = deque()

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._ready.append(functools.partial(callback, *args))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise context["exception"]

    def turn(self) -> None:
        while self._ready:
            self._ready.popleft()()


class MemoryWire:
    """A WebSocket that is nothing but the rules of both its ends."""

    def __init__(self) -> None:
        self.client = ClientSide()
        self.server = ServerSide()
        self.received = bytearray()
        self.released = False
        self.writable = True
        self.buffered = 0

    def connect(self) -> Connected:
        event = self.client.receive_text(self.server.send_connect("127.0.0.1", "memory"))
        return cast(Connected, event)

    def send_data(self, data: bytes | memoryview) -> None:
        self.client.send_data()
        event = self.server.receive_binary(bytes(data))
        self.received += cast(Data, event).data

    def send_eof(self) -> None:
        self.server.receive_binary(self.client.send_eof())

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def release(self) -> None:
        self.released = True


class MemoryTransport(TunnelTransport):
    """A transport that can be asked what its visitor saw, in the words of the tests' own mock."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        current.memory += 1
        self.wire = MemoryWire()
        self.ready = ReadyLoop()
        extra = {"peername": (self.wire.connect().ip, 0), "sockname": ("127.0.0.1", 8000)}
        super().__init__(self.wire, protocol, extra=extra, loop=cast(asyncio.AbstractEventLoop, self.ready))
        self.start()

    # The visitor

    def visitor_sends(self, data: bytes) -> None:
        self.wire.server.send_data()
        event = self.wire.client.receive_binary(data)
        self.feed_data(cast(bytes, cast(Data, event).data))
        self.ready.turn()

    def visitor_ends(self) -> None:
        event = self.wire.client.receive_binary(self.wire.server.send_eof())
        assert isinstance(event, Ended)
        self.feed_eof()
        self.ready.turn()

    def visitor_fails(self) -> None:
        event = self.wire.client.receive_text(self.wire.server.send_drop("reset"))
        if not self.wire.released:
            self.feed_drop(cast(Dropped, event).reason)
        self.ready.turn()

    # What the mock offers to look at

    @property
    def buffer(self) -> bytes:
        self.ready.turn()
        return bytes(self.wire.received)

    def clear_buffer(self) -> None:
        self.ready.turn()
        self.wire.received.clear()

    @property
    def read_paused(self) -> bool:
        self.ready.turn()
        return not self.is_reading()


class VisitedProtocol:
    """The protocol as the tests see it: what they hand to it comes from the visitor, the rest is its own."""

    def __init__(self, protocol: asyncio.Protocol, transport: MemoryTransport) -> None:
        vars(self).update(_protocol=protocol, _transport=transport)

    def data_received(self, data: bytes) -> None:
        self._transport.visitor_sends(data)

    def eof_received(self) -> None:
        self._transport.visitor_ends()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport.visitor_fails()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._protocol, name, value)


def get_connected_protocol(
    app: Any, http_protocol_cls: type[asyncio.Protocol], lifespan: Any = None, **options: Any
) -> VisitedProtocol:
    """In place of the function of this name in ``tests/protocols/test_http.py``, with our parser and transport.

    The parser's deadlines are off: a mock loop has no clock.
    """
    config = uvicorn.Config(app=app, **options)
    protocol_class: Any = guarded(PARSERS[http_protocol_cls], Timeouts(0, 0, 0))
    protocol = protocol_class(
        config=config,
        server_state=ServerState(),
        app_state=(lifespan or LifespanOff(config)).state,
        _loop=importlib.import_module("tests.protocols.test_http").MockLoop(),
    )
    return VisitedProtocol(protocol, MemoryTransport(protocol))
