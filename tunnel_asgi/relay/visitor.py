"""One visitor connection: its bytes are pulled, what goes back is pushed and drained. Both buffers are bounded."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Callable
from typing import cast

from tunnel_asgi.relay.tcp import reset

__all__ = ["Rerouted", "Visitor", "VisitorLost"]

CHUNK = 64 * 1024  # bytes handed on at once
BUFFER_LIMIT = 64 * 1024  # bytes; past it, in either direction, the faster side has to wait
LINGER = 60.0  # seconds a visitor gets to take what was written before the connection was closed
HANDSHAKE_TIMEOUT = 10.0  # seconds for TLS


class VisitorLost(Exception):
    """The visitor connection failed. ``str()`` is one line saying how."""


class Rerouted(Exception):
    """The WebSocket closed before its client took the visitor: another one may have it."""


class Visitor(asyncio.Protocol):
    """A TCP or TLS connection to the visitors' port. One task reads it, another one writes to it."""

    def __init__(self, connected: Callable[[Visitor], None]) -> None:
        self._connected = connected
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._eof = False
        self._secure = False
        self._handshaking = False
        self._reading_paused = False
        self._writing_paused = False
        self._closing = False
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drain_waiter: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport
        self.id: str = secrets.token_hex(6)
        """Names the connection in CONNECT and in logs."""
        self.ip: str = ""
        self.lost: bool = False
        """The connection is gone, and its socket closed."""
        self.answered = False
        """The client ended its direction in good order."""
        self.dropped = False
        """The client was sent DROP."""
        self.rerouted: bool = False
        """Another WebSocket is to have this visitor."""

    # What asyncio tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=BUFFER_LIMIT)
        self.ip = transport.get_extra_info("peername")[0]
        self._connected(self)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._buffer += data
        self._limit_reading()
        self.wake()

    def eof_received(self) -> bool:
        self._eof = True
        self.wake()
        return not self._secure  # TLS has no half-close: asyncio closes the connection

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if exc is not None or not self._eof:
            self._fail("the visitor's connection was reset")
        if self._deadline is not None:
            self._deadline.cancel()
        self.resume_writing()
        self.wake()

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)

    # Towards the tunnel

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Speak TLS from here on. The connection is unusable after an error.

        Raises:
            OSError: the handshake failed or took too long.
        """
        self._secure = self._handshaking = True
        plain = self.transport
        try:
            secure = await self._loop.start_tls(
                plain,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=LINGER,
            )
        except BaseException:
            # asyncio does not tell us the end of a connection whose handshake never did.
            plain.abort()
            self.lost = True
            raise
        self.transport = cast(asyncio.Transport, secure)
        self.transport.set_write_buffer_limits(high=BUFFER_LIMIT)
        self._handshaking = False
        self._limit_reading()

    async def peek_until(self, mark: bytes, limit: int) -> bytes | None:
        """The bytes up to and with ``mark``, which stay unread; None if it is not among the first ``limit`` bytes.

        Raises:
            VisitorLost: it ended or failed before that.
        """
        while (end := self._buffer.find(mark, 0, limit)) < 0:
            if len(self._buffer) >= limit:
                return None
            self._raise_if_over()
            if self._eof:
                raise VisitorLost("the visitor left before its request was complete")
            await self.event()
        return bytes(self._buffer[: end + len(mark)])

    async def read(self) -> bytes:
        """The next bytes, or none once the visitor has ended its direction.

        Raises:
            VisitorLost, Rerouted
        """
        while not self._buffer and not self._eof:
            self._raise_if_over()
            await self.event()
        self._raise_if_over()
        data = bytes(self._buffer[:CHUNK])
        del self._buffer[:CHUNK]
        self._resume_reading()
        return data

    async def wait_lost(self) -> None:
        """Until the connection is gone.

        Raises:
            Rerouted
        """
        while not self.lost:
            if self.rerouted:
                raise Rerouted
            await self.event()

    async def event(self) -> None:
        """Until something happens to this connection. Only the task that reads it may wait here."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Let the task that reads this connection look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def reroute(self, unread: bytes | bytearray) -> None:
        """Take back what the last client was sent and never answered."""
        self._buffer[:0] = unread
        self.rerouted = True
        self.wake()

    @property
    def reason(self) -> str:
        """How the connection ended."""
        return self._failure or "the visitor is gone"

    @property
    def gone(self) -> bool:
        """Nobody is there to be served: the connection failed, or ended without a single byte."""
        return self.lost or self._failure is not None or (self._eof and not self._buffer)

    # Towards the visitor

    def write(self, data: bytes | bytearray) -> None:
        """Send bytes; dropped silently if the connection is gone."""
        if not self._over and not self.transport.is_closing():  # it may have failed, and we be told only next
            self.transport.write(data)

    async def drain(self) -> None:
        """Until little enough of what was written is left, or the connection is gone."""
        while self._writing_paused and not self._over:
            self._drain_waiter = self._loop.create_future()
            try:
                await self._drain_waiter
            finally:
                self._drain_waiter = None

    def write_eof(self) -> None:
        """End our direction. With TLS, which has no half-close, close."""
        if self._over:
            return
        if self._secure:
            self.close()
            return
        try:
            self.transport.write_eof()
        except OSError:  # reset by the visitor, which asyncio cannot see while reading is paused
            self.abort()

    def close(self) -> None:
        """Close once everything is written, or after LINGER seconds. Whatever still arrives is discarded."""
        if self._over:
            return
        self._closing = True
        self._eof = True
        self.expire()
        self.transport.close()
        self.wake()

    def expire(self) -> None:
        """Abort after LINGER seconds unless the connection is gone by then."""
        if self._deadline is None and not self.lost:
            self._deadline = self._loop.call_later(LINGER, self.abort)

    def abort(self) -> None:
        """Reset the connection: the visitor sees an error, never a good end."""
        if self.lost:
            return
        self.rerouted = False
        self._fail("the connection was aborted")
        reset(self.transport)
        self.resume_writing()
        self.wake()

    # Shared

    @property
    def _over(self) -> bool:
        return self.lost or self._closing or self._failure is not None

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason

    def _raise_if_over(self) -> None:
        if self.rerouted:
            raise Rerouted
        if self._failure is not None:
            raise VisitorLost(self._failure)

    def _resume_reading(self) -> None:
        if self._reading_paused and not self._closing and len(self._buffer) < BUFFER_LIMIT:
            self._reading_paused = False
            self.transport.resume_reading()

    def _limit_reading(self) -> None:
        if not self._handshaking and not self._reading_paused and len(self._buffer) >= BUFFER_LIMIT:
            self._reading_paused = True
            self.transport.pause_reading()
