"""uvicorn's protocols, made fit to face the internet bare.

Behind nginx uvicorn need not judge a request head or count seconds; here the visitor's bytes arrive raw. Both
parsers get the same rules for the head (RFC 9112 sections 2.2, 2.3, 3.2, 5.2 and 6.3), the same bound on its size,
and a deadline for everything a visitor can be slow with. A breach is answered with a 4xx where one can still be
sent, and the connection is closed. Requests that came before it on the same connection get their answers first.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

__all__ = ["GuardedH11Protocol", "Timeouts", "guarded", "guarded_websocket"]

logger: logging.Logger = logging.getLogger("uvicorn.error")

HEAD_LIMIT = 64 * 1024  # bytes of request line and headers; nginx allows 32 KiB, node 16 KiB
FRAMING_LIMIT = 4 * 1024  # bytes of a chunk's size line, or of the trailers
LENGTH_DIGITS = 18  # of a Content-Length: what any parser's 64 bits hold

_LF = ord("\n")
_HEAD_END = b"\r\n\r\n"
# Lines without control characters, each ended by CR LF, none folded. The last one may still be growing.
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*+"
_WELL_FORMED = re.compile(rb"(?:" + _TEXT + rb"\r\n(?![ \t]))*+" + _TEXT + rb"\r?")
# The headers that check_head judges, as they stand in a raw head.
_JUDGED_LINE = re.compile(rb"\n(host|content-length|transfer-encoding):([^\r]*)", re.IGNORECASE)
_JUDGED = frozenset((b"host", b"content-length", b"transfer-encoding"))
_CHUNK_EXTENSION = rb"(?:;[\t\x20-\x7e\x80-\xff]+)?"
# What surrounds the bytes of a chunk. It may begin with what was left of the line end before.
_CHUNK_LINE = re.compile(rb"\r?\n?(?:0*[0-9A-Fa-f]{1,16}" + _CHUNK_EXTENSION + rb"\r\n)?")
_CHUNKED_END = re.compile(rb"\r?\n?(?:0+" + _CHUNK_EXTENSION + rb"\r\n)?(?:[^\s:;]+:[^\r\n]*\r\n)*\r\n")
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_~-]+\]|[A-Za-z0-9.\-_~%!$&'()*+,;=]*)(?::[0-9]*)?")
_ORIGIN_FORM = re.compile(rb"/[\x21\x22\x24-\x7e]*")  # visible, and no fragment
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#@]+)(/?[\x21\x22\x24-\x7e]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Timeouts:
    """Seconds a visitor may take; 0 means for ever."""

    first_byte: float = 10.0
    """From the connection to the first byte of the first request."""
    head: float = 10.0
    """From the first byte of a request to the end of its head."""
    body: float = 30.0
    """Between two pieces of a request body the app is ready to read."""


class BadRequest(h11.RemoteProtocolError):
    """A request that a lenient parser would take."""


def check_head(method: bytes, target: bytes, http_version: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Refuse what two parsers could understand differently; returns the target as a path. Names are in lower case.

    Raises:
        BadRequest: with the reason.
    """
    if http_version not in (b"1.1", b"1.0"):
        raise BadRequest("the only versions served are HTTP/1.1 and HTTP/1.0")
    judged = [(name, value.strip(b" \t")) for name, value in headers if name in _JUDGED]
    hosts = [value for name, value in judged if name == b"host"]
    _check_host(hosts, http_version)
    if len(judged) > len(hosts):
        _check_framing(judged, http_version)
    return _origin_form(method, target, hosts)


def declared_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The Content-Length of a head that ``check_head`` took, or 0."""
    return sum(int(value) for name, value in headers if name == b"content-length")


def _check_host(hosts: list[bytes], http_version: bytes) -> None:
    if len(hosts) > 1 or (not hosts and http_version == b"1.1"):
        raise BadRequest("exactly one Host header is needed")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadRequest("the Host header is not a host")


def _check_framing(headers: list[tuple[bytes, bytes]], http_version: bytes) -> None:
    lengths = [value for name, value in headers if name == b"content-length"]
    encodings = [value for name, value in headers if name == b"transfer-encoding"]
    if lengths and encodings:
        raise BadRequest("Content-Length and Transfer-Encoding exclude each other")
    if len(lengths) > 1 or not all(length.isdigit() and len(length) <= LENGTH_DIGITS for length in lengths):
        raise BadRequest("the Content-Length is not one number")
    if encodings and (len(encodings) > 1 or encodings[0].lower() != b"chunked" or http_version == b"1.0"):
        raise BadRequest("the only Transfer-Encoding served is chunked")


def _origin_form(method: bytes, target: bytes, hosts: list[bytes]) -> bytes:
    """The target without scheme and authority (RFC 9112 section 3.2)."""
    if method == b"CONNECT":
        raise BadRequest("this is no proxy")
    if _ORIGIN_FORM.fullmatch(target) or (target == b"*" and method == b"OPTIONS"):
        return target
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None or [absolute[1].lower()] != [host.lower() for host in hosts]:
        raise BadRequest("the request target is neither a path nor a URL of the Host")
    return absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]


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
        self._deadline = self.loop.time() + seconds
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        # The timer is moved lazily: most requests are over long before it fires.
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


class _StrictConnection(h11.Connection):
    """h11, without what it tolerates for old clients: bare CR or LF, folded lines, doubled framing, loose chunks."""

    refusal: HTTPStatus = HTTPStatus.BAD_REQUEST

    def __init__(self, head_limit: int, body_limit: int) -> None:
        super().__init__(h11.SERVER, head_limit)
        self._head_limit = head_limit
        self._body_limit = body_limit
        self._body_size = 0  # of a chunked body
        self._checked = 0  # bytes of the unfinished head that are known to be well-formed
        self._judged: list[tuple[bytes, bytes]] = []  # of the head that is read next
        self._chunked = False

    @property
    def has_unparsed(self) -> bool:
        """Whether bytes are there that belong to no event yet; ``trailing_data`` would copy them."""
        return bool(self._receive_buffer._data)

    def next_event(self) -> Any:
        try:
            return self._next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint in (413, 431):
                self.refusal = HTTPStatus(error.error_status_hint)
            raise

    def _next_event(self) -> Any:
        state = self.their_state
        if state is h11.IDLE:
            return self._next_head()
        if state is h11.SEND_BODY and self._chunked:
            return self._next_chunk()
        return super().next_event()

    def _next_head(self) -> Any:
        if self.has_unparsed:
            self._check_raw_head(self._receive_buffer._data)
        event = super().next_event()
        if type(event) is not h11.Request:
            return event
        target = check_head(event.method, event.target, event.http_version, self._judged)
        self._chunked = any(name == b"transfer-encoding" for name, _ in self._judged)
        self._body_size = 0
        if self._body_limit:
            self._check_body(declared_length(self._judged))
        if target == event.target:
            return event
        return h11.Request(
            method=event.method, target=target, headers=list(event.headers), http_version=event.http_version
        )

    def _next_chunk(self) -> Any:
        framing, size = bytes(self._receive_buffer._data[:FRAMING_LIMIT]), len(self._receive_buffer)
        event = super().next_event()
        self._check_chunk_framing(event, framing, size - len(self._receive_buffer))
        if type(event) is h11.Data:
            self._body_size += len(event.data)
            self._check_body(self._body_size)
        return event

    def _check_raw_head(self, raw: bytearray) -> None:
        end = raw.find(_HEAD_END, max(0, self._checked - len(_HEAD_END)))
        size = len(raw) if end < 0 else end + len(_HEAD_END)
        if size > self._head_limit:
            raise BadRequest("the request head is too large", error_status_hint=431)
        # What follows a line end decides about it, so the last bytes are looked at twice.
        start = max(0, self._checked - 2)
        if start and raw[start] == _LF:
            start += 1
        if not _WELL_FORMED.fullmatch(raw, start, size):
            raise BadRequest("a line of the head is folded, ends without CR LF or holds control characters")
        self._checked = size if end < 0 else 0
        if end >= 0:  # from the raw lines: h11 makes one of several lengths that agree
            self._judged = [(name.lower(), value) for name, value in _JUDGED_LINE.findall(raw, 0, size)]

    def _check_body(self, size: int) -> None:
        if self._body_limit and size > self._body_limit:
            raise BadRequest("the request body is too large", error_status_hint=413)

    def _check_chunk_framing(self, event: Any, framing: bytes, consumed: int) -> None:
        length = consumed - len(event.data) if type(event) is h11.Data else consumed
        pattern = _CHUNKED_END if type(event) is h11.EndOfMessage else _CHUNK_LINE
        if length > FRAMING_LIMIT or not pattern.fullmatch(framing, 0, length):
            raise BadRequest("the chunked body is malformed")


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
        self.conn: _StrictConnection = _StrictConnection(_head_limit(config), self.limit_body)

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
