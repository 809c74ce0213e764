"""The WebSocket of one client as ``websockets`` sees it, plus the one fault that must sit below it: silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.relay.tcp import reset

__all__ = ["Wire"]


class Wire(ServerConnection):
    """A server connection that can go silent: nothing is read, nothing written, no ping and no pong."""

    domain: TunnelDomain
    """The name it was dialled for; set when the upgrade is accepted."""

    def __init__(self, wires: set[Wire], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._wires = wires  # it is in this set while its TCP connection is open
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.on_lost: Callable[[], None] = lambda: None
        """Called once, when the TCP connection is gone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wires.add(self)
        self.recv_messages.resume = self._resume_reading

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wires.discard(self)
        self._flowing.set()
        self.on_lost()

    def send_data(self) -> None:
        if self._flowing.is_set():
            super().send_data()

    async def drain(self) -> None:
        await self._flowing.wait()
        await super().drain()

    def stall(self) -> None:
        """Go silent. What was read or written before is not taken back."""
        if self._lost:
            return
        self._flowing.clear()
        self.transport.pause_reading()

    def unstall(self) -> None:
        """Send what was held back and read again."""
        if self._lost:
            return
        self._flowing.set()
        self.send_data()
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def cut(self) -> None:
        """Lose the TCP connection with a reset; no close frame."""
        if not self._lost:
            reset(self.transport)

    def give_up(self) -> None:
        """End at once what no closing handshake can end: an upgrade not yet answered, a silent path."""
        if self.state is State.CONNECTING or not self._flowing.is_set():
            self.transport.abort()

    @property
    def _lost(self) -> bool:
        return self.connection_lost_waiter.done()

    def _resume_reading(self) -> None:
        if self._flowing.is_set():
            self.transport.resume_reading()
