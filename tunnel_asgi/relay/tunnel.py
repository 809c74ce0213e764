"""One WebSocket of a client, and the visitor it carries: the middle of the relay.

Two tasks meet here. The WebSocket's task (``run``) judges and passes on what the client sends; the visitor's task
(``carry``) sends the client what the visitor sends, and DROP when that connection fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.frames import CloseCode

from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.errors import ProtocolError
from tunnel_asgi.protocol import Data, Ended, ServerSide
from tunnel_asgi.relay.router import Router
from tunnel_asgi.relay.visitor import Rerouted, Visitor, VisitorLost
from tunnel_asgi.relay.wire import Wire

__all__ = ["Tunnel"]

RETAIN_LIMIT = 64 * 1024  # bytes kept for another WebSocket until the client's first byte

# Codes with which ``websockets`` itself fails a connection that breaks RFC 6455.
_BREACH_CODES = {CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_DATA, CloseCode.MESSAGE_TOO_BIG}
_GOOD_CODES = {CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY}

logger: logging.Logger = logging.getLogger("tunnel_asgi.relay")


class Tunnel:
    """An open WebSocket of a client. Tests read its state and call its fault verbs."""

    def __init__(
        self,
        ws: Wire,
        *,
        router: Router,
        blame: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self.domain: TunnelDomain = ws.domain
        self.visitor: Visitor | None = None
        """Whom it carries now; None while it waits."""
        self._ws = ws
        self._ws.on_lost = self._on_lost
        self._router = router
        self._blame = blame
        self._changed = changed
        self._side = ServerSide()
        self._spoke = False
        self._retained: bytearray | None = None
        self._gone = asyncio.Event()

    @property
    def state(self) -> str:
        """``waiting``; ``open`` with a visitor; ``ended`` until the client's RESET; ``closed``."""
        if self._gone.is_set():
            return "closed"
        if self.visitor is None:
            return "waiting"
        return "ended" if self._side.ended else "open"

    @property
    def address(self) -> tuple[str, int]:
        """The client's end of the TCP connection."""
        ip, port = self._ws.remote_address[:2]
        return ip, port

    # The fault verbs

    def cut(self) -> None:
        """Lose the TCP connection of this WebSocket: a reset, no close frame."""
        self._ws.cut()

    def stall(self) -> None:
        """Let the path go silent: nothing more is read from this WebSocket or written to it, not even a pong."""
        self._ws.stall()

    def unstall(self) -> None:
        """End ``stall``: what was held back goes out, in order."""
        self._ws.unstall()

    async def drop(self, reason: str) -> None:
        """Let the visitor connection fail: DROP to the client, a reset to the visitor.

        Raises:
            LocalProtocolError: no visitor is connected, or it was dropped already.
        """
        message = self._side.send_drop(reason)
        visitor = cast(Visitor, self.visitor)
        visitor.dropped = True
        visitor.abort()
        self._changed()
        await self._ws.send(message)

    async def send_raw(self, message: str | bytes) -> None:
        """Send any message, legal or not: what a hostile tunnel server would do."""
        await self._ws.send(message)

    async def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Close this WebSocket. It gets no visitor any more; the one it has is reset."""
        self._router.withdraw(self)
        await self._ws.close(code, reason)

    # Client to visitor: the WebSocket's task

    async def run(self) -> None:
        """Serve the WebSocket until it is closed."""
        self._router.offer(self)
        self._changed()
        try:
            async for message in self._ws:
                await self._receive(message)
        except ConnectionClosedError as error:
            self._judge_close(error)
        except ProtocolError as breach:
            await self._punish(str(breach))
        finally:
            self._router.withdraw(self)
            self._release()
            self._gone.set()

    async def _receive(self, message: str | bytes) -> None:
        side = self._side
        event = side.receive_text(message) if isinstance(message, str) else side.receive_binary(message)
        if event is None:
            return
        visitor = cast(Visitor, self.visitor)  # the protocol lets no event through without one
        if isinstance(event, Data):
            await self._pass_on(visitor, event.data)
        elif isinstance(event, Ended):
            self._end_answer(visitor)
        else:
            self._recycle(visitor)

    async def _pass_on(self, visitor: Visitor, data: bytes | bytearray) -> None:
        self._client_spoke()
        visitor.write(data)
        await visitor.drain()

    def _end_answer(self, visitor: Visitor) -> None:
        self._client_spoke()
        visitor.answered = True
        if self._side.ended:
            visitor.close()
        else:
            visitor.write_eof()
        self._changed()

    def _recycle(self, visitor: Visitor) -> None:
        logger.debug("%s: the client is ready for another visitor", visitor.id)
        self.visitor = None
        self._router.offer(self)
        self._changed()

    def _client_spoke(self) -> None:
        self._spoke = True
        self._retained = None

    async def _punish(self, reason: str) -> None:
        self._router.withdraw(self)
        self._record(reason)
        if self.visitor is not None:
            self.visitor.abort()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ws.close(CloseCode.PROTOCOL_ERROR, reason))
            # The client sees the reason only if we read on: unread bytes would turn the close into a reset.
            with suppress(ConnectionClosed):
                while True:
                    await self._ws.recv()

    def _judge_close(self, error: ConnectionClosedError) -> None:
        sent = error.sent
        if sent is not None and sent.code in _BREACH_CODES and not error.rcvd_then_sent:
            self._record(sent.reason)

    def _record(self, breach: str) -> None:
        whose = self.domain if self.visitor is None else self.visitor.id
        logger.warning("%s: the client broke the protocol: %s", whose, breach)
        self._blame(breach)

    def _on_lost(self) -> None:
        self._router.withdraw(self)
        # What the client sent before is still passed on, but a visitor who does not read cannot delay us for ever.
        if self.visitor is not None and self._spoke:
            self.visitor.expire()

    def _release(self) -> None:
        """The WebSocket is lost: with it goes its visitor, and no other (PROTOCOL.md 4.7)."""
        if self.visitor is None:
            return
        if self.visitor.answered:
            self.visitor.close()
        elif self._retained is not None and not self.visitor.dropped and self._client_closed_well:
            self.visitor.reroute(self._retained)
        else:
            self.visitor.abort()

    @property
    def _client_closed_well(self) -> bool:
        protocol = self._ws.protocol
        received = protocol.close_rcvd
        return received is not None and received.code in _GOOD_CODES and bool(protocol.close_rcvd_then_sent)

    # Visitor to client: the visitor's task

    def assign(self, visitor: Visitor) -> None:
        """Give it the visitor that ``carry`` will serve. Only a waiting tunnel may be assigned one."""
        self.visitor = visitor
        self._spoke = False
        self._retained = bytearray()
        visitor.rerouted = False
        self._changed()

    async def carry(self, visitor: Visitor) -> bool:
        """Serve the visitor until its connection is gone.

        Returns False if the WebSocket closed before its client took the visitor: another one may have it.
        """
        try:
            await self._pump(visitor)
        except VisitorLost as lost:
            await self._send_drop(visitor, str(lost))
            await visitor.wait_lost()
        except ConnectionClosed:
            await self._gone.wait()
            if not visitor.rerouted:
                await visitor.wait_lost()
        except Rerouted:
            pass
        return not visitor.rerouted

    async def _pump(self, visitor: Visitor) -> None:
        await self._ws.send(self._side.send_connect(visitor.ip, visitor.id))
        while data := await visitor.read():
            self._side.send_data()
            self._retain(data)
            await self._ws.send(data)
        eof = self._side.send_eof()
        if self._side.ended:
            visitor.close()
        self._changed()
        await self._ws.send(eof)
        await visitor.wait_lost()
        if not visitor.answered:
            raise VisitorLost(visitor.reason)

    async def _send_drop(self, visitor: Visitor, reason: str) -> None:
        if visitor.dropped or self._gone.is_set():
            return
        visitor.dropped = True
        message = self._side.send_drop(reason)
        self._changed()
        with suppress(ConnectionClosed):
            await self._ws.send(message)

    def _retain(self, data: bytes) -> None:
        if self._retained is None:
            return
        if len(self._retained) + len(data) > RETAIN_LIMIT:
            self._retained = None
        else:
            self._retained += data
