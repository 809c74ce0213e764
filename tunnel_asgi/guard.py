"""uvicorn's HTTP/1.1 protocols, made fit to face the internet bare.

Behind nginx uvicorn need not judge a request head or count seconds; here the visitor's bytes arrive raw. Both
parsers get the same rules for the head (RFC 9112 sections 2.2, 3.2, 5.2 and 6.3), the same bound on its size,
and a deadline for everything a visitor can be slow with. A breach is answered with a 4xx where one can still be
sent, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

__all__ = ["GuardedH11Protocol", "Timeouts", "guarded"]

logger = logging.getLogger("uvicorn.error")

HEAD_LIMIT = 64 * 1024  # bytes of request line and headers; nginx allows 32 KiB, node 16 KiB

_HEAD_END = b"\r\n\r\n"
_BAD_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_FOLDED_LINE = re.compile(rb"\r\n[ \t]")
_HOST = re.compile(rb"[A-Za-z0-9.\-_~%!$&'()*+,;=:\[\]]*")


@dataclass(frozen=True)
class Timeouts:
    """Seconds a visitor may take; 0 means for ever."""

    first_byte: float = 10.0
    """From the connection to the first byte of the first request."""
    head: float = 10.0
    """From the first byte of a request to the end of its head."""
    body: float = 30.0
    """Between two pieces of a request body the app is ready to read."""


class BadRequestHead(h11.RemoteProtocolError):
    """A request head that a lenient parser would take."""


def check_headers(headers: Iterable[tuple[bytes, bytes]], http_version: bytes) -> None:
    """Refuse what two parsers could understand differently: framing and Host. Names are in lower case.

    Raises:
        BadRequestHead: with the reason.
    """
    found: dict[bytes, list[bytes]] = {b"host": [], b"content-length": [], b"transfer-encoding": []}
    for name, value in headers:
        if name in found:
            found[name].append(value)
    _check_host(found[b"host"], http_version)
    _check_framing(found[b"content-length"], found[b"transfer-encoding"], http_version)


def _check_host(hosts: list[bytes], http_version: bytes) -> None:
    if len(hosts) > 1 or (not hosts and http_version == b"1.1"):
        raise BadRequestHead("exactly one Host header is needed")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadRequestHead("the Host header is not a host")


def _check_framing(lengths: list[bytes], encodings: list[bytes], http_version: bytes) -> None:
    if lengths and encodings:
        raise BadRequestHead("Content-Length and Transfer-Encoding exclude each other")
    if len(lengths) > 1 or not all(length.isdigit() for length in lengths):
        raise BadRequestHead("the Content-Length is not one number")
    if encodings and (len(encodings) > 1 or encodings[0].lower() != b"chunked" or http_version == b"1.0"):
        raise BadRequestHead("the only Transfer-Encoding served is chunked")


class _Guard(asyncio.Protocol):
    """What both parsers share: the deadlines and the refusal. Mixed in before uvicorn's class."""

    timeouts: ClassVar[Timeouts] = Timeouts()

    transport: asyncio.Transport
    cycle: Any
    flow: Any
    loop: asyncio.AbstractEventLoop
    head_too_large = False

    _deaf = False
    _awaiting: str | None = None
    _deadline = 0.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await("first_byte")

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        super().data_received(data)
        self._await(self._input_needed(), fresh=self._awaiting == "body")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, *args: Any) -> None:
        self._stop()
        super().handle_websocket_upgrade(*args)  # type: ignore[misc]

    def send_400_response(self, msg: str) -> None:
        self.refuse(431 if self.head_too_large else 400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Answer in plain text if no answer has begun, and close. Earlier requests are answered first."""
        self._stop()
        if self._answering_earlier():
            self._deaf = True
            self.cycle.keep_alive = False
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self._write_refusal(HTTPStatus(status), message.encode())
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the app still answers must not follow ours
            self.cycle.message_event.set()
        self.transport.close()

    def _write_refusal(self, status: HTTPStatus, body: bytes) -> None:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)

    def _answering_earlier(self) -> bool:
        """Whether what is refused is the head of a pipelined request, behind one not answered yet."""
        return False

    def _input_needed(self) -> str | None:
        """What the parser waits for: "head", "body", or None between requests and after the last."""
        raise NotImplementedError

    def _await(self, what: str | None, *, fresh: bool = False) -> None:
        if what == self._awaiting and not fresh:
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
        if self._awaiting == "body" and self._app_is_slow():
            self._deadline = self.loop.time() + self.timeouts.body
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)
        elif self._awaiting == "first_byte":
            self.transport.close()
        else:
            self.refuse(408, f"The request {self._awaiting} took too long.")

    def _app_is_slow(self) -> bool:
        """Whether the visitor waits for the app, not the app for the visitor."""
        return bool(self.flow.read_paused or self.cycle.response_started or self.cycle.waiting_for_100_continue)

    def _stop(self) -> None:
        self._deadline = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _StrictConnection(h11.Connection):
    """h11, without what it tolerates for old clients: bare CR or LF, folded lines, doubled framing."""

    head_too_large = False

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            self._check_raw_head()
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.head_too_large = error.error_status_hint == 431
            raise
        if type(event) is h11.Request:
            check_headers(event.headers, event.http_version)
        return event

    def _check_raw_head(self) -> None:
        data, _ = self.trailing_data
        end = data.find(_HEAD_END)
        head = data if end < 0 else data[: end + len(_HEAD_END)]
        if len(head) > HEAD_LIMIT:
            self.head_too_large = True
            raise BadRequestHead("the request head is too large")
        if _BAD_LINE_END.search(head):
            raise BadRequestHead("a line of the head does not end in CR LF")
        if _FOLDED_LINE.search(head):
            raise BadRequestHead("a header line is folded")


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
        limit = config.h11_max_incomplete_event_size
        self.conn: _StrictConnection = _StrictConnection(h11.SERVER, HEAD_LIMIT if limit is None else limit)

    def send_400_response(self, msg: str) -> None:
        self.head_too_large = self.conn.head_too_large
        super().send_400_response(msg)

    def _input_needed(self) -> str | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            return "head"
        return None


def _guarded_httptools() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class GuardedHttpToolsProtocol(_Guard, HttpToolsProtocol):
        """uvicorn's httptools protocol with the rules of this module; llhttp enforces most by itself."""

        _raw_size = 0
        _head_size = 0
        _in_head = False
        _in_body = False

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head and not self.transport.is_closing():
                self._raw_size += len(data)  # llhttp holds a half-read header without a bound
                if self._raw_size > HEAD_LIMIT:
                    self.refuse(431, "Invalid HTTP request received.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._raw_size = self._head_size = 0
            self._in_head = True

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._grow_head(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self._grow_head(len(name) + len(value) + len(b": \r\n"))

        def on_headers_complete(self) -> None:
            self._in_head = False
            check_headers(self.headers, self.parser.get_http_version().encode())
            self._in_body = True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_body = False
            super().on_message_complete()

        def _grow_head(self, size: int) -> None:
            self._head_size += size
            if self._head_size > HEAD_LIMIT:
                self.head_too_large = True
                raise BadRequestHead("the request head is too large")

        def _answering_earlier(self) -> bool:
            return not self._in_body and self.cycle is not None and not self.cycle.response_complete

        def _input_needed(self) -> str | None:
            if self._in_head:
                return "head"
            return "body" if self._in_body else None

    return GuardedHttpToolsProtocol


def guarded(name: str, timeouts: Timeouts) -> type[asyncio.Protocol]:
    """The guarded protocol class for ``h11`` or ``httptools``, with these timeouts.

    Raises:
        ImportError: httptools is not installed.
    """
    base = GuardedH11Protocol if name == "h11" else _guarded_httptools()
    return type(base.__name__, (base,), {"timeouts": timeouts})
