"""Visitors as asyncio streams, or served by any asyncio protocol, in the image of asyncio's own servers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.errors import ListenerClosed
from tunnel_asgi.pool import Standby, TunnelPool, adaptive_standby

__all__ = [
    "TunnelListener",
    "TunnelStreamReader",
    "create_tunnel_server",
    "start_tunnel_server",
]

STREAM_LIMIT = 64 * 1024  # bytes; a reader holds up to twice as many before the tunnel is paused, as in asyncio

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def create_tunnel_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    config: TunnelConfig,
    *,
    standby: Standby | None = None,
) -> TunnelPool:
    """Serve each visitor with a new protocol, as ``loop.create_server`` does. Returns once visitors can come.

    The result is an ``asyncio.AbstractServer``: ``close()``, ``wait_closed()``, ``async with``. ``standby``
    says how many WebSockets wait, given how many visitors are connected; by default 4 to 32.

    Raises:
        TunnelError: a failure that no retry can mend. One that a retry can mend is logged and waited out.
    """
    pool = TunnelPool(config, protocol_factory, standby=standby or adaptive_standby())
    try:
        await pool.start_serving()
        await pool.wait_ready()
    except BaseException:
        await pool.aclose()
        raise
    return pool


async def start_tunnel_server(
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    config: TunnelConfig,
    *,
    limit: int = STREAM_LIMIT,
    standby: Standby | None = None,
) -> TunnelPool:
    """Call ``client_connected_cb(reader, writer)`` for each visitor, as ``asyncio.start_server`` does.

    ``limit`` is the longest line in bytes that the reader takes. The writer's ``get_extra_info`` knows
    ``peername``, ``connection_id`` and ``domain``. Otherwise as ``create_tunnel_server``.
    """
    return await create_tunnel_server(lambda: _stream_protocol(client_connected_cb, limit), config, standby=standby)


class TunnelListener:
    """Accepts visitors one by one: as many WebSockets wait as there are pending ``accept()`` calls.

    A recycled WebSocket goes to whoever waits; one that nobody waits for is closed after 5 seconds. Use
    ``async with``, or ``close()`` and ``wait_closed()``; ``async for`` ends when the listener is closed.
    """

    def __init__(self, config: TunnelConfig, *, limit: int = STREAM_LIMIT) -> None:
        self.config = config
        self._limit = limit
        self._pool: TunnelPool | None = None
        self._pending: deque[asyncio.Future[Streams]] = deque()
        self._early: deque[Streams] = deque()
        self._closed = False

    async def accept(self) -> Streams:
        """Wait for a visitor; returns its reader and writer. Any number of calls may wait at once.

        Half-close is kept: ``read()`` gives b"" at the visitor's EOF while you may go on writing, and
        ``write_eof()`` leaves you reading. A visitor connection that failed is ``ConnectionResetError``, after
        the bytes that came before. Close the writer, or the visitor stays.

        Raises:
            ListenerClosed: the listener is closed.
            TunnelError: a failure that no retry can mend, such as a refused key.
        """
        if self._closed:
            raise ListenerClosed
        if self._early:
            return self._early.popleft()
        pool = self._pool = self._pool or self._make_pool()
        accepted: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
        self._pending.append(accepted)
        try:
            await pool.start_serving()
            return await self._first_of(accepted, pool)
        finally:
            self._forget(accepted)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Streams:
        try:
            return await self.accept()
        except ListenerClosed:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    def close(self) -> None:
        """Accept no more; pending ``accept()`` calls raise ``ListenerClosed``. Accepted visitors stay."""
        self._closed = True
        for _, writer in self._early:
            writer.close()
        self._early.clear()
        if self._pool is not None:
            self._pool.close()

    async def wait_closed(self) -> None:
        """Wait until the listener is closed and the last visitor's connection has ended."""
        if self._pool is not None:
            await self._pool.wait_closed()

    def _make_pool(self) -> TunnelPool:
        return TunnelPool(
            self.config,
            lambda: _stream_protocol(self._accepted, self._limit),
            standby=lambda visitors: len(self._pending),
        )

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while self._pending:
            waiter = self._pending.popleft()
            if not waiter.done():
                waiter.set_result((reader, writer))
                return
        self._early.append((reader, writer))  # its accept() was cancelled: the next one gets it

    async def _first_of(self, accepted: asyncio.Future[Streams], pool: TunnelPool) -> Streams:
        over = asyncio.ensure_future(pool.wait_over())
        either: set[asyncio.Future[Any]] = {accepted, over}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return accepted.result() if accepted.done() else over.result()
        finally:
            over.cancel()

    def _forget(self, accepted: asyncio.Future[Streams]) -> None:
        if accepted in self._pending:
            self._pending.remove(accepted)


class TunnelStreamReader(asyncio.StreamReader):
    """A stream reader that gives what came before a reset, and only then raises it.

    asyncio's own forgets unread bytes when the connection is reset; PROTOCOL.md lets DROP follow bytes that the
    visitor did send.
    """

    _reset: ConnectionResetError | None = None

    def set_exception(self, exc: Exception) -> None:
        if isinstance(exc, ConnectionResetError):
            self._reset = exc
            self.feed_eof()
        else:
            super().set_exception(exc)

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        if not data and n != 0:
            self._raise_reset()
        return data

    async def readexactly(self, n: int) -> bytes:
        try:
            return await super().readexactly(n)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                self._raise_reset()
            raise

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        try:
            return await super().readuntil(separator)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                self._raise_reset()
            raise

    def _raise_reset(self) -> None:
        if self._reset is not None:
            raise self._reset


def _stream_protocol(
    connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None], limit: int
) -> asyncio.StreamReaderProtocol:
    loop = asyncio.get_running_loop()
    reader = TunnelStreamReader(limit=limit, loop=loop)
    return asyncio.StreamReaderProtocol(reader, connected, loop=loop)
