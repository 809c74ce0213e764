"""Requests read strictly, whichever parser reads them: the rules for a head, and h11 with these rules.

A request that two parsers could understand differently is refused (RFC 9112 sections 2.2, 2.3, 3.2, 5.2, 6.3 and
7.1). No I/O, no clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import h11

__all__ = ["FRAMING_LIMIT", "HEAD_LIMIT", "BadRequest", "StrictConnection", "check_head", "declared_length"]

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


class StrictConnection(h11.Connection):
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
