"""What an app may do under uvicorn, end to end: visitor, relay, tunnel, uvicorn's protocols, app."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

import tunnel_asgi
from tests.support import (
    DOMAIN,
    KEY_ID,
    KEYS,
    SECRET,
    TEST_TIMEOUT,
    Served,
    Visitor,
    make_server,
    make_tls_contexts,
    run_async,
    served,
    visiting,
)
from tunnel_asgi.errors import (
    AppLoadFailed,
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    LifespanFailed,
    NoCredits,
    TunnelError,
)
from tunnel_asgi.relay import Relay
from tunnel_asgi.server import Config, Server

MIB = 1024 * 1024

parsers = pytest.mark.parametrize("http", ["h11", "httptools"])
websocket_libraries = pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto", "auto"])


class App:
    """Gives each path to a handler; lifespan is logged in ``life``."""

    def __init__(self, **handlers: Callable[..., Any]) -> None:
        self.handlers = handlers
        self.scopes: list[dict[str, Any]] = []
        self.life: list[str] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        self.scopes.append(scope)
        await self.handlers[scope["path"].strip("/") or "index"](scope, receive, send)

    async def _live(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        scope["state"]["answer"] = 42
        self.life.append("startup")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        self.life.append("shutdown")
        await send({"type": "lifespan.shutdown.complete"})


async def start(send: Any, *, status: int = 200, **headers: str) -> None:
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})


async def write(send: Any, body: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def respond(send: Any, body: bytes = b"", *, status: int = 200) -> None:
    await start(send, status=status, content_length=str(len(body)))
    await write(send, body)


async def pieces(receive: Any) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        more = message["more_body"]
        yield message["body"]


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, b"hello")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, b"".join([piece async for piece in pieces(receive)]))


async def wait_for(predicate: Callable[[], bool]) -> None:
    """For what uvicorn tells nobody. Bounded by the test's own limit."""
    while not predicate():  # noqa: ASYNC110  (there is no event to wait for)
        await asyncio.sleep(0.005)


async def read_response(visitor: Visitor) -> tuple[int, dict[str, str], bytes]:
    """One response with a Content-Length, or without a body."""
    head = (await visitor.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
    return int(head[0].split()[1]), headers, await visitor.read(int(headers.get("content-length", 0)))


def get(path: str = "/", *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {DOMAIN}", *lines, "", ""]).encode()


# HTTP


@parsers
@run_async
async def test_a_connection_is_kept_for_many_requests(http: str) -> None:
    async with served(App(index=hello), http=http) as site, visiting(site.relay) as visitor:
        for _ in range(5):
            await visitor.send(get())
            assert (await read_response(visitor))[::2] == (200, b"hello")
        assert site.relay.visitors_served == 0
        await visitor.send(get("/", "Connection: close"))
        assert (await read_response(visitor))[1]["connection"] == "close"
        assert await visitor.read_all() == b""


@parsers
@run_async
async def test_pipelined_requests_are_answered_one_after_the_other(http: str) -> None:
    running = 0

    async def numbered(scope: Any, receive: Any, send: Any) -> None:
        nonlocal running
        assert running == 0
        running += 1
        body = b"".join([piece async for piece in pieces(receive)])
        await start(send, content_length=str(1 + len(body)))
        await write(send, scope["query_string"], more=True)
        await asyncio.sleep(0)
        running -= 1
        await write(send, body)

    async with served(App(index=numbered), http=http) as site, visiting(site.relay) as visitor:
        await visitor.send(get("/?0") + get("/?1", "Content-Length: 5", method="POST") + b"hello" + get("/?2"))
        assert [(await read_response(visitor))[2] for _ in range(3)] == [b"0", b"1hello", b"2"]


@parsers
@run_async
async def test_chunked_bodies_go_both_ways(http: str) -> None:
    async def shout(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        async for piece in pieces(receive):
            await write(send, piece.upper(), more=True)
        await write(send, b"")

    async def body() -> AsyncIterator[bytes]:
        for piece in (b"one ", b"two ", b"three"):
            yield piece

    async with served(App(index=shout), http=http) as site, site.client() as client:
        response = await client.post("/", content=body())
        assert response.request.headers["transfer-encoding"] == "chunked"
        assert response.headers["transfer-encoding"] == "chunked"
        assert response.text == "ONE TWO THREE"


@parsers
@run_async
async def test_100_continue_is_sent_when_the_app_reads(http: str) -> None:
    read = asyncio.Event()

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        await read.wait()
        await echo(scope, receive, send)

    async with served(App(index=patient), http=http) as site, visiting(site.relay) as visitor:
        await visitor.send(get("/", "Expect: 100-continue", "Content-Length: 5", method="POST"))
        await wait_for(lambda: bool(site.server.server_state.tasks))
        assert visitor.reader._buffer == b""  # type: ignore[attr-defined]
        read.set()
        assert (await visitor.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await visitor.send(b"hello")
        assert (await read_response(visitor))[::2] == (200, b"hello")


@parsers
@run_async
async def test_100_continue_is_not_sent_when_the_app_refuses(http: str) -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"no", status=403)

    async with served(App(index=refuse), http=http) as site, visiting(site.relay) as visitor:
        await visitor.send(get("/", "Expect: 100-continue", "Content-Length: 5", method="POST"))
        assert (await read_response(visitor))[::2] == (403, b"no")


@parsers
@run_async
async def test_what_has_no_body_sends_none(http: str) -> None:
    async def status(scope: Any, receive: Any, send: Any) -> None:
        await start(send, status=int(scope["query_string"]))
        await write(send, b"")

    async with served(App(index=status, hello=hello), http=http) as site, visiting(site.relay) as visitor:
        await visitor.send(get("/hello", method="HEAD"))
        head = await visitor.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 5\r\n" in head.lower()
        for number in (204, 304):
            await visitor.send(get(f"/?{number}"))
            code, headers, _ = await read_response(visitor)
            assert code == number
            assert "transfer-encoding" not in headers
        await visitor.send(get("/hello", "Connection: close"))
        assert (await read_response(visitor))[2] == b"hello"
        assert await visitor.read_all() == b""


@parsers
@run_async
async def test_each_event_of_a_stream_arrives_before_the_next_one_is_sent(http: str) -> None:
    arrived = [asyncio.Event() for _ in range(20)]

    async def events(scope: Any, receive: Any, send: Any) -> None:
        await start(send, content_type="text/event-stream")
        for number, event in enumerate(arrived):
            await write(send, f"data: {number}\n\n".encode(), more=True)
            await event.wait()
        await write(send, b"")

    async with served(App(index=events), http=http) as site, site.client() as client, client.stream("GET", "/") as sse:
        number = 0
        async for text in sse.aiter_text():
            assert text == f"data: {number}\n\n"
            arrived[number].set()
            number += 1
        assert number == len(arrived)


def letters(size: int) -> bytes:
    """Bytes in which no piece can be missing, doubled or moved unseen."""
    return b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(size // 32))


@parsers
@run_async
async def test_large_uploads_and_downloads_keep_every_byte(http: str) -> None:
    data = letters(6 * MIB)

    async def check(scope: Any, receive: Any, send: Any) -> None:
        digest = hashlib.sha256()
        async for piece in pieces(receive):
            digest.update(piece)
        await respond(send, digest.hexdigest().encode())

    async def download(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        for n in range(0, len(data), 100_000):
            await write(send, data[n : n + 100_000], more=True)
        await write(send, b"")

    async with served(App(index=check, download=download), http=http) as site, site.client() as client:
        up, down = await asyncio.gather(client.post("/", content=data), client.get("/download"))
        assert up.text == hashlib.sha256(data).hexdigest()
        assert down.content == data


@parsers
@run_async
async def test_an_app_must_wait_for_a_visitor_who_does_not_read(http: str) -> None:
    sent = 0
    piece = bytes(64 * 1024)
    total = 1024  # pieces: 64 MiB, more than all kernels on the way will hold
    finished = asyncio.Event()

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await start(send)
        for _ in range(total):
            await write(send, piece, more=True)
            sent += 1
        await write(send, b"")
        finished.set()

    async with served(App(index=flood), http=http) as site, visiting(site.relay) as visitor:
        visitor.pause()
        await visitor.send(get())
        [connection] = await one_connection(site)
        await wait_for(lambda: connection.flow is not None and connection.flow.write_paused)
        stuck = await settled(lambda: sent)
        assert stuck < total // 2
        assert connection.transport.get_write_buffer_size() < MIB
        visitor.resume()
        while not finished.is_set():
            await visitor.reader.read(MIB)
        assert sent == total


async def one_connection(site: Served) -> list[Any]:
    await wait_for(lambda: len(site.server.server_state.connections) == 1)
    return list(site.server.server_state.connections)


async def settled(value: Callable[[], int]) -> int:
    """The value once it has been the same for many iterations of the loop."""
    last, same = value(), 0
    while same < 50:
        await asyncio.sleep(0.002)
        now = value()
        last, same = now, same + 1 if now == last else 0
    return last


@parsers
@run_async
async def test_a_visitor_must_wait_for_an_app_that_does_not_read(http: str) -> None:
    read = asyncio.Event()
    data = letters(32 * MIB)

    async def lazy(scope: Any, receive: Any, send: Any) -> None:
        await read.wait()
        digest = hashlib.sha256()
        async for piece in pieces(receive):
            digest.update(piece)
        await respond(send, digest.hexdigest().encode())

    async with served(App(index=lazy), http=http) as site, visiting(site.relay) as visitor:
        visitor.writer.write(get("/", f"Content-Length: {len(data)}", method="POST") + data)
        [connection] = await one_connection(site)
        await wait_for(lambda: bool(connection.flow.read_paused))
        left = await settled(visitor.writer.transport.get_write_buffer_size)
        assert left > 0
        assert len(connection.cycle.body) < MIB
        read.set()
        assert (await read_response(visitor))[2].decode() == hashlib.sha256(data).hexdigest()


@parsers
@run_async
async def test_the_app_learns_that_the_visitor_is_gone(http: str) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        begun.set()
        assert (await receive())["type"] == "http.disconnect"
        await respond(send, b"to nobody")
        gone.set()

    async with served(App(index=wait, hello=hello), http=http) as site:
        async with visiting(site.relay) as visitor:
            await visitor.send(get())
            await begun.wait()
            visitor.reset()
        await gone.wait()
        async with site.client() as client:
            assert (await client.get("/hello")).text == "hello"


@parsers
@run_async
async def test_an_exception_in_the_app_is_a_500_and_the_next_visitor_is_fine(
    http: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a bug in the app")

    async def fail_late(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await write(send, b"half a respon", more=True)
        raise RuntimeError("a bug in the app")

    app = App(fail=fail, late=fail_late, index=hello)
    async with served(app, http=http) as site:
        async with visiting(site.relay) as visitor:
            await visitor.send(get("/fail"))
            answer = await visitor.read_all()
            assert answer.startswith(b"HTTP/1.1 500 ")
            assert b"bug" not in answer
        async with visiting(site.relay) as visitor:
            await visitor.send(get("/late"))
            answer = await visitor.read_all()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert not answer.endswith(b"0\r\n\r\n")
        async with site.client() as client:
            assert (await client.get("/")).text == "hello"
    assert caplog.text.count("RuntimeError: a bug in the app") == 2


@parsers
@run_async
async def test_work_in_the_background_goes_on_after_the_answer(http: str) -> None:
    answered, done = asyncio.Event(), asyncio.Event()

    async def background(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"later")
        await answered.wait()
        done.set()

    async with served(App(index=background), http=http) as site, site.client() as client:
        assert (await client.get("/")).text == "later"
        assert not done.is_set()
        answered.set()
        await done.wait()


# WebSockets


async def chat(scope: Any, receive: Any, send: Any) -> None:
    """Echoes; ``close <code>`` closes; the last subprotocol offered is taken."""
    assert (await receive())["type"] == "websocket.connect"
    offered = scope["subprotocols"]
    await send({"type": "websocket.accept", "subprotocol": offered[-1] if offered else None})
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        if text is not None and text.startswith("close "):
            await send({"type": "websocket.close", "code": int(text[6:]), "reason": "as you wish"})
        elif text is not None:
            await send({"type": "websocket.send", "text": text})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})
    scope["state"].setdefault("ends", []).append((message["code"], message.get("reason")))


@parsers
@websocket_libraries
@run_async
async def test_a_websocket_carries_text_bytes_and_large_messages_whole(http: str, ws: str) -> None:
    large = letters(3 * MIB)
    async with served(App(index=chat), http=http, ws=ws) as site, site.open_ws(max_size=None) as visitor:
        for message in ("text \u00e9 \U0001f680", b"\0bytes\xff", "", b"", large, large.hex()):
            await visitor.send(message)
            assert await visitor.recv() == message


@websocket_libraries
@run_async
async def test_a_fragmented_message_is_one_message(ws: str) -> None:
    async with served(App(index=chat), ws=ws) as site, site.open_ws(compression=None) as visitor:
        await visitor.send(["frag", "men", "", "ted"])
        assert await visitor.recv() == "fragmented"
        await visitor.send([b"a" * 100_000, b"b" * 100_000])
        assert await visitor.recv() == b"a" * 100_000 + b"b" * 100_000


@websocket_libraries
@run_async
async def test_a_subprotocol_is_negotiated(ws: str) -> None:
    async with served(App(index=chat), ws=ws) as site:
        async with site.open_ws(subprotocols=["one", "two"]) as visitor:
            assert visitor.subprotocol == "two"
        async with site.open_ws() as visitor:
            assert visitor.subprotocol is None


async def closed(visitor: ClientConnection) -> tuple[int, str]:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await visitor.recv()
    assert visitor.close_code is not None
    return visitor.close_code, visitor.close_reason or ""


@websocket_libraries
@run_async
async def test_close_codes_go_both_ways(ws: str) -> None:
    ends: list[tuple[int, str]] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["ends"] = ends
        await chat(scope, receive, send)

    async with served(App(index=note), ws=ws) as site:
        async with site.open_ws() as visitor:
            await visitor.send("close 4001")
            assert await closed(visitor) == (4001, "as you wish")
        async with site.open_ws() as visitor:
            await visitor.close(4002, "goodbye")
        await wait_for(lambda: len(ends) == 2)
    assert ends == [(4001, "as you wish"), (4002, "goodbye")]


@parsers
@websocket_libraries
@run_async
async def test_a_websocket_can_be_rejected(http: str, ws: str) -> None:
    async def reject(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.close"})

    async def explain(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/plain"), (b"x-why", b"members only")]
        await send({"type": "websocket.http.response.start", "status": 418, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"not ", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"you"})

    async with served(App(index=reject, explain=explain), http=http, ws=ws) as site:
        with pytest.raises(InvalidStatus) as rejected:
            await site.open_ws()
        assert rejected.value.response.status_code == 403
        with pytest.raises(InvalidStatus) as rejected:
            await site.open_ws("/explain")
        response = rejected.value.response
        assert (response.status_code, response.headers["x-why"]) == (418, "members only")
        assert b"".join([response.body or b""]) == b"not you"


@websocket_libraries
@run_async
async def test_an_exception_in_a_websocket_is_a_500_before_and_a_close_after_it_is_accepted(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a bug in the app")

    async def fail_late(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        raise RuntimeError("a bug in the app")

    async with served(App(fail=fail, late=fail_late, index=chat), ws=ws) as site:
        with pytest.raises(InvalidStatus) as rejected:
            await site.open_ws("/fail")
        assert rejected.value.response.status_code == 500
        async with site.open_ws("/late") as visitor:
            with pytest.raises(ConnectionClosed):
                await visitor.recv()
        async with site.open_ws() as visitor:
            await visitor.send("fine")
            assert await visitor.recv() == "fine"
    assert caplog.text.count("RuntimeError: a bug in the app") == 2


@websocket_libraries
@run_async
async def test_a_websocket_without_a_reader_makes_the_app_wait(ws: str) -> None:
    sent = 0
    total = 512
    piece = os.urandom(64 * 1024)

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await receive()
        await send({"type": "websocket.accept"})
        for _ in range(total):
            await send({"type": "websocket.send", "bytes": piece})
            sent += 1

    async with (
        served(App(index=flood), ws=ws) as site,
        site.open_ws(compression=None, max_queue=1, ping_interval=None) as visitor,
    ):
        stuck = await settled(lambda: sent)
        assert stuck < total
        for _ in range(total):
            assert await visitor.recv() == piece
    assert sent == total


# The scope


@parsers
@run_async
async def test_the_scope_tells_the_public_truth_and_not_what_a_visitor_claims(http: str) -> None:
    lies = {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Port": "81",
        "X-Real-IP": "203.0.113.9",
        "Forwarded": "for=203.0.113.9;proto=http;host=evil.example",
    }
    app = App(index=hello, chat=chat)
    async with served(app, http=http) as site:
        async with site.client(headers=lies) as client:
            await client.get("/")
        async with site.open_ws("/chat", additional_headers=lies):
            pass
    for scope, scheme in zip(app.scopes, ("https", "wss"), strict=True):
        assert scope["client"] == ("127.0.0.1", 0)  # whom CONNECT named
        assert scope["server"] == (str(DOMAIN), 443)
        assert scope["scheme"] == scheme
        assert scope["state"]["answer"] == 42
        assert scope["root_path"] == ""
        assert (b"x-forwarded-for", b"203.0.113.9") in scope["headers"]


@pytest.mark.parametrize(
    ("options", "scheme", "server"),
    [
        ({}, "https", (str(DOMAIN), 443)),
        ({"public_url": "https://app.example"}, "https", ("app.example", 443)),
        ({"public_url": "http://app.example:8080"}, "http", ("app.example", 8080)),
        ({"public_url": "https://[2001:db8::1]"}, "https", ("2001:db8::1", 443)),
    ],
)
@run_async
async def test_scheme_and_server_are_those_of_the_public_url(
    options: dict[str, str], scheme: str, server: tuple[str, int]
) -> None:
    app = App(index=hello)
    async with served(app, **options) as site, site.client() as client:
        await client.get("/")
    assert (app.scopes[0]["scheme"], app.scopes[0]["server"]) == (scheme, server)


@run_async
async def test_a_visitor_whose_address_is_unknown_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(index=hello)
    async with served(app, standby=1) as site, site.client() as client:
        [tunnel] = site.relay.tunnels
        send_connect = tunnel._side.send_connect

        def send_nonsense(ip: str, connection_id: str | None = None) -> str:
            return send_connect("unknown", connection_id)

        monkeypatch.setattr(tunnel._side, "send_connect", send_nonsense)
        await client.get("/")
    assert app.scopes[0]["client"] is None


@parsers
@run_async
async def test_every_visitor_has_a_state_of_its_own(http: str) -> None:
    async def mark(scope: Any, receive: Any, send: Any) -> None:
        seen = str(scope["state"]).encode()
        scope["state"]["mark"] = "mine"
        await respond(send, seen)

    async with served(App(index=mark), http=http) as site, site.client() as client:
        assert [(await client.get("/")).text for _ in range(2)] == ["{'answer': 42}"] * 2


@run_async
async def test_a_proxy_may_be_trusted_on_request() -> None:
    app = App(index=hello)
    async with served(app, proxy_headers=True) as site, site.client() as client:
        await client.get("/", headers={"X-Forwarded-For": "203.0.113.9"})
    assert app.scopes[0]["client"] == ("203.0.113.9", 0)


# uvicorn's options


@parsers
@run_async
async def test_root_path_and_headers_are_uvicorns(http: str) -> None:
    app = App(**{"api/x": hello})
    headers = [("X-Served-By", "a tunnel")]
    options: dict[str, Any] = {"root_path": "/api", "headers": headers, "server_header": False}
    async with served(app, http=http, **options) as site, site.client() as client:
        response = await client.get("/x")
    assert (app.scopes[0]["root_path"], app.scopes[0]["path"]) == ("/api", "/api/x")
    assert response.headers["x-served-by"] == "a tunnel"
    assert "date" in response.headers
    assert "server" not in response.headers


@parsers
@run_async
async def test_limit_concurrency_answers_503(http: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await go_on.wait()
        await respond(send, b"waited")

    async with served(App(index=hello, wait=wait), http=http, limit_concurrency=2) as site, site.client() as client:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(client.get("/wait"))
            await begun.wait()
            assert (await client.get("/")).status_code == 503
            go_on.set()
        assert waiting.result().text == "waited"
        assert (await client.get("/")).text == "hello"


@run_async
async def test_limit_max_requests_ends_the_server_in_good_order() -> None:
    app = App(index=hello)
    async with served(app, limit_max_requests=2) as site:
        async with site.client() as client:
            for _ in range(2):
                assert (await client.get("/")).text == "hello"
        await asyncio.wait({site.task})
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_timeout_keep_alive_closes_an_idle_connection() -> None:
    async with served(App(index=hello), timeout_keep_alive=0.01) as site, visiting(site.relay) as visitor:
        await visitor.send(get())
        assert (await read_response(visitor))[2] == b"hello"
        assert await visitor.read_all() == b""
        await site.relay.wait_for_waiting(2)  # recycled


@parsers
@run_async
async def test_a_visitor_between_two_requests_makes_room_when_every_websocket_is_taken(http: str) -> None:
    release = asyncio.Event()

    async def hold(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await respond(send, b"held")

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        server = make_server(App(index=hello, hold=hold), relay, http=http, standby=1)
        assert server.config.tunnel is not None
        server.config.tunnel = dataclasses.replace(server.config.tunnel, max_connections=2)
        serving = asyncio.create_task(server.serve())
        async with visiting(relay) as busy, visiting(relay) as idle, visiting(relay) as late:
            await busy.send(get("/hold"))
            await idle.send(get())
            assert (await read_response(idle))[2] == b"hello"
            await late.send(get())
            assert await idle.read_all() == b""
            await idle.close()
            assert (await read_response(late))[2] == b"hello"
            release.set()
            assert (await read_response(busy))[2] == b"held"
        server.should_exit = True
        await serving
        assert relay.violations == []


@parsers
@run_async
async def test_a_body_above_the_limit_gets_413_and_the_next_visitor_an_answer(http: str) -> None:
    async with served(App(index=echo), http=http, limit_body=1000) as site, site.client() as client:

        async def grow() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b"b" * 100

        for body in (b"b" * 1001, grow()):
            assert (await client.post("/", content=body)).status_code == 413
        assert (await client.post("/", content=b"b" * 1000)).content == b"b" * 1000


@run_async
async def test_the_deadlines_are_options() -> None:
    async with served(
        App(index=echo), timeout_first_byte=0.02, timeout_request_head=0.02, timeout_request_body=0.02
    ) as site:
        for data, expected in [
            (b"", b""),
            (get()[:-2], b"HTTP/1.1 408 "),
            (get("/", "Content-Length: 5", method="POST"), b"HTTP/1.1 408 "),
        ]:
            async with visiting(site.relay) as visitor:
                await visitor.send(data)
                assert (await visitor.read_all())[:13] == expected


@pytest.fixture
def logging_state() -> Iterator[None]:
    """Whatever a test does to logging is undone."""
    names = ["", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "tunnel_asgi"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.handlers[:], logger.propagate, logger.disabled) for logger in loggers]
    yield
    for logger, (level, handlers, propagate, disabled) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate, logger.disabled = propagate, disabled


@pytest.mark.usefixtures("logging_state")
@pytest.mark.parametrize("access_log", [True, False])
@run_async
async def test_the_access_log_can_be_switched_off(access_log: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"log_config": tunnel_asgi.server.logging_config(), "access_log": access_log}
    async with served(App(index=hello), **options) as site, site.client() as client:
        await client.get("/")
    captured = capsys.readouterr()
    assert ('127.0.0.1:0 - "GET / HTTP/1.1" 200' in captured.out) is access_log
    assert "Waiting for application startup" in captured.err


@pytest.mark.usefixtures("logging_state")
@pytest.mark.parametrize(("level", "expected"), [("warning", logging.WARNING), ("debug", logging.DEBUG), (5, 5)])
def test_the_log_level_counts_for_the_tunnel_too(level: str | int, expected: int) -> None:
    config(App(), log_level=level, log_config=None)
    assert logging.getLogger("tunnel_asgi").level == expected


@pytest.mark.usefixtures("logging_state")
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [("log.json", "{", "Expecting property name"), ("log.ini", "[loggers]", "it lacks 'formatters'")],
)
def test_a_log_config_that_cannot_be_used_is_named(name: str, text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"the log configuration '{path}' cannot be used: {reason}"):
        config(App(), log_config=str(path))


def test_a_log_level_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no log level 'loud': it is one of critical, error, "):
        config(App(), log_level="loud")


def test_without_a_log_config_logging_is_left_alone() -> None:
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "tunnel_asgi"):
        logging.getLogger(name).handlers.clear()
    config(App(), log_config=None)
    assert not logging.getLogger("tunnel_asgi").handlers
    assert not logging.getLogger("uvicorn").handlers
    config(App())
    assert logging.getLogger("tunnel_asgi").handlers
    assert logging.getLogger("tunnel_asgi").level == logging.INFO


@run_async
async def test_the_public_url_is_logged_once_visitors_can_come(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        relay.hang()
        server = make_server(App(index=hello), relay)
        task = asyncio.create_task(server.serve())
        await relay.wait_until(lambda relay: relay.dials > 0)
        assert "Serving at" not in caplog.text
        assert not server.started
        relay.accept()
        await wait_for(lambda: server.started)
        assert caplog.text.count(f"Serving at https://{DOMAIN} (Press CTRL+C to quit)") == 1
        server.should_exit = True
        await task


# Life


@run_async
async def test_a_lifespan_that_fails_ends_it_before_anything_is_dialled(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})
        await asyncio.Event().wait()

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        with pytest.raises(LifespanFailed):
            await make_server(app, relay).serve()
        assert relay.dials == 0
    assert "no database" in caplog.text


@run_async
async def test_a_lifespan_that_raises_counts_only_if_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await hello(scope, receive, send)

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        with pytest.raises(LifespanFailed):
            await make_server(app, relay, lifespan="on").serve()
        assert relay.dials == 0
    for lifespan in ("auto", "off"):
        async with served(app, lifespan=lifespan) as site, site.client() as client:
            assert (await client.get("/")).text == "hello"


@run_async
async def test_cancelling_while_the_app_starts_leaves_nothing() -> None:
    starting, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            starting.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        task = asyncio.create_task(make_server(app, relay).serve())
        await starting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        assert relay.dials == 0


@run_async
async def test_cancelling_shuts_down_cleanly() -> None:
    app = App(index=hello)
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        server = make_server(app, relay)
        task = asyncio.create_task(server.serve())
        await relay.wait_for_waiting(2)
        async with visiting(relay) as visitor:
            await visitor.send(get())
            await read_response(visitor)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert app.life == ["startup", "shutdown"]
            assert await visitor.read_all() == b""
        await relay.wait_until(lambda relay: not relay.tunnels)
        assert relay.violations == []
        assert not server.server_state.connections


@run_async
async def test_cancelling_twice_does_not_wait_for_visitors_and_leaves_nothing_either() -> None:
    begun = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with Relay(keys=KEYS, domain=DOMAIN) as relay, visiting(relay) as visitor:
        server = make_server(App(index=endless), relay, timeout_graceful_shutdown=None)
        task = asyncio.create_task(server.serve())
        await visitor.send(get())
        await begun.wait()
        task.cancel()
        await wait_for(lambda: server.pool is not None and not server.pool.accepting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await relay.wait_until(lambda relay: not relay.tunnels)
        await wait_for(lambda: not server.server_state.tasks)


@run_async
async def test_should_exit_may_be_set_by_any_thread() -> None:
    app = App(index=hello)
    async with served(app) as site:
        thread = threading.Thread(target=lambda: setattr(site.server, "should_exit", True))
        thread.start()
        thread.join()
        await site.task
    site.server.should_exit = True  # harmless afterwards
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_should_exit_before_the_start_serves_nobody() -> None:
    app = App()
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        server = make_server(app, relay)
        server.should_exit = True
        await server.serve()
        assert relay.dials == 0
    assert app.life == ["startup", "shutdown"]
    assert not server.started


@run_async
async def test_should_exit_ends_the_wait_for_a_server_that_cannot_be_reached() -> None:
    app = App()
    async with Relay(keys=KEYS) as relay:
        relay.hang()
        server = make_server(app, relay)
        task = asyncio.create_task(server.serve())
        await relay.wait_until(lambda relay: relay.dials > 0)
        server.should_exit = True
        await task
    assert app.life == ["startup", "shutdown"]
    assert not server.started


@run_async
async def test_a_server_that_comes_later_is_found(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    app = App(index=hello)
    started = asyncio.Event()
    url = f"ws://127.0.0.1:{port}/tunnels"
    server = Server(config(app, server_url=url, log_config=None), on_started=started.set)
    task = asyncio.create_task(server.serve())
    await wait_for(lambda: "cannot reach the tunnel server" in caplog.text)
    assert not started.is_set()
    async with Relay(keys=KEYS, domain=DOMAIN, tunnel_port=port) as relay:
        await started.wait()
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(relay.url)).text == "hello"
        server.should_exit = True
        await task
    assert caplog.text.count("cannot reach the tunnel server") == 1


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AuthenticationFailed), (403, AuthenticationFailed), (402, NoCredits), (404, BadRequest)]
)
@run_async
async def test_a_refusal_for_good_is_raised_and_never_exits_the_process(status: int, kind: type[TunnelError]) -> None:
    app = App()
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        relay.refuse(status)
        with pytest.raises(kind) as raised:
            await make_server(app, relay).serve()
        assert SECRET not in str(raised.value)
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_a_config_may_be_loaded_beforehand() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        relay.refuse(402)
        server = make_server(App(), relay)
        server.config.load()
        with pytest.raises(NoCredits):
            await server.serve()


@run_async
async def test_serve_is_the_same_in_one_call() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        app = App(index=hello)
        task = asyncio.create_task(
            tunnel_asgi.serve(
                app, domain=str(DOMAIN), key=SECRET, key_id=KEY_ID, server_url=relay.server_url, log_config=None
            )
        )
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(relay.url)).text == "hello"
        relay.refuse(402)
        for tunnel in list(relay.tunnels):
            tunnel.cut()
        with pytest.raises(NoCredits):
            await task
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_a_failure_while_running_is_raised_when_the_last_visitor_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = App(index=chat)
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        server = make_server(app, relay)
        task = asyncio.create_task(server.serve())
        await relay.wait_for_waiting(2)
        async with Served(relay, server, task).open_ws() as visitor:
            relay.refuse(401)
            for tunnel in [tunnel for tunnel in relay.tunnels if tunnel.state == "waiting"]:
                tunnel.cut()
            await wait_for(lambda: "no new visitors can come" in caplog.text)
            for _ in range(3):
                await visitor.send("still there?")
                assert await visitor.recv() == "still there?"
                await asyncio.sleep(0.1)  # a tick of uvicorn's main loop
            assert not task.done()
        with pytest.raises(AuthenticationFailed):
            await task
        assert relay.violations == []
    assert caplog.text.count("no new visitors can come") == 1
    assert app.life == ["startup", "shutdown"]


# Signals


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """Signals that uvicorn raises again at the end, as it should."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers]
    yield seen
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@parsers
def test_a_signal_lets_requests_finish_and_tells_websockets_1012(
    number: signal.Signals, http: str, caught: list[int]
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await go_on.wait()
        await respond(send, b"finished")

    app = App(slow=slow, chat=chat)

    @run_async
    async def run() -> None:
        async with served(app, http=http) as site, site.client() as client:
            request = asyncio.create_task(client.get("/slow"))
            await begun.wait()
            async with site.open_ws("/chat") as visitor:
                os.kill(os.getpid(), number)
                assert await closed(visitor) == (1012, "")
            assert not site.task.done()
            go_on.set()
            assert (await request).text == "finished"
            await site.task

    run()
    assert app.life == ["startup", "shutdown"]
    assert caught == [number]


@parsers
@run_async
async def test_whoever_reached_the_app_is_answered_while_it_drains_and_whoever_did_not_is_told_by_the_relay(
    http: str,
) -> None:
    app = App(index=hello)
    answers: list[bytes] = []

    async def come_again_and_again(relay: Relay, server: Server) -> None:
        while not server.should_exit:
            for _ in range(3):  # the last of them come while it drains
                async with visiting(relay) as visitor:
                    await visitor.send(get("/", "Connection: close"))
                    answers.append(await visitor.read_all())

    async with Relay(keys=KEYS, domain=DOMAIN, hold_timeout=0.1) as relay:
        server = make_server(app, relay, http=http, standby=4)
        serving = asyncio.create_task(server.serve())
        await relay.wait_for_waiting(4)
        guests = [asyncio.create_task(come_again_and_again(relay, server)) for _ in range(20)]
        await relay.wait_until(lambda relay: relay.visitors_served > 200)
        server.should_exit = True
        await asyncio.gather(*guests)
        await serving
        assert relay.violations == []
    statuses = [answer[9:12] for answer in answers]
    assert set(statuses) <= {b"200", b"502", b"503"}
    assert statuses.count(b"200") == len(app.scopes), "a request reached the app, and its answer not the visitor"
    assert all(answer.endswith(b"hello") for answer in answers if answer[9:12] == b"200")


def test_a_graceful_shutdown_is_bounded(caught: list[int], caplog: pytest.LogCaptureFixture) -> None:
    app = App(index=stream_for_ever, chat=stubborn_chat)

    @run_async
    async def run() -> None:
        async with served(app, timeout_graceful_shutdown=0.05) as site, site.client() as client:
            async with client.stream("GET", "/") as response, site.open_ws("/chat") as visitor:
                lines = response.aiter_lines()
                assert await anext(lines) == "tick"
                os.kill(os.getpid(), signal.SIGTERM)
                assert await closed(visitor) == (1012, "")
                with pytest.raises(httpx.RemoteProtocolError):
                    await anext(lines)
            await site.task

    run()
    assert "timeout graceful shutdown exceeded" in caplog.text
    assert app.life == ["startup", "shutdown"]
    assert caught == [signal.SIGTERM]


async def stream_for_ever(scope: Any, receive: Any, send: Any) -> None:
    await start(send)
    await write(send, b"tick\n", more=True)
    await asyncio.Event().wait()


async def stubborn_chat(scope: Any, receive: Any, send: Any) -> None:
    """Does not read, so it does not learn that it is over."""
    await receive()
    await send({"type": "websocket.accept"})
    await asyncio.Event().wait()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_waits_for_nobody(second: signal.Signals, caught: list[int]) -> None:
    app = App(index=stream_for_ever)

    @run_async
    async def run() -> None:
        async with (
            served(app, timeout_graceful_shutdown=3600) as site,
            site.client() as client,
            client.stream("GET", "/") as response,
        ):
            lines = response.aiter_lines()
            assert await anext(lines) == "tick"
            os.kill(os.getpid(), signal.SIGINT)
            await wait_for(lambda: site.server.should_exit)
            assert not site.task.done()
            os.kill(os.getpid(), second)
            with pytest.raises(httpx.TransportError):
                await anext(lines)
            await site.task

    run()
    assert app.life == ["startup"]
    assert caught == [second, signal.SIGINT]


def test_a_second_signal_does_not_wait_for_a_lifespan_that_hangs(caught: list[int]) -> None:
    ending = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        ending.set()
        await asyncio.Event().wait()

    @run_async
    async def run() -> None:
        async with served(app) as site:
            os.kill(os.getpid(), signal.SIGINT)
            await ending.wait()
            os.kill(os.getpid(), signal.SIGINT)
            await site.task

    run()
    assert caught == [signal.SIGINT, signal.SIGINT]


def test_a_third_signal_breaks_off_an_app_that_blocks_the_loop(caught: list[int]) -> None:
    async def block(scope: Any, receive: Any, send: Any) -> None:
        while True:
            signal.raise_signal(signal.SIGINT)

    @run_async
    async def run() -> None:
        async with served(App(index=block)) as site, site.client() as client:
            with contextlib.suppress(httpx.TransportError):  # it may see a 500 or a close
                await client.get("/")
            await site.task

    run()
    assert caught == [signal.SIGINT] * 3


def test_a_signal_while_the_server_cannot_be_reached_ends_it(caught: list[int]) -> None:
    app = App()

    @run_async
    async def run() -> None:
        async with Relay(keys=KEYS) as relay:
            relay.refuse(503)
            task = asyncio.create_task(make_server(app, relay).serve())
            await relay.wait_until(lambda relay: relay.refused > 0)
            os.kill(os.getpid(), signal.SIGINT)
            await task

    run()
    assert app.life == ["startup", "shutdown"]
    assert caught == [signal.SIGINT]


def test_a_signal_while_the_app_is_imported_is_not_lost(caught: list[int]) -> None:
    app = App()

    def create() -> App:
        os.kill(os.getpid(), signal.SIGINT)
        return app

    @run_async
    async def run() -> None:
        async with Relay(keys=KEYS, domain=DOMAIN) as relay:
            await make_server(create, relay, factory=True).serve()
            assert relay.dials == 0

    run()
    assert app.life == ["startup", "shutdown"]
    assert caught == [signal.SIGINT]


def test_two_signals_while_the_app_is_imported_wait_for_nothing(caught: list[int]) -> None:
    app = App()

    def create() -> App:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return app

    @run_async
    async def run() -> None:
        async with Relay(keys=KEYS, domain=DOMAIN) as relay:
            await make_server(create, relay, factory=True).serve()
            assert relay.dials == 0

    run()
    assert app.life == ["startup"]
    assert caught == [signal.SIGINT] * 2


def test_a_second_signal_does_not_wait_for_a_lifespan_that_never_starts(caught: list[int]) -> None:
    starting = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        starting.set()
        await asyncio.Event().wait()

    @run_async
    async def run() -> None:
        async with Relay(keys=KEYS, domain=DOMAIN) as relay:
            task = asyncio.create_task(make_server(app, relay).serve())
            await starting.wait()
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)
            assert not task.done()
            os.kill(os.getpid(), signal.SIGTERM)
            await task
            assert relay.dials == 0

    run()
    assert caught == [signal.SIGTERM, signal.SIGINT]


def test_work_in_the_background_may_finish(caught: list[int]) -> None:
    go_on, done = asyncio.Event(), asyncio.Event()

    async def background(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"later")
        await go_on.wait()
        done.set()

    @run_async
    async def run() -> None:
        async with served(App(index=background)) as site, site.client() as client:
            await client.get("/")
            os.kill(os.getpid(), signal.SIGTERM)
            await wait_for(lambda: not site.server.server_state.connections)
            assert not done.is_set()
            go_on.set()
            await site.task
            assert done.is_set()

    run()
    assert caught == [signal.SIGTERM]


# Loading


def config(app: Any, **options: Any) -> Config:
    return Config(app, **{"domain": str(DOMAIN), "key": SECRET, "key_id": KEY_ID, **options})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module; its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def write_module(text: str) -> str:
        name = f"app_of_a_test_{len(names)}"
        names.append(name)
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write_module


@pytest.mark.parametrize(
    ("app", "complaint"),
    [
        ("no_such_module_of_ours:app", 'Could not import module "no_such_module_of_ours"'),
        ("tests.support:no_such_app", 'Attribute "no_such_app" not found in module "tests.support"'),
        ("tests.support", 'must be in format "<module>:<attribute>"'),
        (":app", 'must be in format "<module>:<attribute>"'),
        ("tests.support:SECRET", "'tests.support:SECRET' is not an ASGI app: it is of type str"),
        (42, "the app (int) is not an ASGI app"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(app: Any, complaint: str) -> None:
    with pytest.raises(AppLoadFailed) as raised:
        config(app, log_config=None).load()
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "kind", "complaint"),
    [
        ("1 / 0", ZeroDivisionError, "division by zero"),
        ("import no_such_module_of_theirs", ModuleNotFoundError, "no_such_module_of_theirs"),
        ("import sys; sys.exit(7)", SystemExit, "7"),
        ("import sys; sys.exit(3)", SystemExit, "3"),
        ("def app(): raise KeyError('inside')", KeyError, "inside"),
        ("def app(): raise TypeError('inside')", TypeError, "inside"),
        ("def app(): raise SystemExit('inside')", SystemExit, "inside"),
    ],
)
def test_an_exception_inside_the_module_or_factory_passes_through(
    text: str, kind: type[BaseException], complaint: str, module: Callable[[str], str]
) -> None:
    with pytest.raises(kind, match=complaint):
        config(f"{module(text)}:app", factory=True, log_config=None).load()


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        (lambda settings: None, "the factory the app (function) could not be called without arguments"),
        (lambda: 42, "the app (function) returned a int, not an ASGI app"),
        (lambda: None, "the app (function) returned a NoneType, not an ASGI app"),
    ],
)
@pytest.mark.parametrize("interface", ["auto", "asgi3", "asgi2", "wsgi"])
def test_a_factory_must_return_an_app(factory: Callable[..., Any], complaint: str, interface: str) -> None:
    with pytest.raises(AppLoadFailed) as raised:
        config(factory, factory=True, interface=interface, log_config=None).load()
    assert complaint in str(raised.value)


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Scheme", environ["wsgi.url_scheme"])])
    return [b"wsgi ", environ["REQUEST_METHOD"].encode(), b" ", body]


class Wsgi:
    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return wsgi(environ, start_response)


class WsgiClass:
    def __init__(self, environ: dict[str, Any], start_response: Any) -> None:
        self.body = wsgi(environ, start_response)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)


def wsgi_with_settings(settings: str, environ: dict[str, Any], start_response: Any) -> list[bytes]:
    return wsgi(environ, start_response)


@pytest.mark.parametrize(
    ("app", "options"),
    [
        (wsgi, {}),
        (Wsgi(), {}),
        (WsgiClass, {}),
        (functools.partial(wsgi_with_settings, "x"), {}),
        (lambda: wsgi, {"factory": True}),
        (Wsgi, {}),  # taken for a factory
        (wsgi, {"proxy_headers": True}),
    ],
)
def test_a_wsgi_app_is_told_from_an_asgi_app(app: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is a WSGI app, not an ASGI app: use --interface wsgi") as raised:
        config(app, log_config=None, **options).load()
    assert "\n" not in str(raised.value)


class Asgi2:
    def __init__(self, scope: Any) -> None:
        self.scope = scope

    async def __call__(self, receive: Any, send: Any) -> None:
        await hello(self.scope, receive, send)


def asgi2(scope: Any) -> Any:
    return Asgi2(scope)


def asgi2_with_settings(settings: str, scope: Any) -> Any:
    return Asgi2(scope)


def asgi2_with_default(scope: Any, debug: bool = False) -> Any:
    return Asgi2(scope)


class NoSignature:
    __signature__ = "none"

    def __call__(self, scope: Any) -> Any:
        return Asgi2(scope)


@pytest.mark.parametrize(
    "app",
    [
        Asgi2,
        asgi2,
        functools.partial(asgi2_with_settings, "x"),
        asgi2_with_default,
        lambda *args: Asgi2(*args),
        NoSignature(),
    ],
)
@run_async
async def test_an_asgi2_app_is_served(app: Any) -> None:
    async with served(app, lifespan="off") as site, site.client() as client:
        assert (await client.get("/")).text == "hello"


@parsers
@run_async
async def test_a_wsgi_app_is_served_when_asked_for(http: str) -> None:
    async with served(wsgi, interface="wsgi", http=http) as site, site.client() as client:
        response = await client.post("/", content=b"body" * 50_000)
    assert response.text == "wsgi POST " + "body" * 50_000
    assert response.headers["x-scheme"] == "https"


def test_parsers_and_loops_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    with pytest.raises(ConfigError, match="httptools is not installed: pip install"):
        config(App(), http="httptools").load()
    fallback = config(App(), http="auto", log_config=None)
    fallback.load()
    assert fallback.http_protocol_class.__name__ == "GuardedH11Protocol"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wsproto is not installed"):
        config(App(), ws="wsproto").load()
    with pytest.raises(ConfigError, match="cannot load a protocol"):
        config(App(), ws="no_such_module_of_ours:Protocol").load()
    with pytest.raises(ConfigError, match="no_such_module_of_ours"):
        config(App(), loop="no_such_module_of_ours:loop").get_loop_factory()
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.delitem(sys.modules, "uvicorn.loops.uvloop", raising=False)
    with pytest.raises(ConfigError, match="'uvloop' is not installed"):
        config(App(), loop="uvloop").get_loop_factory()


def test_a_parser_of_ones_own_is_left_alone_but_not_silently(caplog: pytest.LogCaptureFixture) -> None:
    class Own(asyncio.Protocol):
        pass

    own = config(App(), http=Own, ws=Own, log_config=None)
    own.load()
    assert (own.http_protocol_class, own.ws_protocol_class) == (Own, Own)
    assert "has none of our checks and deadlines" in caplog.text
    caplog.clear()
    none = config(App(), ws="none", log_config=None)
    none.load()
    assert none.ws_protocol_class is None
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"uds": "/tmp/socket"}, "'uds' is about a socket, and a tunnel opens no port"),
        ({"ssl_keyfile": "key.pem"}, "'ssl_keyfile' is about a socket"),
        ({"http2": True}, "'http2' is about a socket"),
        ({"standby": 0}, "standby must be at least 1"),
        ({"tls": True}, "tls goes with local"),
        ({"limit_body": -1}, "limit_body must not be negative"),
        ({"timeout_first_byte": -1}, "timeout_first_byte must not be negative"),
        ({"timeout_request_head": -0.5}, "timeout_request_head must not be negative"),
        ({"timeout_request_body": float("nan")}, "timeout_request_body must not be negative"),
        ({"timeout_write": -1}, "timeout_write must not be negative"),
        ({"port": -1}, "port must not be negative"),
        ({"port": 70000}, "port must be at most 65535"),
        ({"local": True}, "--local brings its own domain and server"),
        ({"public_url": "ftp://x"}, "is not a public URL"),
        ({"trust_ca": "/no/such/file", "server_url": "wss://localhost"}, "cannot read /no/such/file"),
        ({"key": ""}, "no access key"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_happens(
    options: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMALLWARE_KEY", raising=False)
    with pytest.raises(ConfigError, match=complaint):
        config(App(), log_config=None, **options)


def test_a_key_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" from-the-file\n")
    tunnel = config(App(), key=None, key_file=tmp_path / "key", log_config=None).tunnel
    assert tunnel is not None
    assert tunnel.key == "from-the-file"


@run_async
async def test_a_ca_that_vanishes_while_the_app_starts_ends_it_in_good_order(tmp_path: Path) -> None:
    make_tls_contexts(tmp_path)
    app = App()
    server = Server(config(app, trust_ca=tmp_path / "certificate.pem", log_config=None))
    (tmp_path / "certificate.pem").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*certificate\.pem"):
        await server.serve()
    assert app.life == ["startup", "shutdown"]


# Loops


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@parsers
@websocket_libraries
def test_everything_works_on_either_loop(loop: str, http: str, ws: str) -> None:
    data = letters(MIB)

    async def run() -> None:
        async with asyncio.timeout(TEST_TIMEOUT):
            assert (type(asyncio.get_running_loop()).__module__ == "uvloop") is (loop == "uvloop")
            async with (
                served(App(index=echo, chat=chat), http=http, ws=ws) as site,
                site.client() as client,
                site.open_ws("/chat", max_size=None) as visitor,
            ):
                response = await client.post("/", content=data)
                assert response.content == data
                await visitor.send(data)
                assert await visitor.recv() == data

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(run())


def test_run_chooses_the_loop_and_returns_when_it_is_told_to() -> None:
    loops: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        loops.append(type(asyncio.get_running_loop()).__module__)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    server = Server(Config(app, local=True, port=0, loop="uvloop", log_config=None), on_started=lambda: None)
    server._on_started = lambda: setattr(server, "should_exit", True)
    server.run()
    assert loops == ["uvloop"]
