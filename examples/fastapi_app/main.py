"""A page worth sharing: who is visiting, a live board, a clock, uploads and downloads.

    tunnel-asgi examples.fastapi_app.main:app --local
    uvicorn examples.fastapi_app.main:app

Everything is in memory and shared by all visitors of one process.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.sse import EventSourceResponse
from pydantic import AwareDatetime, BaseModel, Field
from starlette.requests import ClientDisconnect

PAGE = Path(__file__).with_name("index.html")
HISTORY = 50  # notes a new visitor gets
BACKLOG = 200  # notes kept for a visitor whose connection is slow; past it the oldest are lost
STALLED = 20  # seconds after which a visitor who takes nothing is let go
BLOCK = hashlib.shake_256(b"tunnel-asgi").digest(64 * 1024)  # noise that is the same each time
BLOCKS_PER_MIB = 16

app = FastAPI(title="Hello from a tunnel", description=__doc__)


class Visit(BaseModel):
    """What the app can tell about a visitor from the request alone."""

    address: str
    url: str
    spoken: str


class Tick(BaseModel):
    """The time, and how many have the board open."""

    time: AwareDatetime
    online: int


class Note(BaseModel, str_strip_whitespace=True):
    """A message on the board."""

    name: str = Field(default="", max_length=24)
    text: str = Field(min_length=1, max_length=280)
    time: AwareDatetime | None = None


class Checksum(BaseModel):
    """The size and SHA-256 of an upload."""

    bytes: int
    sha256: str


class Board:
    """The latest notes, and an inbox for everyone who looks at them."""

    def __init__(self) -> None:
        self.notes: deque[Note] = deque(maxlen=HISTORY)
        self.inboxes: list[asyncio.Queue[Note]] = []

    @contextmanager
    def visitor(self) -> Iterator[asyncio.Queue[Note]]:
        """An inbox that holds the latest notes and receives the coming ones."""
        inbox: asyncio.Queue[Note] = asyncio.Queue(BACKLOG)
        for note in self.notes:
            inbox.put_nowait(note)
        self.inboxes.append(inbox)
        try:
            yield inbox
        finally:
            self.inboxes.remove(inbox)

    def post(self, note: Note) -> None:
        """Show a note to everyone, with the time it came."""
        note.time = datetime.now(UTC)
        self.notes.append(note)
        for inbox in self.inboxes:
            if inbox.full():
                inbox.get_nowait()
            inbox.put_nowait(note)


board = Board()


@app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})


@app.get("/visit")
async def visit(request: Request) -> Visit:
    return Visit(
        address=request.client.host if request.client else "unknown",
        url=str(request.base_url),
        spoken=f"{request.url.scheme}, HTTP/{request.scope['http_version']}",
    )


@app.get("/ticks", response_class=EventSourceResponse)
async def ticks() -> AsyncIterator[Tick]:
    """One event per second, until the visitor leaves."""
    while True:
        yield Tick(time=datetime.now(UTC), online=len(board.inboxes))
        await asyncio.sleep(1)


@app.websocket("/board")
async def board_socket(ws: WebSocket) -> None:
    """Send ``{"name": ..., "text": ...}``; receive everyone's notes."""
    await ws.accept()
    with board.visitor() as inbox:
        try:
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(send_notes(ws, inbox))
                both_ways.create_task(receive_notes(ws))
        except* (WebSocketDisconnect, TimeoutError):
            pass
        except* (ValueError, KeyError):
            await ws.close(1008, "expected name (24 characters at most) and text (1 to 280)")


async def send_notes(ws: WebSocket, inbox: asyncio.Queue[Note]) -> None:
    while True:
        note = await inbox.get()
        async with asyncio.timeout(STALLED):
            await ws.send_text(note.model_dump_json())


async def receive_notes(ws: WebSocket) -> None:
    while True:
        board.post(Note.model_validate_json(await ws.receive_text()))


@app.post("/upload")
async def upload(request: Request) -> Checksum:
    """Any body of any size; it is hashed as it arrives and never kept."""
    digest, size = hashlib.sha256(), 0
    try:
        async for chunk in request.stream():
            digest.update(chunk)
            size += len(chunk)
    except ClientDisconnect:
        raise HTTPException(400, "the upload was cut short") from None
    return Checksum(bytes=size, sha256=digest.hexdigest())


@app.get("/download/{mebibytes}", response_class=StreamingResponse)
def download(mebibytes: Annotated[int, Field(ge=1, le=1024)]) -> StreamingResponse:
    """Noise that is the same each time. Its checksum is in the header ``X-SHA256``."""
    return StreamingResponse(
        noise(mebibytes),
        media_type="application/octet-stream",
        headers={
            "Content-Length": str(mebibytes * 1024 * 1024),
            "Content-Disposition": f'attachment; filename="noise-{mebibytes}-mib.bin"',
            "X-SHA256": noise_checksum(mebibytes),
        },
    )


async def noise(mebibytes: int) -> AsyncIterator[bytes]:
    for _ in range(mebibytes * BLOCKS_PER_MIB):
        yield BLOCK


@cache
def noise_checksum(mebibytes: int) -> str:
    digest = hashlib.sha256()
    for _ in range(mebibytes * BLOCKS_PER_MIB):
        digest.update(BLOCK)
    return digest.hexdigest()
