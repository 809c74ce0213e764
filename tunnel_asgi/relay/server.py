"""The relay's two ports and everything that runs behind them."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Self, cast

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.errors import InvalidDomain
from tunnel_asgi.relay.faults import DialFaults
from tunnel_asgi.relay.head import END_OF_HEAD, MAX_HEAD, Refused, find_host, plain_answer
from tunnel_asgi.relay.router import Router
from tunnel_asgi.relay.tcp import explain_listen_errors, netloc
from tunnel_asgi.relay.tokens import TokenChecker
from tunnel_asgi.relay.tunnel import Tunnel
from tunnel_asgi.relay.visitor import Visitor, VisitorLost
from tunnel_asgi.relay.wire import Wire

__all__ = ["Relay"]

PATH = "/tunnels"
HTTP_SERVICE = "www"  # the service whose visitors understand an HTTP answer (PROTOCOL.md 2)
RETRY_AFTER = 5  # seconds, for visitors nobody took
BACKLOG = 1024  # visitors not accepted yet; past it the system resets some (asyncio's default is 100)
MAX_MESSAGE_SIZE = 16 * 1024 * 1024  # bytes; "a message may be many megabytes" (PROTOCOL.md 4.9)
MAX_QUEUE = 4  # frames read ahead of a visitor who is slow
DIAL_TIMEOUT = 60.0  # seconds for an upgrade; long, so that hang() outlasts the client's own limit
CLOSE_TIMEOUT = 2.0  # seconds for the closing handshake; nothing is lost with it
PING_INTERVAL = 20.0  # seconds
DISCARD_TIMEOUT = 2.0  # seconds a visitor gets to read the relay's own answer

logger: logging.Logger = logging.getLogger("tunnel_asgi.relay")

# Never registered, never enabled: websockets logs the Authorization header at DEBUG.
_silent_logger = logging.Logger("tunnel_asgi.relay.websocket", level=logging.CRITICAL + 1)


class Relay(DialFaults):
    """A tunnel server for this machine, an async context manager.

    ``keys`` is ``{customer id: {key id: secret}}``. With ``domain`` every visitor goes there and is never read;
    without it the Host header decides. ``ssl`` is TLS towards visitors; clients always dial plain ``ws://``.
    ``hold_timeout`` and ``head_timeout`` are seconds, ``clock`` gives those since the epoch.

    It judges clients strictly: whatever PROTOCOL.md 4 does not allow is recorded in ``violations`` and closes
    the WebSocket with 1002.
    """

    def __init__(
        self,
        *,
        keys: Mapping[str, Mapping[str, str]],
        domain: TunnelDomain | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tunnel_port: int = 0,
        ssl: ssl.SSLContext | None = None,
        hold_timeout: float = 10.0,
        head_timeout: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.port: int = port
        """The visitors' port, known after the start."""
        self.url: str = ""
        """What visitors open."""
        self.server_url: str = ""
        """What clients dial: the ``server_url`` of a TunnelConfig."""
        self.tunnels: list[Tunnel] = []
        """Every open WebSocket of a client, oldest first."""
        self.violations: list[str] = []
        """Every breach of the protocol by a client, as it was told."""
        self.dials: int = 0
        """Upgrades attempted."""
        self.refused: int = 0
        """Upgrades answered with an HTTP status."""
        self.visitors_served: int = 0
        """Visitors that a client had and that are gone again, however it ended."""
        self._domain = domain
        self._host = host
        self._tunnel_port = tunnel_port
        self._ssl = ssl
        self._head_timeout = head_timeout
        self._clock = clock
        self._tokens = TokenChecker(keys, clock)
        self._router = Router(hold_timeout, self._changed)
        self._watchers: list[tuple[Callable[[Relay], bool], asyncio.Future[None]]] = []
        self._visitor_tasks: set[asyncio.Task[None]] = set()
        self._wires: set[Wire] = set()
        self._closed = False
        self._closing = AsyncExitStack()

    @property
    def held(self) -> int:
        """Visitors for whom no WebSocket waits yet."""
        return self._router.held

    # Life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Open both ports.

        Raises:
            RelayFailed: one of them is taken, or the host is none of this machine.
        """
        try:
            await self._listen_for_clients()
            await self._listen_for_visitors()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Reset every visitor, close every WebSocket with 1001, and wait until all of it is over. Idempotent."""
        self._closed = True
        self._end_dial_faults()
        await self._closing.aclose()

    async def _listen_for_clients(self) -> None:
        with explain_listen_errors(self._host, self._tunnel_port, "--tunnel-port"):
            server = await serve(
                self._serve_client,
                self._host,
                self._tunnel_port,
                process_request=self._answer_dial,
                # Any callable will do, though it is annotated as a class.
                create_connection=cast(type[ServerConnection], partial(Wire, self._wires)),
                compression=None,
                max_size=MAX_MESSAGE_SIZE,
                max_queue=MAX_QUEUE,
                open_timeout=DIAL_TIMEOUT,
                close_timeout=CLOSE_TIMEOUT,
                # Pings make TCP notice a dead peer. No pong is demanded: none can be read while a slow visitor
                # holds up the client's bytes.
                ping_interval=PING_INTERVAL,
                ping_timeout=None,
                logger=_silent_logger,
            )
        self._closing.push_async_callback(self._close_clients, server)
        self.server_url = f"ws://{netloc(server.sockets)}{PATH}"

    async def _listen_for_visitors(self) -> None:
        loop = asyncio.get_running_loop()
        with explain_listen_errors(self._host, self.port, "--port"):
            server = await loop.create_server(
                lambda: Visitor(self._visitor_connected), self._host, self.port, backlog=BACKLOG
            )
        self._closing.push_async_callback(self._close_visitors, server)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._ssl else 'http'}://{netloc(server.sockets)}"

    async def _close_clients(self, server: Server) -> None:
        server.close(code=CloseCode.GOING_AWAY, reason="the relay is closing")
        for wire in tuple(self._wires):
            wire.give_up()
        await server.wait_closed()

    async def _close_visitors(self, server: asyncio.Server) -> None:
        server.close()
        for task in self._visitor_tasks:
            task.cancel()
        await asyncio.gather(*self._visitor_tasks, return_exceptions=True)
        await server.wait_closed()

    # What tests wait for

    async def wait_until(self, predicate: Callable[[Relay], bool]) -> None:
        """Until the predicate is true.

        It is asked now and within every change of state, so that no state is missed, however short. The state may
        have changed again when this returns.
        """
        if predicate(self):
            return
        watcher = (predicate, asyncio.get_running_loop().create_future())
        self._watchers.append(watcher)
        try:
            await watcher[1]
        finally:
            self._watchers.remove(watcher)

    async def wait_for_waiting(self, n: int = 1, domain: TunnelDomain | None = None) -> None:
        """Until at least ``n`` WebSockets wait for a visitor (of this domain, or of any)."""

        def enough(relay: Relay) -> bool:
            waiting = [tunnel for tunnel in relay.tunnels if tunnel.state == "waiting"]
            return len([tunnel for tunnel in waiting if domain in (None, tunnel.domain)]) >= n

        await self.wait_until(enough)

    def _changed(self) -> None:
        for predicate, reached in self._watchers:
            if reached.done():
                continue
            try:
                if predicate(self):
                    reached.set_result(None)
            except Exception as error:  # it belongs to whoever waits, not to us
                reached.set_exception(error)

    # Clients

    async def _answer_dial(self, ws: ServerConnection, request: Request) -> Response | None:
        """None to open the WebSocket, else how to refuse it."""
        self.dials += 1
        self._changed()
        try:
            with _report_failure("a dial", expected=Refused):
                await self._dial_fault()
                if self._closed:
                    raise Refused(503, "the relay is closing")
                cast(Wire, ws).domain = self._judge_dial(request)
        except Refused as refused:
            return self._refuse_dial(refused)
        return None

    def _judge_dial(self, request: Request) -> TunnelDomain:
        path, _, name = request.path.rpartition("/")
        if path != PATH:
            raise Refused(404, f"expected {PATH}/<domain>")
        try:
            domain = TunnelDomain.parse(name, suffix=None)
        except InvalidDomain:
            raise Refused(400, "the path does not end in a tunnel domain") from None
        self._tokens.check(request.headers.get_all("Authorization"), domain.customer_id)
        return domain

    def _refuse_dial(self, refused: Refused) -> Response:
        self.refused += 1
        self._changed()
        logger.debug("a dial was refused with %d: %s", refused.status, refused.reason)
        body = f"{refused.reason}\n".encode()
        fields = {
            "Date": email.utils.formatdate(self._clock(), usegmt=True),
            "Connection": "close",
            "Content-Length": str(len(body)),
            "Content-Type": "text/plain; charset=utf-8",
        } | dict(refused.headers)
        return Response(refused.status, refused.phrase, Headers(fields), body)

    async def _serve_client(self, ws: ServerConnection) -> None:
        tunnel = Tunnel(cast(Wire, ws), router=self._router, blame=self._blame, changed=self._changed)
        self.tunnels.append(tunnel)
        logger.debug("a client connected for %s", tunnel.domain)
        try:
            with _report_failure("a client's WebSocket"):
                await tunnel.run()
        finally:
            self.tunnels.remove(tunnel)
            logger.debug("a client of %s disconnected", tunnel.domain)
            self._changed()

    def _blame(self, reason: str) -> None:
        self.violations.append(reason)
        self._changed()

    # Visitors

    def _visitor_connected(self, visitor: Visitor) -> None:
        if self._closed:  # accepted before the port was closed
            visitor.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve_visitor(visitor))
        self._visitor_tasks.add(task)
        task.add_done_callback(self._visitor_done)
        task.add_done_callback(lambda _: visitor.abort())  # cancelled before it began, it has closed nothing

    def _visitor_done(self, task: asyncio.Task[None]) -> None:
        self._visitor_tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("serving a visitor failed", exc_info=task.exception())

    async def _serve_visitor(self, visitor: Visitor) -> None:
        logger.debug("%s: a visitor connected", visitor.id)
        try:
            if self._ssl is not None:
                await visitor.start_tls(self._ssl)
            await self._find_tunnel(visitor)
        except Refused as refused:
            await self._answer(visitor, refused)
        except (OSError, VisitorLost) as error:
            logger.debug("%s: the visitor failed: %s", visitor.id, error)
        finally:
            visitor.abort()
            await visitor.wait_lost()
            logger.debug("%s: the visitor is gone", visitor.id)

    async def _find_tunnel(self, visitor: Visitor) -> None:
        """Let tunnels carry the visitor until one of them took it."""
        domain = self._domain or await self._read_domain(visitor)
        taken = False
        while not taken:
            if self._domain is None and not self._is_connected(domain):
                raise Refused(404, f"no tunnel is connected for {domain}")
            tunnel = await self._router.route(visitor, domain)
            if tunnel is None:
                self._turn_away(visitor, domain)
                return
            logger.debug("%s: the visitor goes to a client of %s", visitor.id, domain)
            taken = await tunnel.carry(visitor)
        self.visitors_served += 1
        self._changed()

    async def _read_domain(self, visitor: Visitor) -> TunnelDomain:
        """Where the Host header leads. Nothing is consumed: the client gets the head as it came."""
        try:
            async with asyncio.timeout(self._head_timeout):
                head = await visitor.peek_until(END_OF_HEAD, MAX_HEAD)
        except TimeoutError:
            raise Refused(408, "the request head took too long") from None
        if head is None:
            raise Refused(431, "the request head is too large")
        try:
            return TunnelDomain.parse(find_host(head), suffix=None)
        except InvalidDomain:
            raise Refused(404, "this name has no tunnel") from None

    def _is_connected(self, domain: TunnelDomain) -> bool:
        return any(tunnel.domain == domain for tunnel in self.tunnels)

    def _turn_away(self, visitor: Visitor, domain: TunnelDomain) -> None:
        """The visitor was held long enough. What does not speak HTTP gets no answer but the end."""
        visitor.rerouted = False  # no other WebSocket will have it, so its request may be read here
        if visitor.gone:
            logger.debug("%s: the visitor left while it was held", visitor.id)
        elif domain.service != HTTP_SERVICE:
            logger.debug("%s: no client took the visitor", visitor.id)
        elif not self._is_connected(domain):
            raise Refused(502, f"no tunnel is connected for {domain}")
        else:
            raise Refused(503, f"every tunnel of {domain} is busy", {"Retry-After": str(RETRY_AFTER)})

    async def _answer(self, visitor: Visitor, refused: Refused) -> None:
        """Answer a visitor ourselves and close."""
        logger.debug("%s: the visitor is answered %d: %s", visitor.id, refused.status, refused.reason)
        visitor.write(plain_answer(refused))
        visitor.write_eof()
        # A close over unread bytes is a reset, which could overtake the answer.
        with suppress(TimeoutError, VisitorLost):
            async with asyncio.timeout(DISCARD_TIMEOUT):
                while await visitor.read():
                    pass
        visitor.close()
        await visitor.wait_lost()


@contextmanager
def _report_failure(what: str, expected: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Log our own bugs: websockets would report them to the logger nobody reads."""
    try:
        yield
    except expected:
        raise
    except Exception:
        logger.exception("serving %s failed", what)
        raise
