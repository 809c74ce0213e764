"""The app that is measured. It does next to nothing, so that the server and not the app is seen."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from benchmarks.payload import BODY, CHECKED_UPLOAD, DOWNLOAD, EVENT, EVENTS, HELLO, PUBLISH, UPLOAD

subscribers: set[asyncio.Queue[bytes | None]] = set()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app without a framework."""
    if scope["type"] == "http":
        await PAGES.get(scope["path"], hello)(receive, send)
    elif scope["type"] == "websocket":
        await echo(receive, send)
    else:
        await lifespan(receive, send)


async def hello(receive: Any, send: Any) -> None:
    await answer(send, HELLO)


async def download(receive: Any, send: Any) -> None:
    await answer(send, BODY)


async def upload(receive: Any, send: Any) -> None:
    """Answer with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    await answer(send, b"%d" % size)


async def checked_upload(receive: Any, send: Any) -> None:
    """Answer with the checksum of the body. It costs more than receiving it, so it is not what is measured."""
    checksum, more = 0, True
    while more:
        message = await receive()
        checksum = zlib.crc32(message["body"], checksum)
        more = message["more_body"]
    await answer(send, b"%d" % checksum)


async def publish(receive: Any, send: Any) -> None:
    """Send one event to every subscriber."""
    for queue in subscribers:
        queue.put_nowait(EVENT)
    await answer(send, b"%d" % len(subscribers))


async def events(receive: Any, send: Any) -> None:
    """Server-sent events, until the visitor leaves."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    leaving = asyncio.ensure_future(until_disconnected(receive))
    leaving.add_done_callback(lambda _: queue.put_nowait(None))
    await send(start([(b"content-type", b"text/event-stream")]))
    subscribers.add(queue)
    try:
        while event := await queue.get():
            await send({"type": "http.response.body", "body": event, "more_body": True})
    finally:
        subscribers.discard(queue)
        leaving.cancel()


async def until_disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def echo(receive: Any, send: Any) -> None:
    """Send every WebSocket message back."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message["bytes"]})


async def lifespan(receive: Any, send: Any) -> None:
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})


async def answer(send: Any, body: bytes) -> None:
    await send(start([(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]))
    await send({"type": "http.response.body", "body": body})


def start(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


PAGES = {
    DOWNLOAD: download,
    UPLOAD: upload,
    CHECKED_UPLOAD: checked_upload,
    PUBLISH: publish,
    EVENTS: events,
}
