"""Just enough HTTP: the Host of a request head, and the plain answers the relay gives itself."""

from __future__ import annotations

import http
import re
from collections.abc import Mapping

__all__ = ["END_OF_HEAD", "MAX_HEAD", "Refused", "find_host", "plain_answer"]

MAX_HEAD = 16 * 1024  # bytes
END_OF_HEAD = b"\r\n\r\n"

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # token, RFC 9110 section 5.6.2


class Refused(Exception):
    """A request the relay answers itself: a status, and one plain line that quotes no request, token or secret."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason
        self.headers: Mapping[str, str] = headers or {}

    @property
    def phrase(self) -> str:
        """The reason phrase of the status line."""
        try:
            return http.HTTPStatus(self.status).phrase
        except ValueError:
            return "Unknown"


def find_host(head: bytes) -> str:
    """The value of the one Host line of a whole request head, without its port.

    Stricter than HTTP: whatever two parsers could read differently is refused, since the app will parse it again.

    Raises:
        Refused: it is not HTTP/1, or has not exactly one Host.
    """
    _, *lines = head.removesuffix(END_OF_HEAD).split(b"\r\n")
    hosts = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name) or b"\n" in value or b"\r" in value:
            raise Refused(400, "the request head is malformed")
        if name.lower() == b"host":
            hosts.append(value.strip(b" \t").decode("latin-1"))
    if len(hosts) != 1:
        raise Refused(400, "exactly one Host header is needed")
    return re.sub(r":[0-9]*\Z", "", hosts[0])


def plain_answer(refused: Refused) -> bytes:
    """A whole HTTP/1.1 response of one line of text, after which the connection is closed."""
    body = f"{refused.reason}\n".encode()
    fields = {
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "Connection": "close",
    } | dict(refused.headers)
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {refused.status} {refused.phrase}\r\n{head}\r\n".encode() + body
