"""The loads: who visits, and what one operation is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.entrances import Entrance
from benchmarks.payload import BODY, CHECKED_UPLOAD, DOWNLOAD, EVENTS, HELLO, MESSAGE, PUBLISH, UPLOAD
from benchmarks.visitors import Audience, Chatter, Exchange, Guest, Meter, Newcomer, Passer, Regular

CONNECTIONS = 16
SUBSCRIBERS = 100

GET = Exchange.of("GET", "/", HELLO)
_GET_AND_CLOSE = Exchange.of("GET", "/", HELLO, close=True)
_DOWNLOAD = Exchange.of("GET", DOWNLOAD, BODY)
_SUBSCRIBE = Exchange.of("GET", EVENTS, b"")
_PUBLISH = Exchange.of("POST", PUBLISH, b"%d" % SUBSCRIBERS)

MakeGuest = Callable[[Meter, Entrance], Guest]


@dataclass(frozen=True)
class Load:
    """A way to use a server. ``begin`` lets the visitors in and returns once all of them are served."""

    name: str
    title: str
    unit: str
    make_guest: MakeGuest | None

    async def begin(self, meter: Meter, entrance: Entrance) -> None:
        if self.make_guest is None:
            audience = Audience(meter, entrance, SUBSCRIBERS, subscription=_SUBSCRIBE.request, publication=_PUBLISH)
            await meter.until(audience.complete)
            return
        for _ in range(CONNECTIONS):
            entrance.admit(self.make_guest(meter, entrance))


def _meeting(guest: Callable[..., Guest], *purpose: Any) -> MakeGuest:
    return lambda meter, entrance: guest(meter, entrance, *purpose)


def _uploading(size: int) -> MakeGuest:
    body = BODY[:size]
    checked = Exchange.of("POST", CHECKED_UPLOAD, b"%d" % zlib.crc32(body), body=body)
    measured = Exchange.of("POST", UPLOAD, b"%d" % size, body=body)
    return _meeting(Regular, measured, checked)


_LOADS = (
    Load("get", "small GET, keep-alive", "request", _meeting(Regular, GET)),
    Load("connect", "small GET, a new connection each", "request", _meeting(Newcomer, _GET_AND_CLOSE)),
    Load("visit", "a connection without a request", "connection", _meeting(Passer)),
    Load("post", "POST 64 KiB", "request", _uploading(64 * 1024)),
    Load("download", "download 1 MiB", "MiB", _meeting(Regular, _DOWNLOAD)),
    Load("upload", "upload 1 MiB", "MiB", _uploading(len(BODY))),
    Load("events", f"server-sent events, {SUBSCRIBERS} subscribers", "event", None),
    Load("echo", f"WebSocket echo, {len(MESSAGE)} bytes", "message", _meeting(Chatter, MESSAGE)),
)
LOADS = {load.name: load for load in _LOADS}
