"""What a visitor's bytes mean to a strict reader of RFC 9112, written apart from any parser."""

from __future__ import annotations

import re

__all__ = ["requests"]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_LINE = rb"[\t\x20-\x7e\x80-\xff]*"
# What llhttp forgives in a start line, without harm: see DIFFERENT in tests/test_guard.py.
_START = rb"[\r\n]*(" + _TOKEN + rb") +([\x21-\x7e]+) +(?:HTTP|RTSP|ICE)/1\.([01])\r\n"
_HEAD = re.compile(_START + rb"((?:" + _TOKEN + rb":" + _LINE + rb"\r\n)*)\r\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)(?:;" + _LINE + rb")?\r\n")
_TRAILERS = re.compile(rb"(?:[^\s:;]+:[^\r\n]*\r\n)*\r\n")


def requests(data: bytes) -> list[tuple[str, bytes]]:
    """Method and body of each whole request, up to the first that is malformed or not complete."""
    found = []
    position = 0
    while head := _HEAD.match(data, position):
        body = _body(data, head)
        if body is None:
            break
        content, position = body
        found.append((head[1].decode(), content))
    return found


def _body(data: bytes, head: re.Match[bytes]) -> tuple[bytes, int] | None:
    """The body and where it ends; None if there is no telling."""
    fields: dict[bytes, list[bytes]] = {}
    for line in head[4].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
    lengths, encodings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
    hosts = len(fields.get(b"host", []))
    if hosts > 1 or (hosts == 0 and head[3] == b"1") or len(lengths) + len(encodings) > 1:
        return None
    if encodings:
        return _chunks(data, head.end()) if encodings[0].lower() == b"chunked" and head[3] == b"1" else None
    if not lengths:
        return b"", head.end()
    if not re.fullmatch(rb"[0-9]+", lengths[0]):
        return None
    end = head.end() + int(lengths[0])
    return (data[head.end() : end], end) if end <= len(data) else None


def _chunks(data: bytes, position: int) -> tuple[bytes, int] | None:
    body = b""
    while chunk := _CHUNK.match(data, position):
        size = int(chunk[1], 16)
        if size == 0:
            end = _TRAILERS.match(data, chunk.end())
            return None if end is None else (body, end.end())
        position = chunk.end() + size + 2
        body += data[chunk.end() : position - 2]
        if data[position - 2 : position] != b"\r\n":
            return None
    return None
