"""The examples of the documentation are run.

All ```python blocks of a page share one namespace and run in order, as if they were pasted into one program. While one
runs, visitor after visitor comes: each says ``REQUEST``, waits for an answer, and ends. The environment names a
relay, and 8080 stands for the port of a web server.
"""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tunnel_asgi
from tests.support import DOMAIN, KEY_ID, KEYS, SECRET, run_async, visiting
from tunnel_asgi.relay import Relay

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "library.md"
SHARING = ROOT / "docs" / "sharing.md"
README = ROOT / "README.md"
REQUEST = b"GET / HTTP/1.0\r\n\r\n"


MAIN = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("hello"))])
"""

pytest_plugins = ["pytester"]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


async def visit_for_ever(relay: Relay, answers: asyncio.Queue[bytes]) -> None:
    while True:
        async with visiting(relay) as visitor:
            try:
                await visitor.send(REQUEST)
                if answer := await visitor.reader.read(1000):
                    visitor.send_eof()
                    answers.put_nowait(answer + await visitor.read_all())
            except ConnectionResetError:
                pass  # the example is over
            finally:
                visitor.reset()  # a good end would leave the request at the relay, for the next example


async def answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.0 200 OK\r\n\r\nfine\n")
    writer.close()


@run_async
async def test_the_examples_of_the_library_run(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, object] = {"__name__": "example"}
    local = await asyncio.start_server(answer_ok, "127.0.0.1", 0)
    port = local.sockets[0].getsockname()[1]
    async with local, Relay(keys=KEYS, domain=DOMAIN) as relay:
        monkeypatch.setenv("SMALLWARE_DOMAIN", str(DOMAIN))
        monkeypatch.setenv("SMALLWARE_KEY", f"{KEY_ID}.{SECRET}")
        monkeypatch.setenv("SMALLWARE_SERVER", relay.server_url)
        for block in python_blocks(PAGE):
            answers: asyncio.Queue[bytes] = asyncio.Queue()
            visitors = asyncio.create_task(visit_for_ever(relay, answers))
            code = compile(block.replace("8080", str(port)), str(PAGE), "exec")
            await asyncio.to_thread(exec, code, namespace)
            if "asyncio.run" in block and "AuthenticationFailed" not in block:
                await answers.get()
            visitors.cancel()
            await asyncio.wait([visitors])
            await relay.wait_until(lambda relay: not relay.held)
        assert relay.violations == []


def test_every_example_of_the_table_is_on_the_page() -> None:
    text = PAGE.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#(.*?)\)", text)
    assert links
    assert set(links) <= anchors


def test_every_example_of_the_readme_is_valid_python() -> None:
    for block in python_blocks(README):
        compile(block, str(README), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_relay_example_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    [program] = [block for block in python_blocks(README) if "Relay(" in block]
    (tmp_path / "example.py").write_text(program)
    run = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stderr
    assert "200 b'hello'" in run.stdout


@pytest.fixture
def folder_with_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for somebody who works where a ``main.py`` is."""
    (tmp_path / "main.py").write_text(MAIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "main", raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.usefixtures("folder_with_main")
@run_async
async def test_the_examples_of_sharing_run_as_cells_of_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    from main import app  # type: ignore[import-not-found]

    namespace: dict[str, object] = {"app": app, "other_app": app, "tunnel_asgi": tunnel_asgi}
    for block in [block for page in (README, SHARING) for block in python_blocks(page) if is_about_sharing(block)]:
        cell = eval(compile(block, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
        if cell is not None:
            await cell
    printed = capsys.readouterr().out
    assert re.findall(r"""b'"(.*?)"'""", printed) == ["hello", "hello again"]
    assert printed.count("http://127.0.0.1:") == 5


def is_about_sharing(block: str) -> bool:
    return "def test_" not in block and ("share" in block or "tunnel." in block or "FastAPI()" in block)


@pytest.mark.parametrize("page", [README, SHARING])
def test_the_examples_for_pytest_pass(page: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    pytester.makepyfile(main=MAIN)
    tests = [block for block in python_blocks(page) if "def test_" in block]
    for number, block in enumerate(tests):
        pytester.makepyfile(**{f"test_{number}": f"import httpx\n{block}"})
    # Not in this process: see test_pytest_plugin.py.
    pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=50).assert_outcomes(passed=len(tests))


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?://)(.*?)\)", README.read_text()):
        name, _, anchor = link.partition("#")
        page = ROOT / name
        assert page.is_file(), link
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link
