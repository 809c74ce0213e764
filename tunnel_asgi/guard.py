"""uvicorn's protocols, made fit to face the internet bare.

Behind nginx uvicorn need not judge a request head or count seconds; here the visitor's bytes arrive raw. Both
parsers get the same rules (those of ``strict``) and a deadline for everything a visitor can be slow with. A breach is
answered with a 4xx where one can still be sent, and the connection is closed. Requests that came before it on the
same connection get their answers first.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from tunnel_asgi.strict import FRAMING_LIMIT, HEAD_LIMIT, BadRequest, StrictConnection, check_head, declared_length

__all__ = ["GuardedH11Protocol", "Timeouts", "guarded", "guarded_websocket"]


LAST_CALL = 1.0  # seconds for the first byte of a visitor who came just before a shutdown


@dataclass(frozen=True)
class Timeouts:
    """Seconds a visitor may take; 0 means for ever."""

    first_byte: float = 10.0
    """From the connection to the first byte of the first request."""
    head: float = 10.0
    """From the first byte of a request to the end of its head."""
    body: float = 30.0
    """Between two pieces of a request body the app is ready to read."""


def _head_limit(config: Config) -> int:
    limit = config.h11_max_incomplete_event_size
    return HEAD_LIMIT if limit is None else limit


class _OrderlyShutdown(asyncio.Protocol):
    """uvicorn's ``shutdown`` raises in some states of a connection that is closing already, and so stops halfway."""

    transport: asyncio.Transport

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()  # type: ignore[misc]


class _Guard(_OrderlyShutdown):
    """What both parsers share: the deadlines and the refusal. Mixed in before uvicorn's class."""

    timeouts: ClassVar[Timeouts] = Timeouts()
    limit_body: ClassVar[int] = 0  # bytes; 0 means any number

    cycle: Any
    flow: Any
    loop: asyncio.AbstractEventLoop
    refusal: HTTPStatus = HTTPStatus.BAD_REQUEST
    timeout_keep_alive: int
    timeout_keep_alive_task: asyncio.TimerHandle | None

    _deaf = False
    _awaiting: str | None = None
    _deadline = 0.0
    _timer: asyncio.TimerHandle | None = None
    _stopped = False
    _last_request = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await("first_byte")

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        super().data_received(data)
        needed = self._input_needed()
        if needed != self._awaiting or needed == "body":  # each piece of a body has a deadline of its own
            self._await(needed)
        if self._last_request:
            self._shut_down_after_it()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # type: ignore[attr-defined]  # uvicorn forgets to if the visitor was reset

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        needed = self._input_needed()  # a pipelined request may have been begun by this
        if needed != self._awaiting:
            self._await(needed)

    def handle_websocket_upgrade(self, *args: Any) -> None:
        if self._answering_earlier():
            self.refuse(400, "An upgrade must not be pipelined.")
            return
        self._stop()
        super().handle_websocket_upgrade(*args)  # type: ignore[misc]
        # websockets has limits of its own for a head, and uvicorn says nothing when they are exceeded.
        if not getattr(self.transport.get_protocol(), "handshake_initiated", True):
            self._write_refusal(HTTPStatus.BAD_REQUEST, b"Invalid WebSocket request received.")
            self.transport.close()

    @property
    def idle_since(self) -> float | None:
        """When the last answer was complete, if nothing has come since; for a pool that is short of WebSockets."""
        timer = self.timeout_keep_alive_task
        if timer is None or self._awaiting is not None:
            return None
        return timer.when() - self.timeout_keep_alive

    def send_400_response(self, msg: str) -> None:
        self.refuse(self.refusal, "The request body is too large." if self.refusal == 413 else msg)

    def refuse(self, status: int, message: str) -> None:
        """Answer in plain text if no answer has begun, and close. Earlier requests are answered first."""
        self._stop()
        if self._answering_earlier():
            self._refuse_later(status, message)
            return
        if not self._response_begun():
            self._write_refusal(HTTPStatus(status), message.encode())
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the app still answers must not follow ours
            self.cycle.message_event.set()
        self.transport.close()

    def _response_begun(self) -> bool:
        """Whether what is refused, a request or the rest of its body, has been answered in part or in full."""
        if self.cycle is None or not self.cycle.response_started:
            return False
        return bool(self.cycle.more_body or not self.cycle.response_complete)

    def _write_refusal(self, status: HTTPStatus, body: bytes) -> None:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)

    def _answering_earlier(self) -> bool:
        """Whether what is refused is pipelined behind a request that is not answered yet."""
        return False

    @abstractmethod
    def _refuse_later(self, status: int, message: str) -> None:
        """Refuse it once those before it are answered; take nothing more."""

    @abstractmethod
    def _input_needed(self) -> str | None:
        """What the parser waits for: "head", "body", or None between requests and after the last."""

    def _await(self, what: str | None) -> None:
        """Set the deadline for it."""
        if self._stopped:
            return
        self._awaiting = what
        seconds = getattr(self.timeouts, what) if what is not None else 0
        if not seconds or self.transport.is_closing():
            self._deadline = 0.0
            return
        self._set_deadline(self.loop.time() + seconds)

    def _set_deadline(self, deadline: float) -> None:
        # A timer that fires too early looks again: most requests are over long before it does.
        self._deadline = deadline
        if self._timer is not None and self._timer.when() > deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if not self._deadline or self.transport.is_closing():
            return
        if self._app_is_slow():
            self._deadline = self.loop.time() + getattr(self.timeouts, str(self._awaiting))
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)
        elif self._awaiting == "first_byte":
            self.transport.close()
        else:
            self.refuse(408, f"The request {self._awaiting} took too long.")

    def shutdown(self) -> None:
        if not self._request_is_coming():
            super().shutdown()
            return
        self._last_request = True
        if self._awaiting == "first_byte":
            self._set_deadline(self.loop.time() + LAST_CALL)

    def _request_is_coming(self) -> bool:
        """Of a visitor who has just come, it nearly always is; what was handed to us must be answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return self._awaiting in ("first_byte", "head") and not answering and not self._stopped

    def _shut_down_after_it(self) -> None:
        protocol: Any = self.transport.get_protocol()
        if protocol is not self:  # a WebSocket
            protocol.shutdown()
        elif not self._request_is_coming():
            super().shutdown()

    def _app_is_slow(self) -> bool:
        """Whether the visitor waits for the app, not the app for the visitor."""
        if self.flow.read_paused:
            return True
        if self._awaiting != "body" or self.cycle is None:
            return False
        answering = self.cycle.response_started and not self.cycle.response_complete
        return bool(answering or self.cycle.waiting_for_100_continue)

    def _stop(self) -> None:
        """No deadline counts from here on."""
        self._stopped = True
        self._deadline = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class GuardedH11Protocol(_Guard, H11Protocol):
    """uvicorn's h11 protocol with the rules of this module."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: StrictConnection = StrictConnection(_head_limit(config), self.limit_body)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # nothing counts after a last request, RFC 9112 section 9.6; h11 would call it an error
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        self.refusal: HTTPStatus = self.conn.refusal
        super().send_400_response(msg)

    def _input_needed(self) -> str | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE and self.conn.has_unparsed:
            return "head"
        return None


class _Sealed(list[tuple[bytes, bytes]]):
    """Headers to which no trailer is added: it must not pass for a header (RFC 9110 section 6.5.1)."""

    _room = FRAMING_LIMIT

    def append(self, header: tuple[bytes, bytes]) -> None:
        self._room -= len(header[0]) + len(header[1]) + len(b": \r\n")
        if self._room < 0:
            raise BadRequest("the trailers are too large")


def _guarded_httptools() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class GuardedHttpToolsProtocol(_Guard, HttpToolsProtocol):
        """uvicorn's httptools protocol with the rules of this module; llhttp enforces most by itself."""

        _in_head = False
        _in_body = False
        _head_limit = HEAD_LIMIT
        _unparsed = 0  # bytes since the last sign of progress: llhttp holds a half-read header without a bound
        _body_size = 0
        _fed = 0  # bytes that a head which ends now can have at most

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._head_limit = _head_limit(self.config)
            super().connection_made(transport)

        def data_received(self, data: bytes) -> None:
            self._fed = self._unparsed = self._unparsed + len(data)
            super().data_received(data)
            if self._unparsed > self._head_limit and not self.transport.is_closing():
                self.refuse(431, "Invalid HTTP request received.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = True
            self._awaiting = None  # every head has a deadline of its own

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._unparsed = 0
            if self._fed > self._head_limit:
                self._check_head_size()
            version = self.parser.get_http_version().encode()
            self.url = check_head(self.parser.get_method(), self.url, version, self.headers)
            self._check_upgrade()
            if self.limit_body:
                self._check_body(declared_length(self.headers))
            super().on_headers_complete()
            self.headers = _Sealed(self.headers)
            self._in_body = True
            self._body_size = 0

        def on_body(self, body: bytes) -> None:
            self._unparsed = 0
            self._body_size += len(body)
            self._check_body(self._body_size)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._unparsed = 0
            self._in_body = False
            super().on_message_complete()

        def _unsupported_upgrade_warning(self) -> None:
            super()._unsupported_upgrade_warning()
            # llhttp drops what follows, so this must be the last request.
            self._deaf = True
            self.cycle.keep_alive = False

        def _check_head_size(self) -> None:
            lines = sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
            if len(self.url) + lines > self._head_limit:
                self.refusal: HTTPStatus = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                raise BadRequest("the request head is too large")

        def _check_upgrade(self) -> None:
            """llhttp drops the body of an upgrade, also of an unknown one, and calls the request complete."""
            if not self.parser.should_upgrade() or self._should_upgrade():
                return
            if declared_length(self.headers) or any(name == b"transfer-encoding" for name, _ in self.headers):
                raise BadRequest("an upgrade with a body is not served")

        def _check_body(self, size: int) -> None:
            if self.limit_body and size > self.limit_body:
                self.refusal = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                raise BadRequest("the request body is too large")

        def _answering_earlier(self) -> bool:
            if self._in_body:
                return bool(self.pipeline)
            return self.cycle is not None and not self.cycle.response_complete

        def _refuse_later(self, status: int, message: str) -> None:
            self._deaf = True
            self.cycle.keep_alive = False
            if self._in_body:
                cycle, _ = self.pipeline.popleft()  # the latest
                self.pipeline.appendleft((cycle, _refusal(status, message.encode())))

        def _input_needed(self) -> str | None:
            if self._in_body:
                return "body"
            return "head" if self._in_head or self._unparsed else None

    return GuardedHttpToolsProtocol


def _refusal(status: int, body: bytes) -> Any:
    """An ASGI app that answers only this."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse


def guarded(name: str, timeouts: Timeouts, *, limit_body: int = 0) -> type[asyncio.Protocol]:
    """The guarded protocol class for ``h11`` or ``httptools``, with these limits; 0 bytes of body are no limit.

    Raises:
        ImportError: httptools is not installed.
    """
    base = GuardedH11Protocol if name == "h11" else _guarded_httptools()
    return type(base.__name__, (base,), {"timeouts": timeouts, "limit_body": limit_body})


def guarded_websocket(base: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """One of uvicorn's WebSocket protocols, whose ``shutdown`` does not raise."""
    return type(base.__name__, (_OrderlyShutdown, base), {})
