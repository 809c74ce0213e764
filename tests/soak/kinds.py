"""What visitors do. Each function makes one request (or two) on a connection and checks the answer by its content.

They raise ``Wrong`` for an answer to somebody else's question, and OSError, EOFError or a WebSocket exception when
the connection failed, which may be the work of an injected fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from websockets.asyncio.client import connect

from tests.soak.app import event, pattern
from tests.soak.connection import Connection, Wrong, check

__all__ = ["FAULTY_KINDS", "GOOD_KINDS", "MEETING", "Kind", "Request"]

LARGE = (64 * 1024, 512 * 1024)  # bytes, from and to
BODY = 48 * 1024  # bytes sent before an answer, at most: what the relay can still give to another WebSocket
UPLOAD = (100 * 1024, 300 * 1024)  # bytes, from and to, of which the app has been told before
EVENTS = 20
MESSAGES = 5
HUGE_HEAD = 48 * 1024  # bytes; see HEAD_LIMIT of serve.py


class Unexpected(EOFError):
    """A clean answer, but not the one that is due: a 503, for instance."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request that a visitor is to make."""

    id: str
    connection: Connection
    random: Random

    def head(self, method: str, path: str, *lines: str) -> bytes:
        return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: soak.test", *lines, "", ""]).encode()


async def small(request: Request) -> None:
    await request.connection.send(request.head("GET", f"/small/{request.id}"))
    await _expect_body(request, request.id.encode())


async def large(request: Request) -> None:
    await _get_large(request, request.random.randint(*LARGE))


async def slow_reader(request: Request) -> None:
    await _get_large(request, LARGE[1], slowly=True)


async def post(request: Request) -> None:
    body = _random_body(request)
    head = request.head("POST", f"/echo/{request.id}", f"Content-Length: {len(body)}")
    await request.connection.send(head + body)
    await _expect_echo(request, body)


async def chunked(request: Request) -> None:
    body = _random_body(request)
    await request.connection.send(request.head("POST", f"/echo/{request.id}", "Transfer-Encoding: chunked"))
    rest = body
    while rest:
        size = request.random.randint(1, 8 * 1024)
        chunk, rest = rest[:size], rest[size:]
        await request.connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    await request.connection.send(b"0\r\n\r\n")
    await _expect_echo(request, body)


async def upload(request: Request) -> None:
    """A large body, sent once the app asks for it."""
    body = pattern(request.id, request.random.randint(*UPLOAD))
    lines = (f"Content-Length: {len(body)}", "Expect: 100-continue")
    await request.connection.send(request.head("POST", f"/echo/{request.id}", *lines))
    status, _ = await request.connection.read_head()
    if status != 100:
        raise Unexpected(f"{status} instead of 100")
    await request.connection.send(body)
    await _expect_echo(request, body)


async def pipelined(request: Request) -> None:
    """Two requests at once; the second has an id and a path of its own."""
    first = request.head("GET", f"/small/{request.id}")
    second = request.head("GET", f"/large/{request.id}b/2000")
    await request.connection.send(first + second)
    await _expect_body(request, request.id.encode())
    await _expect_body(request, pattern(f"{request.id}b", 2000))


async def events(request: Request) -> None:
    await request.connection.send(request.head("GET", f"/events/{request.id}/{EVENTS}"))
    await _expect_body(request, b"".join(event(request.id, number) for number in range(EVENTS)))


async def websocket(request: Request) -> None:
    uri = f"ws://soak.test/websocket/{request.id}"
    async with connect(uri, sock=request.connection.socket, proxy=None, compression=None, open_timeout=None) as ws:
        for number in range(MESSAGES):
            await ws.send(f"message {number}")
            check(await ws.recv() == f"{request.id} message {number}", "the text of another WebSocket")
        data = _random_body(request)
        await ws.send(data)
        check(await ws.recv() == request.id.encode() + data, "the bytes of another WebSocket")


async def _get_large(request: Request, size: int, *, slowly: bool = False) -> None:
    await request.connection.send(request.head("GET", f"/large/{request.id}/{size}"))
    await _expect_body(request, pattern(request.id, size), slowly=slowly)


def _random_body(request: Request) -> bytes:
    return pattern(request.id, request.random.randint(0, BODY))


async def _expect_body(request: Request, body: bytes, *, slowly: bool = False) -> None:
    answer = await request.connection.read_answer(slowly=slowly)
    if answer.status != 200:
        raise Unexpected(f"{answer.status} {answer.body[:100]!r}")
    check(answer.body == body, f"a body of {len(answer.body)} bytes that is not ours: {answer.body[:40]!r}")


async def _expect_echo(request: Request, body: bytes) -> None:
    answer = await request.connection.read_answer()
    if answer.status != 200:
        raise Unexpected(f"{answer.status} {answer.body[:100]!r}")
    check(answer.headers.get("x-id") == request.id, f"the answer to {answer.headers.get('x-id')}")
    check(answer.headers.get("x-sha256") == hashlib.sha256(body).hexdigest(), "our body arrived damaged")
    check(answer.body == body, "our body came back damaged")


# The visitors one would rather not have.


async def vanish(request: Request) -> None:
    """Leave in the middle: of the head, of the body, of the answer."""
    body = request.head("POST", f"/echo/{request.id}", "Content-Length: 100000") + bytes(50_000)
    long_answer = request.head("GET", f"/large/{request.id}/{LARGE[1]}")
    begun = request.random.choice([body[:20], body, long_answer])
    await request.connection.send(begun)
    if begun is long_answer:
        await request.connection.reader.readexactly(1000)
    if request.random.random() < 0.5:
        request.connection.reset()


_GARBAGE = [
    b"GET /hostile/ HTTP/1.1\r\n\r\n",
    b"GET /hostile/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /hostile/ HTTP/7.1\r\nHost: a\r\n\r\n",
    b"GET /hostile/\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /hostile/ HTTP/1.1\r\nHost: a\r\nName : value\r\n\r\n",
    b"GET /hostile/ HTTP/1.1\r\nHost: a\r\nName: one\r\n two\r\n\r\n",
    b"POST /hostile/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /hostile/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS client\r\n\r\n",
    b"\r\n\r\n\xff\xfe\xfd what is this\r\n\r\n",
]


async def garbage(request: Request) -> None:
    await request.connection.send(request.random.choice(_GARBAGE))
    await _expect_refusal(request, 400)


async def huge_head(request: Request) -> None:
    await request.connection.send(request.head("GET", "/hostile/", f"Padding: {'x' * HUGE_HEAD}"))
    await _expect_refusal(request, 431)


async def app_raises(request: Request) -> None:
    await request.connection.send(request.head("GET", f"/raise/{request.id}"))
    answer = await request.connection.read_answer()
    if answer.status != 500:
        raise Unexpected(f"{answer.status} {answer.body[:100]!r}")
    check(answer.body == b"Internal Server Error", f"not what uvicorn says: {answer.body!r}")


async def app_raises_late(request: Request) -> None:
    """The answer breaks off, and one can see that it does."""
    await request.connection.send(request.head("GET", f"/raise-late/{request.id}"))
    status, headers = await request.connection.read_head()
    check((status, headers.get("content-length")) == (200, "1000"), f"the answer to another: {status} {headers}")
    body = await request.connection.reader.read(-1)
    check(body == request.id.encode(), f"not our bytes: {body!r}")


async def _expect_refusal(request: Request, status: int) -> None:
    data = await request.connection.reader.read(-1)
    if not data:
        raise Unexpected("closed without an answer")
    if not data.startswith(b"HTTP/1.1 %d " % status):
        raise Wrong(f"{status} was due, but it was {data[:100]!r}")


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to visit. ``weight`` is how often, ``requests`` how many it makes; some use a connection up."""

    perform: Callable[[Request], Awaitable[None]]
    weight: int
    requests: int = 1
    fresh: bool = False
    closes: bool = False

    @property
    def name(self) -> str:
        return self.perform.__name__


MEETING = Kind(small, 0)
"""What all visitors do first, to be connected at the same time."""

GOOD_KINDS = [
    Kind(small, 44),
    Kind(large, 5),
    Kind(slow_reader, 2),
    Kind(post, 14),
    Kind(chunked, 8),
    Kind(upload, 2),
    Kind(pipelined, 8, requests=2),
    Kind(events, 5),
    Kind(websocket, 5, fresh=True, closes=True),
]

FAULTY_KINDS = [
    Kind(vanish, 3, closes=True),
    Kind(garbage, 3, closes=True),
    Kind(huge_head, 1, closes=True),
    Kind(app_raises, 2, closes=True),
    Kind(app_raises_late, 2, closes=True),
]
