"""The app under load. Every answer is made of the id of its request, so that no other can pass for it."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["PIECE", "PlannedError", "app", "calls", "event", "pattern"]

PIECE = 64 * 1024  # bytes of a large answer sent at once

Handler = Callable[[dict[str, Any], Any, Any, list[str]], Awaitable[None]]

calls: Counter[str] = Counter()
"""How often each route was called."""


class PlannedError(Exception):
    """What the routes raise that are asked to."""


def pattern(request_id: str, size: int) -> bytes:
    """Bytes that only this request has, and that no swapped, missing or doubled piece leaves the same."""
    return hashlib.shake_128(request_id.encode()).digest(size)


def event(request_id: str, number: int) -> bytes:
    """One server-sent event."""
    return f"id: {number}\ndata: {request_id}\n\n".encode()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer ``/<route>/<request id>[/<number>]``."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    _, route, *rest = scope["path"].split("/")
    calls[route] += 1
    await _ROUTES[route](scope, receive, send, rest)


async def _lifespan(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def _small(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    await _answer(send, rest[0].encode())


async def _large(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    body = pattern(rest[0], int(rest[1]))
    await _start(send, [(b"content-length", b"%d" % len(body))])
    for start in range(0, len(body), PIECE):
        await send({"type": "http.response.body", "body": body[start : start + PIECE], "more_body": True})
    await send({"type": "http.response.body"})


async def _echo(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    digest = hashlib.sha256(body).hexdigest().encode()
    await _answer(send, bytes(body), [(b"x-id", rest[0].encode()), (b"x-sha256", digest)])


async def _events(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    await _start(send, [(b"content-type", b"text/event-stream")])
    for number in range(int(rest[1])):
        await send({"type": "http.response.body", "body": event(rest[0], number), "more_body": True})
        await asyncio.sleep(0.002)
    await send({"type": "http.response.body"})


async def _raise(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    raise PlannedError(rest[0])


async def _raise_late(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    await _start(send, [(b"content-length", b"1000")])
    await send({"type": "http.response.body", "body": rest[0].encode(), "more_body": True})
    raise PlannedError(rest[0])


async def _websocket(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    """Echo, each message behind the request id."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await send({"type": "websocket.send", "text": f"{rest[0]} {message['text']}"})
        else:
            await send({"type": "websocket.send", "bytes": rest[0].encode() + message["bytes"]})


async def _hostile(scope: dict[str, Any], receive: Any, send: Any, rest: list[str]) -> None:
    await _answer(send, b"this must never be called")


async def _start(send: Any, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _answer(send: Any, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await _start(send, [(b"content-length", b"%d" % len(body)), *(headers or [])])
    await send({"type": "http.response.body", "body": body})


_ROUTES: dict[str, Handler] = {
    "small": _small,
    "large": _large,
    "echo": _echo,
    "events": _events,
    "raise": _raise,
    "raise-late": _raise_late,
    "websocket": _websocket,
    "hostile": _hostile,
}
