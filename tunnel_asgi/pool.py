"""The pool of waiting WebSockets, offered as an ``asyncio.AbstractServer``.

It decides one thing: how many WebSockets to dial now. Every change of state ends in ``_settle``, which decides
synchronously and then starts the dials. While the server is failing there is one dial at a time; after the
first success the door is wide open again (PROTOCOL.md 3).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from tunnel_asgi.auth import JwtManager
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.connection import TunnelConnection, dial
from tunnel_asgi.errors import ListenerClosed, TunnelError, UpgradeRefused, WebSocketError
from tunnel_asgi.protocol import Connected
from tunnel_asgi.transport import TunnelTransport

__all__ = ["MAX_STANDBY", "STANDBY", "Standby", "TunnelPool", "adaptive_standby", "backoff"]

logger: logging.Logger = logging.getLogger("tunnel_asgi")

Standby = Callable[[int], int]
"""How many WebSockets shall wait, given how many visitors are connected."""

STANDBY = 4  # WebSockets waiting when nobody is connected: a browser's first burst, nearly
MAX_STANDBY = 32  # WebSockets waiting, however many visitors there are
FIRST_DELAY = 1.0  # seconds before the second attempt [S]
DELAY_GROWTH = 1.5  # [S]
MAX_DELAY = 30.0  # seconds [S]
MAX_RETRY_AFTER = 15 * 60.0  # seconds; a server that asks for more is asked again all the same
PARALLEL_DIALS = 16  # at once; a burst of TLS handshakes would starve the visitors being served
SURPLUS_TIME = 5.0  # seconds a WebSocket nobody needs goes on waiting [S]
YOUNG = 5.0  # seconds; a WebSocket that fails sooner, unused, counts as a failed dial
ROOM_INTERVAL = 1.0  # seconds between two looks for an idle visitor, while every WebSocket is taken
FRUITLESS = 16  # WebSockets in a row that fail young with unanswered visitors only: from then on they count, too


def adaptive_standby(quiet: int = STANDBY) -> Standby:
    """As many WebSockets wait as visitors are connected, but at least ``quiet`` and at most 32."""
    return lambda visitors: max(quiet, min(visitors, MAX_STANDBY))


def backoff() -> Iterator[float]:
    """Seconds to wait after each failure in a row: 1 s growing by 1.5 to 30 s, each shortened by up to a half.

    The jitter keeps many processes from returning in step.
    """
    delay = FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311  (no secret depends on it)
        delay = min(delay * DELAY_GROWTH, MAX_DELAY)


class TunnelPool(asyncio.AbstractServer):
    """Keeps WebSockets waiting at the tunnel server and serves each visitor with a new protocol.

    ``protocol_factory`` makes one asyncio protocol per visitor. ``standby`` says how many WebSockets shall
    wait. ``extra`` is added to every transport's ``get_extra_info``.

    There are never more WebSockets than ``config.max_connections``. When all of them are taken, the visitor idle
    longest is closed to make room for another one. Idle is whose protocol says so: its attribute ``idle_since``, if
    it has one, is a time at which the visitor's last exchange was over, or None while one is under way.

    A retryable failure is logged once per change of state and retried for ever. Any other stops the pool
    from dialling: it is raised by ``wait_ready`` and kept in ``failure``; visitors already connected go on.
    """

    def __init__(
        self,
        config: TunnelConfig,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *,
        standby: Standby,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.failure: TunnelError | None = None
        self._protocol_factory = protocol_factory
        self._standby = standby
        self._extra = {"domain": str(config.tunnel_domain), **(extra or {})}
        self._ssl_context = config.make_ssl_context()
        self._jwt = JwtManager(config.access_key, config.tunnel_domain.customer_id)
        self._loop = asyncio.get_running_loop()

        self._waiting: dict[TunnelConnection, None] = {}  # oldest first
        self._busy: set[TunnelConnection] = set()  # with a visitor, or draining after one
        self._ending: set[TunnelConnection] = set()
        self._opened_at: dict[TunnelConnection, float] = {}
        self._visited: set[TunnelConnection] = set()
        self._fruitless = 0
        self._dials: set[asyncio.Task[None]] = set()

        self._failing = False
        self._outage = False  # the user has been told; lasts until the server has been answering for a while
        self._delays = backoff()
        self._retry_timer: asyncio.TimerHandle | None = None
        self._trim_timer: asyncio.TimerHandle | None = None
        self._room_timer: asyncio.TimerHandle | None = None
        self._steady_timer: asyncio.TimerHandle | None = None
        self._started = False
        self._closed = False
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<TunnelPool {self.config.domain} waiting={self.waiting} busy={self.busy}>"

    @property
    def waiting(self) -> int:
        """WebSockets that wait for a visitor."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """WebSockets with a visitor, or still draining after one."""
        return len(self._busy)

    # asyncio.AbstractServer

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def is_serving(self) -> bool:
        """Whether a visitor who comes now would be served."""
        return self._started and not self._closed and self.failure is None

    async def start_serving(self) -> None:
        """Begin to dial; returns at once. Idempotent."""
        self._started = True
        self._settle()

    async def serve_forever(self) -> None:
        """Serve until cancelled, then close.

        Raises:
            TunnelError: a failure that no retry can mend.
            ListenerClosed: the pool was closed.
        """
        try:
            await self.start_serving()
            await self.wait_over()
        finally:
            await self.aclose()

    def close(self) -> None:
        """Take no more visitors: dial no more, close what waits. Visitors already connected go on."""
        if self._closed:
            return
        self._closed = True
        self._stop_timers()
        for task in self._dials:
            task.cancel()
        for connection in [*self._waiting, *self._busy]:
            if connection.visitor is None:
                connection.close(1000)
        self._notify()

    def close_clients(self) -> None:
        """Close every visitor connection in good order, after what is written."""
        for connection in list(self._busy):
            if connection.visitor is not None:
                connection.visitor.close()

    def abort_clients(self) -> None:
        """Reset every visitor connection at once: its WebSocket is dropped."""
        for connection in list(self._busy):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until the pool is closed, the last visitor connection has ended, and no socket or task is left."""
        await self._wait_until(lambda: self._closed and not (self._busy or self._ending or self._dials))

    # What asyncio's servers lack.

    async def wait_ready(self) -> None:
        """Wait until a WebSocket waits or a visitor is served.

        Raises:
            TunnelError: a failure that no retry can mend.
            ListenerClosed: the pool was closed meanwhile.
        """
        await self._wait_until(lambda: bool(self._waiting or self._busy or self.failure or self._closed))
        self._raise_if_over()

    async def wait_over(self) -> NoReturn:
        """Wait until no further visitor can come.

        Raises:
            TunnelError: a failure that no retry can mend.
            ListenerClosed: the pool was closed.
        """
        await self._wait_until(lambda: self._closed or self.failure is not None)
        raise self.failure or ListenerClosed

    async def aclose(self, *, abort: bool = False) -> None:
        """Close at once: visitors still connected are reset. Returns when no socket or task is left.

        The server has 5 seconds to answer; with ``abort`` it is not even asked.
        """
        self.close()
        for connection in list(self._busy):
            connection.close(1001)
        if abort:
            for connection in list(self._ending):
                connection.abort()
        await asyncio.gather(*self._dials, return_exceptions=True)
        await self._wait_until(lambda: not (self._waiting or self._busy or self._ending))

    def settle(self) -> None:
        """Decide again: for when what ``standby`` answers has changed."""
        self._settle()

    # connection.Owner

    @property
    def accepting(self) -> bool:
        return not self._closed

    def connection_ready(self, connection: TunnelConnection) -> None:
        if self._closed:
            connection.close(1000)
            return
        self._answered()
        self._opened_at[connection] = self._loop.time()
        self._wait(connection)

    def visitor_connected(self, connection: TunnelConnection, visitor: Connected) -> TunnelTransport:
        self._waiting.pop(connection, None)
        peername = None if visitor.ip is None else (visitor.ip, 0)
        extra = {**self._extra, "peername": peername, "connection_id": visitor.connection_id}
        transport = TunnelTransport(connection, self._make_protocol(), extra=extra, loop=self._loop)
        self._busy.add(connection)
        self._visited.add(connection)
        self._loop.call_soon(self._settle)  # not now: the new protocol may change what standby answers
        return transport

    def connection_recycled(self, connection: TunnelConnection) -> None:
        self._busy.discard(connection)
        if connection.answered:
            self._fruitless = 0
        self._wait(connection)

    def connection_ending(self, connection: TunnelConnection, error: WebSocketError | None) -> None:
        self._waiting.pop(connection, None)
        self._busy.discard(connection)
        self._ending.add(connection)
        young = self._loop.time() - self._opened_at.pop(connection, -math.inf) < YOUNG
        if error is not None:
            logger.debug("a WebSocket ended: %s", error)
        if connection.answered:
            self._fruitless = 0
        elif error is not None and young:
            self._failed_young(error, unused=connection not in self._visited)
        self._visited.discard(connection)
        self._settle()
        self._notify()

    def connection_lost(self, connection: TunnelConnection) -> None:
        self._ending.discard(connection)
        self._settle()
        self._notify()

    # Deciding

    def _settle(self) -> None:
        if not self._started or self._closed or self.failure is not None:
            return
        for _ in range(self._dials_needed()):
            task = self._loop.create_task(self._dial())
            self._dials.add(task)
            task.add_done_callback(self._dialled)
        self._plan_trim()
        self._make_room()

    def _dials_needed(self) -> int:
        missing = self._target() - len(self._waiting) - len(self._dials)
        if self._retry_timer is not None:
            return 0
        at_once = 1 if self._failing else PARALLEL_DIALS
        return max(0, min(missing, at_once - len(self._dials)))

    def _target(self) -> int:
        occupied = len(self._busy) + len(self._ending)
        return min(self._standby(len(self._busy)), self.config.max_connections - occupied)

    def _wait(self, connection: TunnelConnection) -> None:
        self._waiting[connection] = None
        self._settle()
        self._notify()

    def _plan_trim(self) -> None:
        if self._trim_timer is None and len(self._waiting) > self._target():
            self._trim_timer = self._loop.call_later(SURPLUS_TIME, self._trim)

    def _trim(self) -> None:
        """Close the newest: the server hands a visitor to the oldest, who may be on the way already."""
        self._trim_timer = None
        surplus = len(self._waiting) - max(self._target(), 0)
        newest_first = list(reversed(self._waiting))
        for connection in newest_first[: max(surplus, 0)]:
            connection.close(1000)

    def _make_room(self) -> None:
        if not self._is_full():
            return
        if self._room_timer is None:
            self._room_timer = self._loop.call_later(ROOM_INTERVAL, self._look_for_room)
        visitor = self._longest_idle()
        if visitor is not None:
            visitor.close()

    def _look_for_room(self) -> None:
        self._room_timer = None
        self._settle()

    def _is_full(self) -> bool:
        """Whether a visitor who comes now finds no WebSocket, and none may be dialled."""
        occupied = len(self._busy) + len(self._ending)
        wanted = self._standby(len(self._busy)) > 0
        return wanted and not self._waiting and occupied >= self.config.max_connections

    def _longest_idle(self) -> TunnelTransport | None:
        visitors = [c.visitor for c in self._busy if c.visitor is not None and not c.visitor.is_closing()]
        since = {visitor: getattr(visitor.get_protocol(), "idle_since", None) for visitor in visitors}
        idle = {visitor: at for visitor, at in since.items() if at is not None}
        return min(idle, key=idle.__getitem__, default=None)

    # Visitors

    def _make_protocol(self) -> asyncio.BaseProtocol:
        try:
            return self._protocol_factory()
        except Exception as error:
            self._loop.call_exception_handler({"message": "No protocol for a visitor", "exception": error})
            return _HangUp()

    # Dialling

    async def _dial(self) -> None:
        await dial(self.config, self._jwt, self._ssl_context, self)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dials.discard(task)
        if not task.cancelled():
            error = task.exception()
            if isinstance(error, TunnelError):
                self._failed(error)
            elif error is not None:
                self.failure = TunnelError(f"dialling failed: {error!r}")
                self.failure.__cause__ = error
        self._settle()
        self._notify()

    def _failed_young(self, error: WebSocketError, *, unused: bool) -> None:
        """A server that accepts and then fails must not be dialled again at the speed of the network.

        One that ends the WebSocket after each visitor is, if those visitors were answered: it may be poor, not hostile.
        """
        self._fruitless += 1
        if unused or self._fruitless > FRUITLESS:
            self._failed(error)

    def _failed(self, error: TunnelError) -> None:
        self._failing = True
        if self._steady_timer is not None:
            self._steady_timer.cancel()
        if not error.retryable:
            self.failure = error
        elif not self._closed:
            self._announce(error)
            self._plan_retry(error)

    def _announce(self, error: TunnelError) -> None:
        if not self._outage:
            self._outage = True
            logger.warning("%s; trying again until it answers", error)

    def _plan_retry(self, error: TunnelError) -> None:
        if self._retry_timer is not None:
            return
        delay = next(self._delays)
        if isinstance(error, UpgradeRefused) and error.retry_after is not None:
            delay += min(error.retry_after, MAX_RETRY_AFTER)  # still with jitter: others were told the same
        logger.debug("next dial in %.1f s: %s", delay, error)
        self._retry_timer = self._loop.call_later(delay, self._retry)

    def _retry(self) -> None:
        self._retry_timer = None
        self._settle()

    def _answered(self) -> None:
        # While the retry is planned, whoever succeeds was dialled before the failure, and proves nothing.
        if self._failing and self._retry_timer is None:
            self._failing = False
            self._steady_timer = self._loop.call_later(YOUNG, self._steady)

    def _steady(self) -> None:
        self._outage = False
        self._delays = backoff()
        logger.info("the tunnel server answers again")

    def _stop_timers(self) -> None:
        for timer in (self._retry_timer, self._trim_timer, self._room_timer, self._steady_timer):
            if timer is not None:
                timer.cancel()

    # Waiting for a change of state

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait_until(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            waiter = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _raise_if_over(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._closed:
            raise ListenerClosed


class _HangUp(asyncio.Protocol):
    """Stands in for a protocol that could not be made: ends the visitor's connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
