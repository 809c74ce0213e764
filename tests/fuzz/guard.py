"""Target: whatever a visitor may send, through both parsers, which must never read two different things.

The first byte cuts the rest into pieces of that size (0: one piece).
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Awaitable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from tests.fuzz import bench, oracle
from tunnel_asgi.guard import Timeouts, guarded, guarded_websocket
from tunnel_asgi.transport import TunnelTransport

__all__ = ["PARSERS", "check"]

PARSERS = ["h11", "httptools"]
PATIENCE = 1000.0  # virtual seconds; every deadline of the guard is shorter
BODY = b"an answer"

Request = tuple[str, str, bytes, bytes, bytes]


def check(data: bytes) -> None:
    """Through one parser, through the other, and compare."""
    seen = []
    for parser in PARSERS:
        visit = Visit(parser)
        bench.run(visit.run(data[:1], data[1:]))
        visit.judge(data[1:])
        seen.append(visit.trusted)
    common = min(map(len, seen))
    assert seen[0][:common] == seen[1][:common], f"read as {seen[0]} by h11, as {seen[1]} by httptools"


class Wire:
    """Records what is sent to the visitor."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.writable = True
        self.buffered = 0
        self.released = asyncio.Event()

    def send_data(self, data: bytes | memoryview) -> None:
        assert len(data) > 0
        self.sent += data

    def send_eof(self) -> None:
        assert not self.released.is_set()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def release(self) -> None:
        assert not self.released.is_set(), "the wire was released twice"
        self.released.set()


class Visit:
    """One visitor with these bytes. It is also the app, which notes what it was asked."""

    def __init__(self, parser: str) -> None:
        self.parser = parser
        self.upgraded = False
        self.seen: list[Request] = []
        """Requests whose end has been read."""
        self.sent = b""

    async def run(self, cut: bytes, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        config, wire, state = _config(self.parser), Wire(), ServerState()
        config.loaded_app = self.app
        protocol = config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=state, app_state={}, _loop=loop
        )
        transport = TunnelTransport(wire, protocol, extra={"peername": ("192.0.2.1", 0)}, loop=loop)
        transport.start()
        size = ord(cut or b"\0") or len(data) or 1
        for start in range(0, len(data), size):
            transport.feed_data(data[start : start + size])
            await asyncio.sleep(0)
        await self._end(transport, wire)
        assert not state.connections, "the server counts a connection that is gone"
        assert not state.tasks, "the server counts a task that is done"
        self.sent = bytes(wire.sent)

    async def _end(self, transport: TunnelTransport, wire: Wire) -> None:
        """The app does what it can do at once, the deadlines pass, and then the visitor leaves."""
        for _ in range(10):
            await asyncio.sleep(0)
        await asyncio.sleep(PATIENCE)
        if not self.upgraded:
            assert transport.is_closing(), "no deadline ended the connection"
        transport.feed_eof()
        async with asyncio.timeout(PATIENCE):
            await wire.released.wait()
        await asyncio.sleep(1)  # for connection_lost, and what the app does then

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self._websocket(receive, send)
            return
        body = await _read_body(receive)
        if body is None:
            return
        headers = b"".join(map(_line, scope["headers"]))
        self.seen.append((scope["method"], scope["path"], scope["query_string"], headers, body))
        length = b"%d" % len(BODY)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": BODY})

    async def _websocket(self, receive: Any, send: Any) -> None:
        await receive()
        self.upgraded = True
        await send({"type": "websocket.accept"})
        while (await receive())["type"] == "websocket.receive":
            pass

    @property
    def trusted(self) -> list[Request]:
        """What both parsers must agree on. llhttp takes no body behind an upgrade, even one that uvicorn refuses."""
        last_is_upgrade = bool(self.seen) and b"\nupgrade:" in b"\n" + self.seen[-1][3]
        return self.seen[:-1] if self.parser == "httptools" and last_is_upgrade else self.seen

    def judge(self, data: bytes) -> None:
        """What was answered must fit what was called."""
        read = [(method, body) for method, _, _, _, body in self.trusted]
        meant = oracle.requests(data)
        assert read == meant[: len(read)], f"the app was asked {read}, but what was sent means {meant}"
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.sent)]
        final = [status for status in statuses if status != 100]
        assert final.count(200) == len(self.seen), f"{len(self.seen)} requests, answers {final}"
        assert all(status == 200 for status in final[:-1]), f"there is an answer after a refusal: {final}"
        assert not final or final[-1] in (101, 200) or 400 <= final[-1] < 500, f"not a refusal: {final}"


def _line(header: tuple[bytes, bytes]) -> bytes:
    """A header as both parsers mean it: h11 strips values, and lowers this one."""
    name, value = header
    return b"%b: %b\n" % (name, value.lower() if name == b"transfer-encoding" else value.strip(b" \t"))


async def _read_body(receive: Any) -> bytes | None:
    """The whole body; None if it never ended."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += bytes(message["body"])
        if not message["more_body"]:
            return body
    return None


@functools.cache
def _config(parser: str) -> uvicorn.Config:
    config = uvicorn.Config(
        _never, http=guarded(parser, Timeouts()), lifespan="off", log_config=None, date_header=False, access_log=False
    )
    config.load()
    assert isinstance(config.ws_protocol_class, type)
    config.ws_protocol_class = guarded_websocket(config.ws_protocol_class)
    return config


def _never(scope: Any, receive: Any, send: Any) -> Awaitable[None]:
    raise AssertionError("each visit brings its own app")
