"""Real frameworks through the relay, with real clients: Django, Starlette, Flask."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask import request as flask_request
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support import DOMAIN, run_async, served
from tunnel_asgi.errors import ConfigError

parsers = pytest.mark.parametrize("http", ["h11", "httptools"])
MIB = 1024 * 1024


# Starlette


class Site:
    """A Starlette app with one of everything."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.told: asyncio.Queue[str] = asyncio.Queue()
        items = [Route("/{number:int}", self.item, name="item")]
        self.app = Starlette(
            routes=[
                Route("/", self.index),
                Route("/old", self.old),
                Route("/upload", self.upload, methods=["POST"]),
                Route("/stream", self.stream),
                Route("/fail", self.fail),
                Mount("/items", routes=items, name="items"),
                WebSocketRoute("/chat", self.chat),
            ],
        )

    async def index(self, request: Request) -> Response:
        assert request.client is not None
        links = {"self": str(request.url), "item": str(request.url_for("items:item", number=7))}
        return JSONResponse({"client": request.client.host, **links})

    async def old(self, request: Request) -> Response:
        return RedirectResponse(request.url_for("items:item", number=1))

    async def item(self, request: Request) -> Response:
        number = request.path_params["number"]
        return PlainTextResponse(f"item {number}", background=BackgroundTask(self.told.put, f"told {number}"))

    async def upload(self, request: Request) -> Response:
        async with request.form() as form:
            file = form["file"]
            assert isinstance(file, UploadFile)
            return PlainTextResponse(f"{file.filename} {len(await file.read())} {form['note']}")

    async def stream(self, request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "first\n"
            await self.arrived.wait()
            yield "second\n"

        return StreamingResponse(events(), media_type="text/plain")

    async def fail(self, request: Request) -> Response:
        raise ValueError("a bug in the app")

    async def chat(self, websocket: WebSocket) -> None:
        if "token" not in websocket.query_params:
            await websocket.close()
            return
        await websocket.accept(subprotocol="chat")
        try:
            async for text in websocket.iter_text():
                if text == "bye":
                    await websocket.close(4000, "bye")
                    return
                await websocket.send_json({"said": text, "url": str(websocket.url)})
        except WebSocketDisconnect:
            return


@parsers
@run_async
async def test_a_starlette_app_is_served(http: str) -> None:
    site = Site()
    async with served(site.app, http=http) as tunnel, tunnel.client(headers={"Host": str(DOMAIN)}) as client:
        index = (await client.get("/")).json()
        assert index == {
            "client": "127.0.0.1",
            "self": f"https://{DOMAIN}/",
            "item": f"https://{DOMAIN}/items/7",
        }
        assert (await client.get("/items/3")).text == "item 3"
        assert await site.told.get() == "told 3"
        assert (await client.get("/old")).headers["location"] == f"https://{DOMAIN}/items/1"
        assert (await client.get("/items/none")).status_code == 404
        assert (await client.delete("/")).status_code == 405
        head = await client.head("/items/3")
        assert (head.headers["content-length"], head.content) == ("6", b"")
        files = {"file": ("large.bin", bytes(2 * MIB))}
        upload = await client.post("/upload", files=files, data={"note": "noted"})
        assert upload.text == f"large.bin {2 * MIB} noted"


@parsers
@run_async
async def test_what_a_starlette_app_streams_arrives_piece_by_piece(http: str) -> None:
    site = Site()
    async with (
        served(site.app, http=http) as tunnel,
        tunnel.client() as client,
        client.stream("GET", "/stream") as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == "first"
        site.arrived.set()
        assert await anext(lines) == "second"


@parsers
@run_async
async def test_a_bug_in_a_starlette_app_is_a_500(http: str) -> None:
    async with served(Site().app, http=http) as tunnel, tunnel.client() as client:
        response = await client.get("/fail")
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        assert (await client.get("/items/1")).text == "item 1"


@parsers
@run_async
async def test_a_websocket_of_a_starlette_app_is_served(http: str) -> None:
    async with served(Site().app, http=http) as tunnel:
        with pytest.raises(InvalidStatus) as rejected:
            await tunnel.open_ws("/chat")
        assert rejected.value.response.status_code == 403
        options: dict[str, Any] = {"subprotocols": ["chat"], "additional_headers": {}}
        async with tunnel.open_ws("/chat?token=x", **options) as ws:
            assert ws.subprotocol == "chat"
            await ws.send("hello")
            port = tunnel.relay.port
            assert await ws.recv() == f'{{"said":"hello","url":"wss://127.0.0.1:{port}/chat?token=x"}}'
            await ws.send("bye")
            with pytest.raises(ConnectionClosed):
                await ws.recv()
            assert (ws.close_code, ws.close_reason) == (4000, "bye")


# Flask


@parsers
@run_async
async def test_a_flask_app_needs_interface_wsgi_and_is_served_with_it(http: str) -> None:
    flask = Flask("flask_app")

    @flask.route("/double", methods=["POST"])
    def double() -> str:
        return f"{flask_request.url} {flask_request.remote_addr} {2 * int(flask_request.form['n'])}"

    with pytest.raises(ConfigError, match="--interface wsgi"):
        async with served(flask, http=http):
            pass
    headers = {"Host": str(DOMAIN)}
    async with served(flask, http=http, interface="wsgi") as tunnel, tunnel.client(headers=headers) as client:
        response = await client.post("/double", data={"n": "21"})
        assert response.text == f"https://{DOMAIN}/double 127.0.0.1 42"
        assert (await client.get("/double")).status_code == 405


# Django, whose settings are global: in a process of its own.

DJANGO_PROJECT = """
import asyncio
import os
import sys

import httpx
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse, HttpResponseRedirect, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from tests.support import DOMAIN, TEST_TIMEOUT, served

settings.configure(
    DEBUG=False,
    SECRET_KEY="secret",
    ALLOWED_HOSTS=[str(DOMAIN)],
    ROOT_URLCONF=__name__,
    SECURE_SSL_REDIRECT=True,
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
    ],
)


def page(request):
    return HttpResponse(f"<h1>{request.build_absolute_uri()} {request.META['REMOTE_ADDR']} {request.is_secure()}</h1>")


async def search(request):
    await asyncio.sleep(0)
    return JsonResponse(dict(request.GET))


@csrf_exempt
@require_POST
def shout(request):
    return HttpResponse(request.body.upper())


@require_POST
def protected(request):
    return HttpResponse("never")


def fail(request):
    raise ValueError("a bug in the app")


async def stream(request):
    async def events():
        yield b"first\\n"
        await arrived.wait()
        yield b"second\\n"

    return StreamingHttpResponse(events())


urlpatterns = [
    path("", page),
    path("search/", search),
    path("shout/", shout),
    path("protected/", protected),
    path("fail/", fail),
    path("stream/", stream),
]
app = get_asgi_application()
arrived = None


async def visit(parser):
    global arrived
    arrived = asyncio.Event()
    async with served(app, http=parser, lifespan="off") as site:
        async with site.client(headers={"Host": str(DOMAIN)}) as client:
            response = await client.get("/")
            assert response.text == f"<h1>https://{DOMAIN}/ 127.0.0.1 True</h1>", response.text
            assert (await client.get("/search/?q=a&q=b")).json() == {"q": ["a", "b"]}
            assert (await client.get("/search")).headers["location"] == "/search/"
            response = await client.post("/shout/", content=b"hello " * 100_000)
            assert response.content == b"HELLO " * 100_000
            assert (await client.post("/protected/")).status_code == 403
            assert (await client.get("/nowhere/")).status_code == 404
            assert (await client.get("/fail/")).status_code == 500
            assert (await client.get("/", headers={"Host": "evil.example"})).status_code == 400
            async with client.stream("GET", "/stream/") as response:
                lines = response.aiter_lines()
                assert await anext(lines) == "first"
                arrived.set()
                assert await anext(lines) == "second"


async def main():
    async with asyncio.timeout(TEST_TIMEOUT):
        for parser in ("h11", "httptools"):
            await visit(parser)
            print("served with", parser)


asyncio.run(main())
"""


def test_a_django_project_is_served(tmp_path: Path) -> None:
    script = tmp_path / "django_project.py"
    script.write_text(DJANGO_PROJECT)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", script],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["served with h11", "served with httptools"]
