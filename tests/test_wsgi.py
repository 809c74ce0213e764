"""WSGI apps through the relay: what streams, what is uploaded, what fails, and visitors who leave."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from flask import Flask, request

from tests.processes import Running
from tests.support import run_async, served, visiting
from tunnel_asgi import wsgi
from tunnel_asgi.errors import ConfigError
from tunnel_asgi.server import Config

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], object]

parsers = pytest.mark.parametrize("http", ["h11", "httptools"])
PLAIN = [("Content-Type", "text/plain")]
MIB = 1024 * 1024
DEADLINE = 10.0  # seconds


class Answer:
    """An iterable that a test feeds, and whose end it awaits."""

    def __init__(self, *, endless: bool = False) -> None:
        self.go_on = threading.Event()
        self.closed = threading.Event()
        self._endless = endless

    def __call__(self, environ: Environ, start_response: StartResponse) -> Answer:
        start_response("200 OK", PLAIN)
        return self

    def __iter__(self) -> Iterator[bytes]:
        yield b"first\n"
        assert self.go_on.wait(DEADLINE)
        yield b"second\n"
        while self._endless:
            yield b"more\n"

    def close(self) -> None:
        self.closed.set()


async def happened(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, DEADLINE)


@parsers
@run_async
async def test_what_an_app_yields_arrives_piece_by_piece(http: str) -> None:
    answer = Answer()
    async with (
        served(answer, interface="wsgi", http=http) as site,
        site.client() as client,
        client.stream("GET", "/") as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == "first"
        answer.go_on.set()
        assert await anext(lines) == "second"
        await happened(answer.closed)


@parsers
@pytest.mark.parametrize("body", [b"", b"never read", bytes(2 * 64 * 1024)], ids=["no body", "unread", "large"])
@run_async
async def test_an_answer_without_end_ends_when_its_visitor_leaves(
    http: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wsgi, "THREADS", 1)  # a thread that is not given back would be missed
    answer = Answer(endless=True)

    def app(environ: Environ, start_response: StartResponse) -> Any:
        if environ["PATH_INFO"] == "/endless":
            return answer(environ, start_response)
        start_response("200 OK", PLAIN)
        return [b"next"]

    async with served(app, interface="wsgi", http=http) as site, site.client() as client:
        async with client.stream("POST", "/endless", content=body) as response:
            assert await anext(response.aiter_lines()) == "first"
        answer.go_on.set()
        await happened(answer.closed)
        assert (await client.get("/")).text == "next"


@parsers
@pytest.mark.parametrize("reads", [False, True], ids=["streams", "reads on"])
@pytest.mark.parametrize(
    ("header", "chunk", "answer"),
    [
        (("X-Broken", "two\nlines"), b"x", b""),
        (("Content-Length", "2"), b"x", b"HTTP/1.1 200 OK"),
        (("X-Good", "1"), "no bytes", b"HTTP/1.1 200 OK"),
    ],
    ids=["a broken header", "too long", "no bytes"],
)
@run_async
async def test_an_answer_that_cannot_be_sent_ends_and_gives_its_thread_back(
    http: str,
    reads: bool,
    header: tuple[str, str],
    chunk: bytes | str,
    answer: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wsgi, "THREADS", 1)
    closed = threading.Event()

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        try:
            start_response("200 OK", [header])
            yield from [cast(bytes, chunk)] * 50  # more than a2wsgi keeps
            while reads:
                environ["wsgi.input"].read(1)
        finally:
            closed.set()

    async with served(app, interface="wsgi", http=http) as site:
        for _ in range(2):
            closed.clear()
            async with visiting(site.relay) as visitor:
                await visitor.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
                assert (await visitor.read_all()).partition(b"\r\n")[0] == answer
            await happened(closed)


@run_async
async def test_an_answer_without_end_does_not_keep_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(endless=True)
    answer.go_on.set()
    async with served(answer, interface="wsgi", timeout_graceful_shutdown=0) as site, site.client() as client:
        async with client.stream("GET", "/") as response:
            assert await anext(response.aiter_lines()) == "first"
            site.server.should_exit = True
            await site.task
        await happened(answer.closed)


@pytest.mark.parametrize("writes", [False, True], ids=["yields", "writes"])
@run_async
async def test_an_answer_that_waits_for_its_visitor_ends_when_it_is_cancelled(writes: bool) -> None:
    full, closed = threading.Event(), threading.Event()

    def app(environ: Environ, start_response: Callable[..., Callable[[bytes], None]]) -> Iterator[bytes]:
        try:
            write = start_response("200 OK", PLAIN)
            for number in itertools.count():
                if number == wsgi.WRITE_AHEAD // (1 + writes):
                    full.set()
                if writes:
                    write(b"more")
                yield b"more"
        finally:
            closed.set()

    async def never(*message: Any) -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "http_version": "1.1", "headers": []}
    answering = asyncio.create_task(wsgi.WSGIApp(app)(scope, never, never))
    await happened(full)
    answering.cancel()
    await asyncio.wait([answering])
    await happened(closed)


@run_async
async def test_what_an_app_writes_arrives_and_is_refused_when_its_visitor_has_left() -> None:
    refused = threading.Event()

    def app(environ: Environ, start_response: Callable[..., Callable[[bytes], None]]) -> list[bytes]:
        write = start_response("200 OK", PLAIN)
        write(b"written, ")
        try:
            while environ["PATH_INFO"] == "/endless":
                write(bytes(MIB))
        except ConnectionResetError:
            with pytest.raises(ConnectionResetError):
                write(b"again")
            refused.set()
        return [b"returned"]

    async with served(app, interface="wsgi") as site, site.client() as client:
        assert (await client.get("/")).text == "written, returned"
        async with client.stream("GET", "/endless") as response:
            assert response.status_code == 200
        await happened(refused)


STUCK = """
import threading

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"first"
    threading.Event().wait()
"""


def test_an_app_that_never_comes_back_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(STUCK)
    options = ("--interface", "wsgi", "--local", "--port", "0", "--timeout-graceful-shutdown", "0")
    with Running("main:app", *options, cwd=tmp_path) as site:
        with httpx.stream("GET", site.url(), trust_env=False, timeout=20) as response:
            assert next(response.iter_raw()) == b"first"
            assert site.stop() == 0
        assert "Event loop is closed" not in site.output


@parsers
@run_async
async def test_flask_gets_uploads_with_and_without_their_length(http: str) -> None:
    flask = Flask("uploads")

    @flask.post("/raw")
    def raw() -> str:
        return str(len(request.get_data()))

    @flask.post("/form")
    def form() -> str:
        file = request.files["file"]
        return f"{file.filename} {len(file.read())} {request.form['note']}"

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield bytes(MIB // 2)

    async with served(flask, interface="wsgi", http=http) as site, site.client() as client:
        assert (await client.post("/raw", content=bytes(2 * MIB))).text == f"{2 * MIB}"
        assert (await client.post("/raw", content=pieces())).text == f"{2 * MIB}"
        assert (await client.post("/raw")).text == "0"
        files = {"file": ("large.bin", bytes(2 * MIB))}
        assert (await client.post("/form", files=files, data={"note": "noted"})).text == f"large.bin {2 * MIB} noted"


@run_async
async def test_input_is_read_by_lines_by_limits_and_to_the_end() -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", PLAIN)
        body = environ["wsgi.input"]
        read = [body.readline(4), body.readline(100), body.read(3), *body.readlines(), body.read(), body.read(1)]
        return [repr(read).encode()]

    async with served(app, interface="wsgi") as site, site.client() as client:
        answer = await client.post("/", content=b"first line\nsecond\nthird\nend")
        assert answer.text == str([b"firs", b"t line\n", b"sec", b"ond\n", b"third\n", b"end", b"", b""])
        assert (await client.get("/")).text == str([b"", b"", b"", b"", b""])


@parsers
@run_async
async def test_an_upload_cut_short_is_an_error_and_never_a_short_body(http: str) -> None:
    caught: list[BaseException] = []
    read = threading.Event()

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        try:
            environ["wsgi.input"].read()
        except OSError as error:
            caught.append(error)
        read.set()
        start_response("400 Bad Request", PLAIN)
        return []

    async with served(app, interface="wsgi", http=http) as site:
        async with visiting(site.relay) as visitor:
            await visitor.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await happened(read)
    [error] = caught
    assert isinstance(error, ConnectionResetError)


@parsers
@run_async
async def test_a_visitor_who_left_is_an_error_however_often_the_app_reads(http: str) -> None:
    caught: list[str] = []
    read = threading.Event()

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        for _ in range(3):
            try:
                environ["wsgi.input"].read(100)
            except OSError as error:
                caught.append(type(error).__name__)
        read.set()
        start_response("400 Bad Request", PLAIN)
        return []

    async with served(app, interface="wsgi", http=http) as site:
        async with visiting(site.relay) as visitor:
            await visitor.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\nhalf")
        await happened(read)
    assert caught == ["ConnectionResetError"] * 3


@parsers
@pytest.mark.parametrize("refused", [True, False])
@run_async
async def test_100_continue_is_sent_when_the_app_reads_and_not_before_it_could_refuse(http: str, refused: bool) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        body = b"" if refused else environ["wsgi.input"].read()
        start_response("403 Forbidden" if refused else "200 OK", PLAIN)
        return [body]

    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    async with served(app, interface="wsgi", http=http) as site, visiting(site.relay) as visitor:
        await visitor.send(head)
        if refused:
            assert (await visitor.read_all()).startswith(b"HTTP/1.1 403 ")
            return
        await visitor.read(len(b"HTTP/1.1 100"))
        await visitor.send(b"hello")
        assert b"hello" in await visitor.read_all()


@parsers
@run_async
async def test_a_bug_is_a_500_before_the_answer_and_a_cut_within_it(http: str) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        if environ["PATH_INFO"] == "/before":
            raise ValueError("a bug in the app")
        start_response("200 OK", PLAIN)
        yield b"half"
        raise ValueError("a bug in the app")

    async with served(app, interface="wsgi", http=http) as site, site.client() as client:
        assert (await client.get("/before")).status_code == 500
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/within")
        assert (await client.get("/before")).status_code == 500


@pytest.fixture
def log_levels() -> Iterator[None]:
    """Restored: they are the process's."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "uvicorn.access", "uvicorn.asgi", "tunnel_asgi")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("log_levels")
@run_async
async def test_the_environment_tells_the_public_truth_and_errors_go_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        print("an error", file=environ["wsgi.errors"])
        start_response("200 OK", PLAIN)
        names = ("wsgi.url_scheme", "SERVER_NAME", "SERVER_PORT", "REMOTE_ADDR", "REQUEST_METHOD")
        return [" ".join(environ[name] for name in names).encode()]

    options = {"interface": "wsgi", "proxy_headers": True, "log_level": "trace"}  # each of which wraps the app
    async with served(app, **options) as site, site.client() as client:
        assert (await client.get("/")).text == "https www-app-acme.t00.smallware.io 443 127.0.0.1 GET"
        head = await client.head("/")
        assert (head.status_code, head.content) == (200, b"")
    assert capsys.readouterr().err.count("an error") == 2


def test_the_adapter_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a2wsgi", None)
    monkeypatch.delitem(sys.modules, "tunnel_asgi.wsgi")
    with pytest.raises(ConfigError, match=r"^a WSGI app needs a2wsgi: pip install 'tunnel-asgi\[wsgi\]'$"):
        Config(Answer(), interface="wsgi", local=True, log_config=None).load()
