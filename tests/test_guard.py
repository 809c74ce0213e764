"""The guard alone, on a virtual clock and a wire that only records; and once over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from tests.support import run_async, run_virtually, served, visiting
from tunnel_asgi.guard import LAST_CALL, Timeouts, guarded, guarded_websocket
from tunnel_asgi.strict import FRAMING_LIMIT, HEAD_LIMIT
from tunnel_asgi.transport import TunnelTransport

PARSERS = ["h11", "httptools"]
WEBSOCKETS = ["websockets-sansio", "wsproto"]

KEEP_ALIVE = 5.0  # seconds; uvicorn's default
TIMEOUTS = Timeouts(first_byte=10, head=20, body=30)

HOST = b"Host: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = (
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
)

parsers = pytest.mark.parametrize("parser", PARSERS)


class Wire:
    """Records what is sent to the visitor."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.released = asyncio.Event()
        self.writable = True
        self.buffered = 0

    def send_data(self, data: bytes | memoryview) -> None:
        self.sent += data

    def send_eof(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def release(self) -> None:
        self.released.set()


class App:
    """Reads the whole body, then answers; keeps what it saw. It echoes WebSocket messages."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self._echo(receive, send)
            return
        self.headers = scope["headers"]
        body = await read_body(receive)
        if body is None:
            return
        self.seen.append((scope["method"], scope["path"], body))
        await respond(send, b"answer to " + scope["path"].encode())

    async def _echo(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})


async def read_body(receive: Any) -> bytes | None:
    """The whole body; None if the visitor went away before its end."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += bytes(message["body"])
        if not message["more_body"]:
            return body
    return None


async def respond(send: Any, body: bytes = b"") -> None:
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


class Line:
    """One visitor connection with a guarded protocol at its end."""

    def __init__(
        self, parser: str, app: Any, *, timeouts: Timeouts = TIMEOUTS, limit_body: int = 0, **options: Any
    ) -> None:
        protocol = guarded(parser, timeouts, limit_body=limit_body)
        given = {"lifespan": "off", "log_config": None, "date_header": False, "ws_ping_interval": None} | options
        config = uvicorn.Config(app, http=protocol, **given)
        config.load()
        self.state = ServerState()
        self.loop = asyncio.get_running_loop()
        self.protocol: Any = protocol(  # type: ignore[call-arg]
            config=config, server_state=self.state, app_state={}, _loop=self.loop
        )
        self.wire = Wire()
        self.transport = TunnelTransport(self.wire, self.protocol, extra={"peername": ("192.0.2.1", 0)}, loop=self.loop)
        self.transport.start()

    async def send(self, *pieces: bytes) -> None:
        """Let pieces arrive, each in a loop iteration of its own, and let the app do what it can do at once."""
        for piece in filter(None, pieces):
            self.transport.feed_data(piece)
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)

    async def wait_closed(self) -> float:
        """Until the connection is closed; at what time of the virtual clock."""
        await self.wire.released.wait()
        now = self.loop.time()
        await asyncio.sleep(0.001)  # for connection_lost and what the app does then
        assert not self.state.connections, "the server counts a connection that is gone"
        assert not self.state.tasks
        return now

    @property
    def open(self) -> bool:
        return not self.transport.is_closing()

    @property
    def statuses(self) -> list[int]:
        """Of every response so far."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.wire.sent)]


def request(*lines: bytes, start: bytes = b"GET / HTTP/1.1", host: bytes = HOST, body: bytes = b"") -> bytes:
    return start + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def post(*lines: bytes, body: bytes = b"", path: bytes = b"/") -> bytes:
    return request(*lines, start=b"POST " + path + b" HTTP/1.1", body=body)


def chunked(body: bytes) -> bytes:
    return post(CHUNKED, body=body)


# Whatever stands after it in the same piece would be the smuggled request.
MALFORMED: dict[str, bytes] = {
    "length and encoding": post(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
    "encoding and length": post(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n"),
    "two equal lengths": post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"),
    "two lengths": post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello"),
    "two lengths, cases": post(b"content-length: 5", b"CONTENT-LENGTH: 5", body=b"hello"),
    "length as a list": post(b"Content-Length: 5, 5", body=b"hello"),
    "length as a list of two": post(b"Content-Length: 5, 6", body=b"hello"),
    "length with a plus": post(b"Content-Length: +5", body=b"hello"),
    "length with a minus": post(b"Content-Length: -5", body=b"hello"),
    "length with a space": post(b"Content-Length: 5 5", body=b"hello"),
    "length with an underscore": post(b"Content-Length: 1_0", body=b"hello"),
    "length in hex": post(b"Content-Length: 0x5", body=b"hello"),
    "length empty": post(b"Content-Length:", body=b"hello"),
    "length of 64 bits and one": post(b"Content-Length: 18446744073709551616", body=b"hello"),
    "length huge": post(b"Content-Length: 1" + b"0" * 30, body=b"hello"),
    "length not ASCII": post("Content-Length: \uff15".encode(), body=b"hello"),
    "encoding unknown": post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "encoding not chunked last": post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "encoding gzip, chunked": post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "encoding quoted": post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"),
    "encoding identity": post(b"Transfer-Encoding: identity", body=b""),
    "encoding empty": post(b"Transfer-Encoding:", body=b"0\r\n\r\n"),
    "encoding with a vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"),
    "two encodings": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "two encodings, one hidden": post(CHUNKED, b"Transfer-Encoding: x", body=b"0\r\n\r\n"),
    "encoding in HTTP/1.0": request(CHUNKED, start=b"POST / HTTP/1.0", body=b"0\r\n\r\n"),
    "chunk size in hex": chunked(b"0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk size negative": chunked(b"-1\r\nabc\r\n0\r\n\r\n"),
    "chunk size with a plus": chunked(b"+3\r\nabc\r\n0\r\n\r\n"),
    "chunk size with a letter": chunked(b"3g\r\nabc\r\n0\r\n\r\n"),
    "chunk size empty": chunked(b"\r\nabc\r\n0\r\n\r\n"),
    "chunk size after a space": chunked(b" 3\r\nabc\r\n0\r\n\r\n"),
    "chunk size before a space": chunked(b"3 \r\nabc\r\n0\r\n\r\n"),
    "chunk size before a tab": chunked(b"3\t\r\nabc\r\n0\r\n\r\n"),
    "chunk size of 68 bits": chunked(b"FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n"),
    "chunk size huge": chunked(b"F" * 40 + b"\r\nabc\r\n0\r\n\r\n"),
    "chunk size before LF": chunked(b"3\nabc\r\n0\r\n\r\n"),
    "chunk extension empty": chunked(b"3;\r\nabc\r\n0\r\n\r\n"),
    "chunk extension with CR": chunked(b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
    "chunk extension with LF": chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"),
    "chunk extension with NUL": chunked(b"3;a\0b\r\nabc\r\n0\r\n\r\n"),
    "chunk before LF": chunked(b"3\r\nabc\n0\r\n\r\n"),
    "chunk too long": chunked(b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunk too short": chunked(b"3\r\nab\r\n0\r\n\r\n"),
    "last chunk before LF": chunked(b"3\r\nabc\r\n0\n\r\n"),
    "last chunk ended by LF": chunked(b"3\r\nabc\r\n0\r\n\n"),
    "last chunk before a space": chunked(b"3\r\nabc\r\n0 \r\n\r\n"),
    "trailer ended by LF": chunked(b"3\r\nabc\r\n0\r\nX: y\n\n"),
    "trailer folded": chunked(b"3\r\nabc\r\n0\r\nX: y\r\n z\r\n\r\n"),
    "trailer without colon": chunked(b"3\r\nabc\r\n0\r\nX y\r\n\r\n"),
    "trailer with NUL": chunked(b"3\r\nabc\r\n0\r\nX: \0\r\n\r\n"),
    "only LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "LF after the start line": b"GET / HTTP/1.1\nHost: x\r\n\r\n",
    "LF after a header": b"GET / HTTP/1.1\r\nHost: x\n\r\n",
    "LF at the end": b"GET / HTTP/1.1\r\nHost: x\r\n\n",
    "LF twice at the end": b"GET / HTTP/1.1\r\nHost: x\n\n",
    "CR in a value": request(b"X: a\rb"),
    "CR before CR LF": request(b"X: a\r"),
    "only CR": b"GET / HTTP/1.1\rHost: x\r\r",
    "folded by a space": request(b"X: a", b" b"),
    "folded by a tab": request(b"X: a", b"\tb"),
    "folded, empty before": request(b"X:", b" b"),
    "folded length": post(b"Content-Length:", b" 5", body=b"hello"),
    "folded first line": request(host=b" Host: x\r\n"),
    "space before the colon": request(b"X : a"),
    "tab before the colon": request(b"X\t: a"),
    "name empty": request(b": a"),
    "name with a parenthesis": request(b"X(y): a"),
    "name with a control character": request(b"X\x01: a"),
    "name with NUL": request(b"X\0y: a"),
    "name not ASCII": request("X\u00e9: a".encode()),
    "line without colon": request(b"Xa"),
    "value with NUL": request(b"X: a\0b"),
    "value with SOH": request(b"X: a\x01b"),
    "value with a vertical tab": request(b"X: a\x0bb"),
    "value with a form feed": request(b"X: a\x0cb"),
    "value with ESC": request(b"X: a\x1bb"),
    "value with DEL": request(b"X: a\x7fb"),
    "no Host": request(host=b""),
    "two Hosts": request(host=HOST + HOST),
    "two Hosts, different": request(host=HOST + b"Host: y\r\n"),
    "two Hosts in HTTP/1.0": request(start=b"GET / HTTP/1.0", host=HOST + HOST),
    "Host with a space": request(host=b"Host: x y\r\n"),
    "Host with a path": request(host=b"Host: x/y\r\n"),
    "Host with a user": request(host=b"Host: user@x\r\n"),
    "Host with a query": request(host=b"Host: x?y\r\n"),
    "Host with a fragment": request(host=b"Host: x#y\r\n"),
    "Host with a backslash": request(host=b"Host: x\\y\r\n"),
    "Host with two ports": request(host=b"Host: x:80:80\r\n"),
    "Host with a named port": request(host=b"Host: x:http\r\n"),
    "Host with half a bracket": request(host=b"Host: [::1\r\n"),
    "Host quoted": request(host=b'Host: "x"\r\n'),
    "Host not ASCII": request(host=b"Host: \xff\r\n"),
    "Host as a list": request(host=b"Host: x, y\r\n"),
    "target relative": request(start=b"GET a HTTP/1.1"),
    "target only a query": request(start=b"GET ?q HTTP/1.1"),
    "target missing": request(start=b"GET HTTP/1.1"),
    "target with a space": request(start=b"GET /a b HTTP/1.1"),
    "target with a tab": request(start=b"GET /a\tb HTTP/1.1"),
    "target with a form feed": request(start=b"GET /a\x0cb HTTP/1.1"),
    "target with DEL": request(start=b"GET /a\x7fb HTTP/1.1"),
    "target not ASCII": request(start=b"GET /\xff HTTP/1.1"),
    "query not ASCII": request(start=b"GET /?\xff HTTP/1.1"),
    "target with a fragment": request(start=b"GET /a#b HTTP/1.1"),
    "target of another host": request(start=b"GET http://y/a HTTP/1.1"),
    "target of another port": request(start=b"GET http://x:81/a HTTP/1.1"),
    "target with a user": request(start=b"GET http://user@x/a HTTP/1.1"),
    "target of another scheme": request(start=b"GET ftp://x/a HTTP/1.1"),
    "target absolute, no Host": request(start=b"GET http://x/a HTTP/1.0", host=b""),
    "target of an authority": request(start=b"GET x:443 HTTP/1.1"),
    "target of an asterisk": request(start=b"GET * HTTP/1.1"),
    "CONNECT": request(start=b"CONNECT x:443 HTTP/1.1"),
    "CONNECT to a path": request(start=b"CONNECT / HTTP/1.1"),
    "method malformed": request(start=b"GE(T / HTTP/1.1"),
    "tab after the method": request(start=b"GET\t/ HTTP/1.1"),
    "space before the method": request(start=b" GET / HTTP/1.1"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9 spelled out": request(start=b"GET / HTTP/0.9"),
    "HTTP/1.2": request(start=b"GET / HTTP/1.2"),
    "HTTP/2.0": request(start=b"GET / HTTP/2.0"),
    "HTTP/9.9": request(start=b"GET / HTTP/9.9"),
    "HTTP/1.10": request(start=b"GET / HTTP/1.10"),
    "HTTP/11": request(start=b"GET / HTTP/11"),
    "HTTP in lower case": request(start=b"GET / http/1.1"),
    "space after the version": request(start=b"GET / HTTP/1.1 "),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "WebSocket without a key": request(*UPGRADE[:2], UPGRADE[3]),
    "WebSocket by POST": post(*UPGRADE),
    "WebSocket with a control character": request(*UPGRADE, b"X: a\x01b"),
    "WebSocket of no version": request(*UPGRADE[:3]),
}

# What may come first, and what is too large.
TOO_LARGE: dict[str, tuple[bytes, bytes]] = {
    "a huge URL": (b"", request(start=b"GET /" + b"a" * HEAD_LIMIT + b" HTTP/1.1")),
    "a huge value": (b"", request(b"X: " + b"a" * HEAD_LIMIT)),
    "a huge name": (b"", request(b"a" * HEAD_LIMIT + b": x")),
    "many headers": (b"", request(*[b"X: a"] * (HEAD_LIMIT // 6))),
    "a head without end": (b"", request(b"X: " + b"a" * 2 * HEAD_LIMIT)[:-4]),
    "a start line without end": (b"", b"GET /" + b"a" * 2 * HEAD_LIMIT),
    "a trailer without end": (chunked(b"3\r\nabc\r\n0\r\n"), b"X: " + b"a" * 2 * HEAD_LIMIT),
    "a chunk extension without end": (chunked(b"3"), b";" + b"a" * 2 * HEAD_LIMIT),
}

ORDINARY: dict[str, tuple[bytes, tuple[str, str, bytes]]] = {
    "a path": (request(start=b"GET /a%20b?c=d HTTP/1.1"), ("GET", "/a b", b"")),
    "odd but visible": (request(start=b'GET /"<>\\^`{|}[] HTTP/1.1'), ("GET", '/"<>\\^`{|}[]', b"")),
    "two slashes": (request(start=b"GET //x/y HTTP/1.1"), ("GET", "//x/y", b"")),
    "absolute form": (request(start=b"GET http://x/a HTTP/1.1"), ("GET", "/a", b"")),
    "absolute form, secure, cases": (request(start=b"GET HTTPS://X/a HTTP/1.1"), ("GET", "/a", b"")),
    "absolute form without a path": (request(start=b"GET http://x HTTP/1.1"), ("GET", "/", b"")),
    "absolute form, only a query": (request(start=b"GET http://x?q HTTP/1.1"), ("GET", "/", b"")),
    "asterisk form": (request(start=b"OPTIONS * HTTP/1.1"), ("OPTIONS", "*", b"")),
    "HEAD": (request(start=b"HEAD / HTTP/1.1"), ("HEAD", "/", b"")),
    "HTTP/1.0": (request(start=b"GET / HTTP/1.0"), ("GET", "/", b"")),
    "HTTP/1.0 without Host": (request(start=b"GET / HTTP/1.0", host=b""), ("GET", "/", b"")),
    # RFC 9112 section 3.2: the field must be there; RFC 3986 lets a host be empty.
    "an empty Host": (request(host=b"Host:\r\n"), ("GET", "/", b"")),
    "a Host with a port": (request(host=b"Host: x.example:8443\r\n"), ("GET", "/", b"")),
    "a Host with an address": (request(host=b"Host: [2001:db8::1]:80\r\n"), ("GET", "/", b"")),
    "a Host with spaces around": (request(host=b"Host:\t x \t\r\n"), ("GET", "/", b"")),
    "a value not ASCII": (request("X: \u00e9".encode(), b"Y: \xff\x80"), ("GET", "/", b"")),
    "a value with a tab": (request(b"X: a\tb"), ("GET", "/", b"")),
    "an empty value": (request(b"X:"), ("GET", "/", b"")),
    "a length": (post(b"Content-Length: 5", body=b"hello"), ("POST", "/", b"hello")),
    "a length with zeros": (post(b"Content-Length: 0005", body=b"hello"), ("POST", "/", b"hello")),
    "a length before white space": (post(b"Content-Length: 5 \t", body=b"hello"), ("POST", "/", b"hello")),
    "a length of zero": (post(b"Content-Length: 0"), ("POST", "/", b"")),
    "no length": (post(), ("POST", "/", b"")),
    "chunks": (chunked(b"3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"), ("POST", "/", b"abcd")),
    "chunks, other case": (
        post(b"tRANSFER-eNCODING: cHUNKED", body=b"3\r\nabc\r\n0\r\n\r\n"),
        ("POST", "/", b"abc"),
    ),
    "no chunks": (chunked(b"0\r\n\r\n"), ("POST", "/", b"")),
    "a chunk size with zeros": (chunked(b"00000000000000000003\r\nabc\r\n000\r\n\r\n"), ("POST", "/", b"abc")),
    "chunk sizes in hex": (
        chunked(b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n"),
        ("POST", "/", b"0123456789" * 2),
    ),
    "chunk extensions": (chunked(b'3;a=b;c="d"\r\nabc\r\n0;e\r\n\r\n'), ("POST", "/", b"abc")),
    "chunks of line ends": (chunked(b"4\r\n\r\n\r\n\r\n0\r\n\r\n"), ("POST", "/", b"\r\n\r\n")),
    "trailers": (chunked(b"3\r\nabc\r\n0\r\nX: y\r\nZ:\r\n\r\n"), ("POST", "/", b"abc")),
    "an upgrade that is none": (request(UPGRADE[0], *UPGRADE[2:]), ("GET", "/", b"")),
    "a large head": (request(b"X: " + b"a" * (HEAD_LIMIT - 1000)), ("GET", "/", b"")),
    "two thousand headers": (request(*[b"X: %d" % number for number in range(2000)]), ("GET", "/", b"")),
}

LEADING = b"\r\n" + request()

UNKNOWN_UPGRADE = (b"Upgrade: h2c", b"Connection: Upgrade")

# What the parsers themselves do differently, out of the guard's reach or beyond its task: statuses per parser.
DIFFERENT: dict[str, tuple[bytes, list[int], list[int]]] = {
    # RFC 9112 section 2.2 asks to ignore an empty line before the start line; h11 does not.
    "an empty line first": (LEADING, [400], [200]),
    "a bare LF first": (b"\n" + request(), [400], [200]),
    "an empty line between": (post(b"Content-Length: 5", body=b"hello\r\n") + NEXT, [200, 400], [200, 200]),
    # llhttp knows its methods by heart.
    "a method of one's own": (request(start=b"FOO / HTTP/1.1"), [200], [400]),
    "a method in lower case": (request(start=b"get / HTTP/1.1"), [200], [400]),
    "two spaces": (request(start=b"GET  / HTTP/1.1"), [400], [200]),
    "RTSP": (request(start=b"GET / RTSP/1.0"), [400], [200]),
    # h11 judges a head when it is complete, so this one runs into the deadline.
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", [408], [400]),
    # llhttp drops what follows an upgrade, so it is the last request of the connection.
    "an unknown upgrade": (request(*UNKNOWN_UPGRADE) + NEXT, [200, 200], [200]),
    # It drops the body, too, and the app must not take the request for complete.
    "an unknown upgrade with a body": (post(*UNKNOWN_UPGRADE, b"Content-Length: 5", body=b"hello"), [200], [400]),
    "one in chunks": (post(*UNKNOWN_UPGRADE, CHUNKED, body=b"1\r\nx\r\n0\r\n\r\n"), [200], [400]),
    "one of no bytes": (post(*UNKNOWN_UPGRADE, b"Content-Length: 0"), [200], [200]),
    # The refusal of a pipelined head is only a close there.
    "a bad head behind a good one": (request() + request(b"Bad header"), [200, 400], [200]),
}


def bytewise(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]


def halves(data: bytes) -> list[bytes]:
    return [data[: len(data) // 2], data[len(data) // 2 :]]


async def statuses_of(parser: str, pieces: Sequence[bytes]) -> list[int]:
    line = Line(parser, App())
    await line.send(*pieces)
    await line.wait_closed()
    return line.statuses


@parsers
@pytest.mark.parametrize("cut", [lambda data: [data], bytewise])
@pytest.mark.parametrize("name", MALFORMED)
@run_virtually
async def test_a_malformed_request_gets_one_4xx_and_a_close_and_hides_no_other(
    name: str, cut: Callable[[bytes], list[bytes]], parser: str
) -> None:
    app = App()
    line = Line(parser, app)
    await line.send(*cut(MALFORMED[name] + NEXT))
    closed_at = await line.wait_closed()
    assert [status // 100 for status in line.statuses] == [4]
    assert b"connection: close" in line.wire.sent.lower()
    assert closed_at < 0.1, "it waited for something"
    assert app.seen == []


@parsers
@pytest.mark.parametrize("size", [1000, 64 * 1024, 1024 * 1024])
@pytest.mark.parametrize("name", TOO_LARGE)
@run_virtually
async def test_a_head_of_more_than_64_kib_is_refused_in_any_pieces(name: str, size: int, parser: str) -> None:
    app = App()
    line = Line(parser, app)
    first, data = TOO_LARGE[name]
    await line.send(first, *[data[n : n + size] for n in range(0, len(data), size)])
    closed_at = await line.wait_closed()
    assert line.statuses == [431]
    assert closed_at < 0.1
    assert app.seen == []


@parsers
@pytest.mark.parametrize("cut", [lambda data: [data], halves, bytewise])
@pytest.mark.parametrize("name", ORDINARY)
@run_virtually
async def test_an_ordinary_request_is_served(name: str, cut: Callable[[bytes], list[bytes]], parser: str) -> None:
    data, expected = ORDINARY[name]
    app = App()
    line = Line(parser, app)
    await line.send(*cut(data))
    assert line.statuses == [200]
    assert app.seen == [expected]
    await line.wait_closed()
    assert line.statuses == [200]


@pytest.mark.parametrize("name", DIFFERENT)
@run_virtually
async def test_this_is_where_the_parsers_differ(name: str) -> None:
    data, h11_statuses, httptools_statuses = DIFFERENT[name]
    assert await statuses_of("h11", [data]) == h11_statuses
    assert await statuses_of("httptools", [data]) == httptools_statuses


@parsers
@settings(deadline=None)
@given(
    names=st.lists(
        st.sampled_from([name for name in ORDINARY if "1.0" not in name and "large" not in name]), max_size=5
    ),
    cuts=st.lists(st.integers(0, 2000)),
)
def test_any_pieces_of_a_pipeline_give_the_same_answers(parser: str, names: list[str], cuts: list[int]) -> None:
    @run_virtually
    async def run() -> None:
        requests = [ORDINARY[name] for name in names]
        data = b"".join(data for data, _ in requests)
        ends = sorted({cut for cut in cuts if cut < len(data)} | {0, len(data)})
        app = App()
        line = Line(parser, app)
        await line.send(*[data[a:b] for a, b in itertools.pairwise(ends)])
        await line.wait_closed()
        assert app.seen == [expected for _, expected in requests]
        assert line.statuses == [200] * len(requests)

    run()


@parsers
@settings(deadline=None)
@given(data=st.binary(max_size=200), position=st.integers(0, 200))
def test_no_bytes_break_the_guard(parser: str, data: bytes, position: int) -> None:
    @run_virtually
    async def run() -> None:
        good = chunked(b"3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n") + request(*UPGRADE)
        line = Line(parser, App())
        await line.send(good[:position] + data + good[position:])
        line.transport.feed_eof()
        await line.wait_closed()

    run()


@parsers
@run_async
async def test_no_hostile_request_hurts_the_next_visitor(parser: str) -> None:
    app = App()
    async with served(app, http=parser, lifespan="off") as site, site.client() as client:
        too_large = {name: first + data for name, (first, data) in TOO_LARGE.items()}
        for name, data in (MALFORMED | too_large).items():
            async with visiting(site.relay) as visitor:
                await visitor.send(data + NEXT)
                answer = await visitor.read_all()
            assert answer.count(b"HTTP/1.1 ") == 1, name
            assert answer.startswith(b"HTTP/1.1 4"), name
            assert app.seen == [], name
            assert (await client.get("/")).text == "answer to /", name
            app.seen.clear()


# Requests behind one another


@parsers
@run_virtually
async def test_the_head_of_a_request_may_be_as_large_behind_a_large_body(parser: str) -> None:
    line = Line(parser, app := App())
    head = request(b"X: " + b"a" * 50_000)
    await line.send(post(b"Content-Length: 50000", body=b"a" * 50_000) + head[:30_000], head[30_000:])
    assert line.statuses == [200, 200]
    assert len(app.seen) == 2
    line.transport.abort()
    await line.wait_closed()


@parsers
@run_virtually
async def test_many_pipelined_requests_are_not_taken_for_a_large_head(parser: str) -> None:
    line = Line(parser, App())
    data = NEXT * 5000
    pieces = [data[n : n + 64 * 1024] for n in range(0, len(data), 64 * 1024)]
    await line.send(*pieces)
    await line.wait_closed()
    assert line.statuses == [200] * 5000


class Gated:
    """Answers each path only when told to."""

    def __init__(self, *paths: str) -> None:
        self.gates = {path: asyncio.Event() for path in paths}
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.seen.append(path)
        body = await read_body(receive)
        await self.gates[path].wait()
        if body is not None:
            await respond(send, b"answer to " + path.encode())


def get(path: bytes, *lines: bytes) -> bytes:
    return request(*lines, start=b"GET " + path + b" HTTP/1.1")


@parsers
@pytest.mark.parametrize(
    "bad",
    [
        get(b"/bad", b"Bad header"),
        get(b"bad"),
        post(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n", path=b"/bad"),
        get(b"/bad", *UPGRADE[:2]),
    ],
)
@run_virtually
async def test_a_good_request_is_answered_in_full_before_the_malformed_one_behind_it(parser: str, bad: bytes) -> None:
    app = Gated("/1", "/2")
    line = Line(parser, app)
    await line.send(get(b"/1") + get(b"/2") + bad + NEXT, NEXT)
    assert line.statuses == []
    app.gates["/1"].set()
    await line.send()
    assert bytes(line.wire.sent).endswith(b"answer to /1")
    app.gates["/2"].set()
    await line.wait_closed()
    good, _, rest = bytes(line.wire.sent).partition(b"answer to /1")
    assert good.startswith(b"HTTP/1.1 200 ")
    assert b"answer to /2" in rest
    assert line.statuses[:2] == [200, 200]
    assert line.statuses[2:] in ([], [400])
    assert app.seen == ["/1", "/2"]


@parsers
@run_virtually
async def test_a_malformed_body_is_refused_after_the_answers_to_those_before_it(parser: str) -> None:
    app = Gated("/1", "/2", "/")
    line = Line(parser, app)
    await line.send(get(b"/1") + get(b"/2") + chunked(b"3\r\nabc\r\n") + b"no!\r\n\r\n" + NEXT)
    for path in ("/1", "/2"):
        app.gates[path].set()
        await line.send()
    app.gates["/"].set()
    await line.wait_closed()
    assert line.statuses == [200, 200, 400]
    assert bytes(line.wire.sent).count(b"answer to ") == 2


@parsers
@run_virtually
async def test_what_follows_a_last_request_is_ignored_while_it_is_answered(parser: str) -> None:
    app = Gated("/1")
    line = Line(parser, app)
    await line.send(get(b"/1", b"Connection: close"), NEXT, b"garbage\r\n")
    app.gates["/1"].set()
    await line.wait_closed()
    assert line.statuses == [200]
    assert bytes(line.wire.sent).endswith(b"answer to /1")
    assert app.seen == ["/1"]


@run_virtually
async def test_trailers_never_pass_for_headers() -> None:
    for parser in PARSERS:
        line = Line(parser, app := App())
        await line.send(chunked(b"3\r\nabc\r\n0\r\nAuthorization: stolen\r\nHost: y\r\n\r\n"))
        assert app.headers == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
        await line.wait_closed()


@pytest.mark.parametrize(
    "framed",
    [
        lambda size: b"3;" + b"e" * (size - 4) + b"\r\nabc\r\n0\r\n\r\n",
        lambda size: b"3\r\nabc\r\n0\r\nX: " + b"t" * (size - 12) + b"\r\n\r\n",
    ],
    ids=["chunk extension", "trailers"],
)
@pytest.mark.parametrize(("excess", "status"), [(0, 200), (1, 400)])
@run_virtually
async def test_what_surrounds_the_bytes_of_a_chunk_has_a_limit(
    framed: Callable[[int], bytes], excess: int, status: int
) -> None:
    line = Line("h11", App())
    await line.send(chunked(framed(FRAMING_LIMIT + excess)))
    assert line.statuses == [status]
    line.transport.abort()


@parsers
@run_virtually
async def test_the_limit_of_the_head_is_an_option(parser: str) -> None:
    for limit, status in ((2000, 431), (200_000, 200)):
        line = Line(parser, App(), h11_max_incomplete_event_size=limit)
        size = 3000 if limit == 2000 else 100_000
        await line.send(request(b"X: " + b"a" * size))
        assert line.statuses == [status]
        await line.wait_closed()


# After the answer has begun


async def begin(scope: Any, receive: Any, send: Any) -> None:
    """Answers in two parts, the second once the body is read or the visitor is gone."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await read_body(receive)
    await send({"type": "http.response.body", "body": b"ended"})


@parsers
@run_virtually
async def test_a_malformed_body_after_the_answer_began_only_closes(parser: str) -> None:
    line = Line(parser, begin)
    await line.send(chunked(b"3\r\nabc\r\n"))
    await line.send(b"no!\r\n")
    await line.wait_closed()
    assert line.statuses == [200]
    assert b"begun" in line.wire.sent
    assert b"ended" not in line.wire.sent


async def hasty(scope: Any, receive: Any, send: Any) -> None:
    """Answers without a look at the body."""
    await respond(send, b"no, thanks")


@parsers
@run_virtually
async def test_a_malformed_body_after_the_answer_only_closes(parser: str) -> None:
    line = Line(parser, hasty)
    await line.send(chunked(b"3\r\nabc\r\n"))
    await line.send(b"no!\r\n")
    await line.wait_closed()
    assert line.statuses == [200]


@parsers
@run_virtually
async def test_the_rest_of_a_body_nobody_wants_is_skipped(parser: str) -> None:
    line = Line(parser, hasty)
    await line.send(chunked(b"3\r\nabc\r\n"), b"3\r\nabc\r\n0\r\n\r\n" + NEXT)
    assert line.statuses == [200, 200]
    await line.wait_closed()


# WebSockets


@parsers
@pytest.mark.parametrize("ws", WEBSOCKETS)
@run_virtually
async def test_an_upgrade_is_accepted_and_no_deadline_counts_any_more(parser: str, ws: str) -> None:
    line = Line(parser, App(), ws=ws)
    await line.send(request(*UPGRADE))
    assert line.statuses == [101]
    await asyncio.sleep(86_400)
    await line.send(b"\x81\x82\0\0\0\0hi")
    assert bytes(line.wire.sent).endswith(b"\x81\x02hi")
    line.transport.feed_eof()
    await line.wait_closed()


@parsers
@pytest.mark.parametrize("ws", WEBSOCKETS)
@pytest.mark.parametrize(
    "lines",
    [
        [b"X: a"] * 200,
        [b"Cookie: " + b"a" * 20_000],
        [b"Content-Length: 5"],
        [CHUNKED],
    ],
)
@run_virtually
async def test_an_upgrade_the_websocket_library_finds_odd_is_answered_all_the_same(
    parser: str, ws: str, lines: list[bytes]
) -> None:
    line = Line(parser, App(), ws=ws)
    await line.send(request(*UPGRADE, *lines))
    if ws == "wsproto":
        assert line.statuses == [101]
        line.transport.feed_eof()
        await line.wait_closed()
        return
    assert await line.wait_closed() == 0
    assert line.statuses == [400]


@parsers
@pytest.mark.parametrize("ws", WEBSOCKETS)
@run_virtually
async def test_an_upgrade_is_ready_for_what_came_with_it(parser: str, ws: str) -> None:
    line = Line(parser, App(), ws=ws)
    await line.send(request(*UPGRADE) + NEXT)
    assert line.statuses == [101]
    line.transport.feed_eof()
    await line.wait_closed()
    assert line.statuses == [101]


@parsers
@run_virtually
async def test_an_upgrade_behind_an_unanswered_request_never_mixes_with_its_answer(parser: str) -> None:
    app = Gated("/1", "/ws")
    line = Line(parser, app)
    await line.send(get(b"/1") + get(b"/ws", *UPGRADE))
    app.gates["/1"].set()
    app.gates["/ws"].set()
    await line.wait_closed()
    assert line.statuses[0] == 200
    assert bytes(line.wire.sent).partition(b"answer to /1")[2][:12] in (b"", b"HTTP/1.1 500")


@parsers
@run_virtually
async def test_an_upgrade_after_an_answer_is_accepted(parser: str) -> None:
    line = Line(parser, App())
    await line.send(request())
    await line.send(request(*UPGRADE))
    assert line.statuses == [200, 101]
    await asyncio.sleep(60)
    assert line.open
    line.transport.feed_eof()
    await line.wait_closed()


# Deadlines


@parsers
@run_virtually
async def test_a_silent_visitor_is_closed_without_an_answer(parser: str) -> None:
    line = Line(parser, App())
    assert await line.wait_closed() == TIMEOUTS.first_byte
    assert line.wire.sent == b""


@parsers
@run_virtually
async def test_a_head_must_end_in_time_however_busily_it_is_dribbled(parser: str) -> None:
    line = Line(parser, App())
    started = line.loop.time()
    await asyncio.sleep(9)
    for piece in bytewise(request(b"X: " + b"a" * 100)):
        if not line.open:
            break
        await line.send(piece)
        await asyncio.sleep(1)
    assert await line.wait_closed() - started == pytest.approx(9 + TIMEOUTS.head, abs=1)
    assert line.statuses == [408]


@parsers
@run_virtually
async def test_every_head_has_a_deadline_of_its_own(parser: str) -> None:
    line = Line(parser, app := App())
    await line.send(NEXT[:10])
    for _ in range(20):
        await asyncio.sleep(4)
        await line.send(NEXT[10:] + NEXT[:10])
    assert len(app.seen) == 20
    await line.wait_closed()


@parsers
@run_virtually
async def test_a_head_has_no_more_time_because_a_body_or_the_first_byte_had_more(parser: str) -> None:
    for timeouts in (Timeouts(first_byte=60, head=10, body=5), Timeouts(first_byte=5, head=10, body=60)):
        line = Line(parser, App(), timeouts=timeouts)
        await line.send(post(b"Content-Length: 5"), b"hello")
        assert line.statuses == [200]
        begun = line.loop.time()
        await line.send(b"G")
        assert await line.wait_closed() == begun + 10
        assert line.statuses == [200, 408]


@run_virtually
async def test_empty_lines_do_not_buy_time() -> None:
    line = Line("httptools", App())
    await line.send(b"\r\n")
    assert await line.wait_closed() == TIMEOUTS.head
    assert line.statuses == [408]

    line = Line("httptools", App())
    started = line.loop.time()
    await line.send(request())
    while line.open:
        await line.send(b"\r\n")
        await asyncio.sleep(1)
    assert await line.wait_closed() - started <= TIMEOUTS.head + 1
    assert line.statuses == [200, 408]


@parsers
@pytest.mark.parametrize("begun", [b"", b"3\r\nabc\r\n", b"3\r\nab", b"3\r\nabc\r\n0\r\nX: "])
@run_virtually
async def test_a_body_that_stalls_gets_408(parser: str, begun: bytes) -> None:
    line = Line(parser, app := App())
    await line.send(chunked(begun))
    assert await line.wait_closed() == TIMEOUTS.body
    assert line.statuses == [408]
    assert app.seen == []


@parsers
@run_virtually
async def test_a_body_may_take_long_while_it_goes_on(parser: str) -> None:
    line = Line(parser, app := App())
    await line.send(post(b"Content-Length: 100"))
    for _ in range(100):
        await asyncio.sleep(25)
        await line.send(b"x")
    assert app.seen == [("POST", "/", b"x" * 100)]
    await line.wait_closed()


def sleepy(seconds: float) -> Callable[..., Awaitable[None]]:
    """Sleeps before it reads the body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(seconds)
        body = await read_body(receive)
        if body is not None:
            await respond(send, str(len(body)).encode())

    return app


@parsers
@run_virtually
async def test_a_visitor_is_not_punished_for_an_app_that_is_slow_to_read(parser: str) -> None:
    line = Line(parser, sleepy(1000))
    size = 200 * 1024
    await line.send(post(b"Content-Length: %d" % size), *[b"x" * 1024] * 100)
    assert not line.transport.is_reading()
    await asyncio.sleep(1000.1)
    await line.send(b"x" * 1024 * 100)
    assert line.statuses == [200]
    assert bytes(line.wire.sent).endswith(str(size).encode())
    await line.wait_closed()


@parsers
@run_virtually
async def test_a_visitor_who_waits_for_100_continue_is_not_punished_until_it_is_sent(parser: str) -> None:
    line = Line(parser, sleepy(1000))
    await line.send(post(b"Content-Length: 5", b"Expect: 100-continue"))
    await asyncio.sleep(999)
    assert line.wire.sent == b""
    await asyncio.sleep(1.1)
    assert line.statuses == [100]
    closed_at = await line.wait_closed()
    assert 1000 < closed_at <= 1000 + 2 * TIMEOUTS.body
    assert line.statuses == [100, 408]


@parsers
@run_virtually
async def test_a_visitor_is_not_punished_while_the_app_answers(parser: str) -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await asyncio.sleep(10)
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

    line = Line(parser, endless)
    await line.send(post(b"Content-Length: 5"))
    await asyncio.sleep(1001)
    assert b"end" in line.wire.sent
    await line.wait_closed()
    assert line.statuses == [200]


@parsers
@run_virtually
async def test_a_body_nobody_wants_cannot_hold_the_connection(parser: str) -> None:
    line = Line(parser, hasty)
    await line.send(post(b"Content-Length: 1000000"))
    assert line.statuses == [200]
    await line.send(b"x")  # ends uvicorn's keep-alive timer
    assert await line.wait_closed() <= 2 * TIMEOUTS.body
    assert line.statuses == [200]


@parsers
@run_virtually
async def test_a_pipelined_body_that_stalls_gets_408_after_the_answer_before_it(parser: str) -> None:
    app = Gated("/1", "/2")
    line = Line(parser, app)
    await line.send(get(b"/1") + post(b"Content-Length: 5", path=b"/2"))
    await asyncio.sleep(1000)
    assert line.open
    app.gates["/1"].set()
    app.gates["/2"].set()
    assert await line.wait_closed() <= 1000 + 2 * TIMEOUTS.body
    assert line.statuses == [200, 408]


@parsers
@run_virtually
async def test_a_visitor_is_not_punished_for_a_head_we_do_not_read(parser: str) -> None:
    app = Gated("/1", "/2", "/next")
    line = Line(parser, app)
    await line.send(get(b"/1") + get(b"/2") + NEXT[:20], NEXT[20:])
    await asyncio.sleep(1000)
    for gate in app.gates.values():
        gate.set()
    await line.send()
    await asyncio.sleep(0.1)
    assert line.statuses == [200, 200, 200]
    await line.wait_closed()


@parsers
@run_virtually
async def test_a_head_that_stalls_behind_an_unanswered_request_costs_only_the_connection(parser: str) -> None:
    app = Gated("/1")
    line = Line(parser, app)
    await line.send(get(b"/1") + NEXT[:20])
    await asyncio.sleep(1000)
    assert line.open
    app.gates["/1"].set()
    assert await line.wait_closed() <= 1000 + KEEP_ALIVE
    assert line.statuses == [200]
    assert bytes(line.wire.sent).endswith(b"answer to /1")


@parsers
@run_virtually
async def test_zero_turns_a_deadline_off(parser: str) -> None:
    line = Line(parser, app := App(), timeouts=Timeouts(first_byte=0, head=0, body=0))
    for piece in (b"POST / HTTP/1.1\r\n", b"Host: x\r\nContent-Length: 2\r\n\r\n", b"h", b"i"):
        await asyncio.sleep(86_400)
        assert line.open
        await line.send(piece)
    assert app.seen == [("POST", "/", b"hi")]
    await line.wait_closed()


@parsers
@run_virtually
async def test_between_requests_the_keep_alive_timer_of_uvicorn_counts(parser: str) -> None:
    line = Line(parser, App())
    await line.send(request())
    started = line.loop.time()
    assert await line.wait_closed() - started == pytest.approx(KEEP_ALIVE, abs=0.01)
    assert line.statuses == [200]


@parsers
@run_virtually
async def test_a_visitor_is_idle_from_its_answer_to_the_next_byte_of_a_request(parser: str) -> None:
    line = Line(parser, App())
    seen = [line.protocol.idle_since]  # a silent one has a deadline of its own
    await asyncio.sleep(3)
    for data in (get(b"/1"), get(b"/2")[:3], get(b"/2")[3:]):
        await line.send(data)
        await asyncio.sleep(1)
        seen.append(line.protocol.idle_since)
    assert seen == [None, 3, None, 5]
    line.transport.abort()


@parsers
@pytest.mark.parametrize("rest", [b"", get(b"/2"), get(b"/2")[:-2], post(b"Content-Length: 3", body=b"ab")])
@run_virtually
async def test_a_visitor_is_not_idle_while_a_request_is_answered_or_only_half_there(parser: str, rest: bytes) -> None:
    app = Gated("/1", "/2", "/")
    line = Line(parser, app)
    await line.send(get(b"/1") + rest)
    assert line.protocol.idle_since is None
    app.gates["/1"].set()
    await line.send(b"")
    for _ in range(20):
        await asyncio.sleep(0)
    assert (line.protocol.idle_since is None) is bool(rest)
    line.transport.abort()


@parsers
@run_virtually
async def test_no_timer_outlives_the_connection(parser: str) -> None:
    line = Line(parser, App())
    await line.send(NEXT[:5])
    line.transport.abort()
    await line.wait_closed()
    await asyncio.sleep(100)
    assert line.wire.sent == b""


# The size of a body

LIMIT = 10  # bytes


class Listener:
    """Writes down every message it receives; answers when the body is complete."""

    def __init__(self, *, answers_first: bool = False) -> None:
        self.answers_first = answers_first
        self.messages: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.answers_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while not self.messages or self.messages[-1].get("more_body"):
            self.messages.append(await receive())
        if self.messages[-1]["type"] == "http.request":
            await respond(send, b"all")


def chunk(size: int) -> bytes:
    return b"%x\r\n" % size + b"b" * size + b"\r\n"


@parsers
@pytest.mark.parametrize("body", [b"b" * LIMIT, b""])
@run_virtually
async def test_a_body_of_the_limit_is_served_however_it_is_framed(parser: str, body: bytes) -> None:
    app = App()
    line = Line(parser, app, limit_body=LIMIT)
    await line.send(post(b"Content-Length: %d" % len(body), body=body))
    await line.send(chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"))
    assert line.statuses == [200, 200]
    assert [seen for _, _, seen in app.seen] == [body, body]
    line.transport.abort()


@parsers
@pytest.mark.parametrize("lines", [(), (b"Expect: 100-continue",)])
@run_virtually
async def test_a_content_length_above_the_limit_gets_413_and_reaches_no_app(
    parser: str, lines: Sequence[bytes]
) -> None:
    app = App()
    line = Line(parser, app, limit_body=LIMIT)
    await line.send(get(b"/1"), post(b"Content-Length: %d" % (LIMIT + 1), *lines, body=b"b"))
    await line.wait_closed()
    assert line.statuses == [200, 413]
    assert b"too large" in line.wire.sent
    assert [path for _, path, _ in app.seen] == ["/1"]


@parsers
@run_virtually
async def test_a_chunked_body_that_grows_above_the_limit_gets_413_and_the_app_sees_a_disconnect(parser: str) -> None:
    app = Listener()
    line = Line(parser, app, limit_body=LIMIT)
    await line.send(chunked(chunk(6)), chunk(4))
    assert [len(message["body"]) for message in app.messages] == [6, 4]
    await line.send(chunk(1) + b"0\r\n\r\n" + NEXT)
    await line.wait_closed()
    assert line.statuses == [413]
    assert app.messages[2:] == [{"type": "http.disconnect"}]


@parsers
@run_virtually
async def test_what_comes_too_late_or_at_once_never_makes_a_truncated_body_look_complete(parser: str) -> None:
    app = Listener()
    line = Line(parser, app, limit_body=LIMIT)
    await line.send(chunked(chunk(6) + chunk(6) + b"0\r\n\r\n"))
    await line.wait_closed()
    assert line.statuses == [413]
    assert app.messages == [{"type": "http.disconnect"}]


@parsers
@run_virtually
async def test_a_body_above_the_limit_under_an_answer_that_has_begun_only_closes(parser: str) -> None:
    app = Listener(answers_first=True)
    line = Line(parser, app, limit_body=LIMIT)
    await line.send(chunked(chunk(LIMIT)), chunk(1))
    await line.wait_closed()
    assert line.statuses == [200]
    assert app.messages[-1] == {"type": "http.disconnect"}


@parsers
@run_virtually
async def test_a_pipelined_body_above_the_limit_is_refused_after_the_answer_before_it(parser: str) -> None:
    app = Gated("/1", "/")
    line = Line(parser, app, limit_body=LIMIT)
    await line.send(get(b"/1") + chunked(chunk(LIMIT + 1) + b"0\r\n\r\n"))
    app.gates["/1"].set()
    app.gates["/"].set()
    await line.wait_closed()
    assert line.statuses == [200, 413]


# Shutdown


@parsers
@pytest.mark.parametrize("data", [request(host=b""), chunked(b"no!\r\n"), request(b"Bad header")])
@run_virtually
async def test_a_shutdown_while_a_refusal_is_on_its_way_is_harmless(parser: str, data: bytes) -> None:
    line = Line(parser, App())
    line.wire.writable = False
    await line.send(data)
    line.protocol.shutdown()
    line.wire.writable = True
    line.transport.wire_writable()
    await line.wait_closed()
    assert line.statuses == [400]


@parsers
@run_virtually
async def test_a_shutdown_closes_an_idle_connection_and_lets_a_request_finish(parser: str) -> None:
    line = Line(parser, App())
    await line.send(request())
    line.protocol.shutdown()
    await line.wait_closed()

    app = Gated("/1")
    line = Line(parser, app)
    await line.send(get(b"/1"))
    line.protocol.shutdown()
    assert line.open
    app.gates["/1"].set()
    await line.wait_closed()
    assert line.statuses == [200]


@parsers
@pytest.mark.parametrize("before", [b"", b"G", request()[:-1], request() + request()[:-1]])
@pytest.mark.parametrize("timeouts", [TIMEOUTS, Timeouts(0, 0, 0)])
@run_virtually
async def test_a_request_that_is_on_its_way_at_a_shutdown_is_answered_and_is_the_last(
    parser: str, before: bytes, timeouts: Timeouts
) -> None:
    line = Line(parser, App(), timeouts=timeouts)
    await line.send(before)
    line.protocol.shutdown()
    assert line.open
    await asyncio.sleep(0.9)
    rest = request()[len(before) % len(request()) :]
    await line.send(rest[:-1], rest[-1:])
    await line.wait_closed()
    assert set(line.statuses) == {200}


@parsers
@pytest.mark.parametrize("timeouts", [TIMEOUTS, Timeouts(0, 0, 0)])
@run_virtually
async def test_a_shutdown_does_not_wait_long_for_a_visitor_who_says_nothing(parser: str, timeouts: Timeouts) -> None:
    line = Line(parser, App(), timeouts=timeouts)
    line.protocol.shutdown()
    assert await line.wait_closed() == LAST_CALL
    assert line.statuses == []


@parsers
@pytest.mark.parametrize("ws", WEBSOCKETS)
@run_virtually
async def test_an_upgrade_that_is_on_its_way_at_a_shutdown_does_not_hold_it_up(parser: str, ws: str) -> None:
    line = Line(parser, App(), ws=ws)
    line.protocol.shutdown()
    await line.send(request(*UPGRADE))
    await line.wait_closed()
    assert line.wire.sent.startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("ws", WEBSOCKETS)
@run_virtually
async def test_a_shutdown_while_a_websocket_closes_is_harmless(ws: str) -> None:
    line = Line("h11", App(), ws=ws)
    config = line.protocol.config
    line.protocol.ws_protocol_class = guarded_websocket(config.ws_protocol_class)
    await line.send(request(*UPGRADE))
    line.wire.writable = False
    await line.send(b"\x88\x82\0\0\0\0\x03\xe8")
    protocol: Any = line.transport.get_protocol()
    protocol.shutdown()
    line.wire.writable = True
    line.transport.wire_writable()
    await line.wait_closed()
    assert bytes(line.wire.sent).endswith(b"\x88\x02\x03\xe8")


def test_the_classes_keep_the_names_of_what_they_guard() -> None:
    assert [guarded(parser, TIMEOUTS).__name__ for parser in PARSERS] == [
        "GuardedH11Protocol",
        "GuardedHttpToolsProtocol",
    ]
    assert guarded("h11", TIMEOUTS).timeouts == TIMEOUTS  # type: ignore[attr-defined]
