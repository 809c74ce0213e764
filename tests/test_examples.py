"""The examples for Django and Flask, served as their READMEs say. The one for FastAPI has a file of its own."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.processes import TUNNEL_ASGI, Running, environment

EXAMPLES = Path(__file__).parent.parent / "examples"
MANAGE = (sys.executable, "manage.py")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the example, which may write beside its files."""
    ignored = shutil.ignore_patterns("__pycache__", "*.sqlite3")
    name: str = request.param
    return shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=ignored)


def commands(folder: Path, program: str) -> list[str]:
    """What the README tells to run, without the comments."""
    lines = re.findall(rf"^    {program} (.*?)(?: +#.*)?$", (folder / "README.md").read_text(), re.MULTILINE)
    assert lines
    return lines


@contextmanager
def visiting(site: Running) -> Iterator[httpx.Client]:
    """A visitor who comes and leaves; then the site must end well."""
    with httpx.Client(base_url=site.url(), trust_env=False, timeout=20) as visitor:
        yield visitor
    assert site.stop() == 0
    assert "Traceback" not in site.output


@pytest.mark.parametrize("folder", ["django_site"], indirect=True)
def test_the_guest_book_takes_notes_and_shows_them_to_everybody(folder: Path) -> None:
    migrate, runtunnel = commands(folder, "python manage.py")
    subprocess.run([*MANAGE, migrate], cwd=folder, env=environment(folder), check=True, capture_output=True, timeout=50)
    with Running(*runtunnel.split(), "--port", "0", command=MANAGE, cwd=folder) as site:
        with visiting(site) as ada:
            page = ada.get("/")
            assert "Nobody was here yet." in page.text
            token = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)[0]
            assert "max-width" in ada.get("/static/book.css").text

            origin = {"Origin": str(ada.base_url)}
            note = {"csrfmiddlewaretoken": token, "text": "<b>hello</b>"}
            assert ada.post("/", data=note, headers=origin).headers["location"] == str(ada.base_url.join("/"))
            assert ada.post("/", data=note | {"text": ""}).status_code == 400
            assert ada.post("/", data=note, headers={"Origin": "https://evil.example"}).status_code == 403

            bob = httpx.get(ada.base_url, trust_env=False).text
            assert "&lt;b&gt;hello&lt;/b&gt;" in bob
            assert f"You are 127.0.0.1, and this page is {ada.base_url.join('/')}." in bob
        assert "unapplied migration" not in site.output


@pytest.mark.parametrize("folder", ["flask_app"], indirect=True)
def test_the_flask_app_ticks_and_hashes_and_forgets_visitors_who_left(folder: Path) -> None:
    serve = commands(folder, "tunnel-asgi")[0]
    with Running(*serve.split(), "--port", "0", command=TUNNEL_ASGI, cwd=folder) as site, visiting(site) as visitor:
        assert "<h1>Hello from Flask</h1>" in visitor.get("/").text
        assert visitor.get("/visit").json() == {"address": "127.0.0.1", "url": str(visitor.base_url.join("/"))}
        with visitor.stream("GET", "/ticks") as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        body = bytes(range(256)) * 5000
        hashed = visitor.post("/upload", files={"file": ("a.bin", body)}).json()
        assert hashed == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
