"""Visitors as asyncio streams, or served by any asyncio protocol, in the image of asyncio's own servers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, cast

from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.errors import ListenerClosed, TunnelError
from tunnel_asgi.pool import Standby, TunnelPool, adaptive_standby

__all__ = [
    "TunnelListener",
    "TunnelStreamReader",
    "create_tunnel_server",
    "start_tunnel_server",
]

STREAM_LIMIT = 64 * 1024  # bytes; a reader holds up to twice as many before the tunnel is paused, as in asyncio

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
ConnectedCallback = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


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
    client_connected_cb: ConnectedCallback,
    config: TunnelConfig,
    *,
    limit: int = STREAM_LIMIT,
    standby: Standby | None = None,
) -> TunnelPool:
    """Call ``client_connected_cb(reader, writer)`` for each visitor, as ``asyncio.start_server`` does.

    ``limit`` is the longest line in bytes that the reader takes. The writer's ``get_extra_info`` knows
    ``peername``, ``connection_id`` and ``domain``. Otherwise as ``create_tunnel_server``.
    """
    return await create_tunnel_server(lambda: stream_protocol(client_connected_cb, limit), config, standby=standby)


class TunnelListener:
    """Accepts visitors one by one: as many WebSockets wait as there are pending ``accept()`` calls.

    A recycled WebSocket goes to whoever waits; one that nobody waits for is closed after 5 seconds. May be made
    before there is an event loop, and then belongs to the loop of the first ``accept()``.

    Use ``async with``, or ``close()`` and ``wait_closed()``. Leaving the block in good order waits for the visitors
    accepted; leaving it by an exception resets them. ``async for`` ends when the listener is closed.
    """

    def __init__(self, config: TunnelConfig, *, limit: int = STREAM_LIMIT) -> None:
        self.config = config
        self._limit = limit
        self._pool: TunnelPool | None = None
        self._watch: asyncio.Task[None] | None = None
        self._pending: deque[asyncio.Future[Streams]] = deque()
        self._early: deque[Streams] = deque()
        self._closing = asyncio.Event()

    async def accept(self) -> Streams:
        """Wait for a visitor; returns its reader and writer. Any number of calls may wait at once.

        Half-close is kept: ``read()`` gives b"" at the visitor's EOF while you may go on writing, and
        ``write_eof()`` leaves you reading. A visitor connection that failed is ``ConnectionResetError``, after
        the bytes that came before. Close the writer, or the visitor stays.

        Raises:
            ListenerClosed: the listener is closed.
            TunnelError: a failure that no retry can mend, such as a refused key. Every pending call raises it, and
                every later one. A failure that a retry can mend is logged and waited out.
        """
        if self._closing.is_set():
            raise ListenerClosed
        if self._early:
            return self._early.popleft()
        pool = await self._open()
        if pool.failure is not None:
            raise pool.failure
        accepted: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
        self._pending.append(accepted)
        try:
            pool.settle()
            return await accepted
        except asyncio.CancelledError:
            self._give_back(accepted)
            raise
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
        if kind is not None and self._pool is not None:
            await self._pool.aclose()
        await self.wait_closed()

    def close(self) -> None:
        """Accept no more; pending ``accept()`` calls raise ``ListenerClosed``. Accepted visitors stay."""
        self._closing.set()
        for _, writer in self._early:
            writer.close()
        self._early.clear()
        self._fail_pending(ListenerClosed())
        if self._pool is not None:
            self._pool.close()

    async def wait_closed(self) -> None:
        """Wait until the listener is closed and the last visitor's connection has ended."""
        await self._closing.wait()
        if self._pool is None or self._watch is None:
            return
        await self._pool.wait_closed()
        await asyncio.wait({self._watch})

    async def _open(self) -> TunnelPool:
        if self._pool is None:
            self._pool = TunnelPool(
                self.config,
                lambda: stream_protocol(self._hand_over, self._limit),
                standby=lambda visitors: len(self._pending),
            )
            self._watch = asyncio.get_running_loop().create_task(self._watch_over(self._pool))
            await self._pool.start_serving()
        return self._pool

    async def _watch_over(self, pool: TunnelPool) -> None:
        try:
            await pool.wait_over()
        except TunnelError as error:
            self._fail_pending(error)

    def _fail_pending(self, error: TunnelError) -> None:
        for waiter in self._pending:
            if not waiter.done():
                waiter.set_exception(error)

    def _hand_over(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand a visitor to the call that has waited longest; if none waits, the next one gets it."""
        while self._pending:
            waiter = self._pending.popleft()
            if not waiter.done():
                waiter.set_result((reader, writer))
                return
        if self._closing.is_set():
            writer.close()
        else:
            self._early.append((reader, writer))

    def _give_back(self, accepted: asyncio.Future[Streams]) -> None:
        """The call was cancelled; if its visitor had come at the same moment, another call gets it."""
        if accepted.done() and not accepted.cancelled() and accepted.exception() is None:
            self._hand_over(*accepted.result())

    def _forget(self, accepted: asyncio.Future[Streams]) -> None:
        if accepted in self._pending:
            self._pending.remove(accepted)
            cast(TunnelPool, self._pool).settle()


class TunnelStreamReader(asyncio.StreamReader):
    """A stream reader that gives the bytes that came before a failure, and only then raises it.

    asyncio's own forgets unread bytes when the connection is reset; PROTOCOL.md 4 lets DROP follow bytes that the
    visitor did send. Whoever asks for more than came is told so in asyncio's way: ``readexactly`` and ``readuntil``
    raise ``IncompleteReadError`` with the rest, ``readline`` returns the rest, and the next call raises the failure.
    ``read()`` of everything up to the end raises it at once, for there was no end. An EOF that came before the
    failure stays an EOF.
    """

    _ended = False
    _failure: Exception | None = None
    _cut_short: Exception | None = None

    def exception(self) -> Exception | None:
        return self._failure

    def set_exception(self, exc: Exception) -> None:
        self._failure = exc
        if not self._ended:
            self._cut_short = exc
            self.feed_eof()

    def feed_eof(self) -> None:
        self._ended = True
        super().feed_eof()

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        if not data and n != 0:
            self._raise_if_cut_short()
        return data

    async def readexactly(self, n: int) -> bytes:
        try:
            return await super().readexactly(n)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                self._raise_if_cut_short()
            raise

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        try:
            return await super().readuntil(separator)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                self._raise_if_cut_short()
            raise

    def _raise_if_cut_short(self) -> None:
        if self._cut_short is not None:
            raise self._cut_short


class _StreamProtocol(asyncio.StreamReaderProtocol):
    """asyncio's, which would log how the connection ended, if nobody awaits ``wait_closed()``."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if exc is not None:
            self._get_close_waiter(None).exception()  # type: ignore[attr-defined]  # reader and writer tell it


def stream_protocol(connected: ConnectedCallback | None, limit: int) -> asyncio.StreamReaderProtocol:
    loop = asyncio.get_running_loop()
    reader = TunnelStreamReader(limit=limit, loop=loop)
    return _StreamProtocol(reader, connected, loop=loop)
