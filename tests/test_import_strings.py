"""Apps of the frameworks there are, each in a file of its own, served by ``tunnel-asgi main:app --local``."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.processes import Running

FASTAPI = """
from fastapi import FastAPI, Request

app = FastAPI()


@app.post("/double/{n}")
async def double(request: Request, n: int) -> dict[str, str]:
    return {"url": str(request.url), "answer": str(2 * n)}
"""

STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


async def double(request):
    return JSONResponse({"url": str(request.url), "answer": str(2 * request.path_params["n"])})


app = Starlette(routes=[Route("/double/{n:int}", double, methods=["POST"])])
"""

LITESTAR = """
from litestar import Litestar, Request, post


@post("/double/{n:int}", status_code=200)
async def double(request: Request, n: int) -> dict[str, str]:
    return {"url": str(request.url), "answer": str(2 * n)}


app = Litestar([double])
"""

QUART = """
from quart import Quart, request

app = Quart(__name__)


@app.post("/double/<int:n>")
async def double(n):
    return {"url": request.url, "answer": str(2 * n)}
"""

FLASK = QUART.replace("quart import Quart", "flask import Flask").replace("Quart", "Flask").replace("async def", "def")


@pytest.mark.parametrize(
    ("source", "options"),
    [(FASTAPI, ()), (STARLETTE, ()), (LITESTAR, ()), (QUART, ()), (FLASK, ("--interface", "wsgi"))],
    ids=["FastAPI", "Starlette", "Litestar", "Quart", "Flask"],
)
def test_an_app_is_served_by_its_import_string(source: str, options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(source)
    with Running("main:app", "--local", "--port", "0", *options, cwd=tmp_path) as site:
        url = site.url()
        answer = httpx.post(f"{url}/double/21", trust_env=False, timeout=20)
        assert answer.json() == {"url": f"{url}/double/21", "answer": "42"}
        assert site.stop() == 0
        assert "Traceback" not in site.output


def test_an_app_that_is_plainly_wsgi_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(FLASK)
    with Running("main:app", "--local", "--port", "0", cwd=tmp_path) as site:
        assert site.wait() == 3
        assert "Error: 'main:app' is a WSGI app, not an ASGI app: use --interface wsgi" in site.output
        assert "Traceback" not in site.output
