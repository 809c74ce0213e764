"""The fixtures, as a project sees them that has this package installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]

APPS = """
import asyncio, threading, urllib.request

import httpx
import pytest
from fastapi import FastAPI, Request

def get(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the machine has
    with opener.open(url, timeout=20) as answer:
        return answer.read().decode()

async def plain(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})

api = FastAPI()

@api.get("/")
def index(request: Request) -> str:
    return str(request.base_url)
"""


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run tests in a run of their own, with the plugin found as in any project, and warnings as errors."""
    pytester.makeini("[pytest]\nfilterwarnings = error\n")

    def run(tests: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(APPS + tests)
        # Not in this process, where modules it is the first to import would be imported twice: that confuses httpx.
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments, timeout=50)

    return run


def test_the_plugin_is_found_by_pytest() -> None:
    [entry_point] = entry_points(group="pytest11", name="tunnel_asgi")
    assert entry_point.value == "tunnel_asgi.pytest_plugin"


def test_loading_the_plugin_imports_nothing_that_takes_time() -> None:
    program = """
import sys
import pytest
before = set(sys.modules)
import tunnel_asgi.pytest_plugin
ours = {name for name in set(sys.modules) - before if name.startswith("tunnel_asgi")}
assert ours == {"tunnel_asgi", "tunnel_asgi.pytest_plugin"}, ours
heavy = {"asyncio", "cryptography", "h11", "jwt", "ssl", "starlette", "uvicorn", "websockets"}
assert not heavy & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_fixtures_tell_what_they_are_for(run: Callable[..., pytest.RunResult]) -> None:
    run("", "--fixtures").stdout.fnmatch_lines(["*tunnel_asgi_share *", "*Shares apps until the test ends*"])


def test_a_test_visits_an_app_at_its_url(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
def test_urllib_and_a_plain_app(tunnel_asgi_share):
    assert get(tunnel_asgi_share(plain).url) == "plain"

def test_httpx_and_fastapi(tunnel_asgi_share):
    tunnel = tunnel_asgi_share(api)
    assert httpx.get(tunnel.url, trust_env=False).json() == f"{tunnel.url}/"

def test_two_apps(tunnel_asgi_share):
    first, second = tunnel_asgi_share(plain), tunnel_asgi_share(api)
    assert first.url != second.url
    assert (get(first.url), get(second.url)) == ("plain", f'"{second.url}/"')
"""
    run(tests).assert_outcomes(passed=3)


def test_an_asynchronous_test_needs_no_plugin_but_a_loop(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
def test_without_any_plugin(tunnel_asgi_share):
    async def test():
        async with httpx.AsyncClient(base_url=tunnel_asgi_share(plain).url, trust_env=False) as client:
            answers = await asyncio.gather(*[client.get("/") for _ in range(8)])
        assert [answer.text for answer in answers] == ["plain"] * 8

    asyncio.run(test())

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_with_that_of_anyio(tunnel_asgi_share):
    url = tunnel_asgi_share(plain).url
    assert get(url) == "plain"  # a test that blocks its loop
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(url)).text == "plain"
"""
    run(tests).assert_outcomes(passed=2)


def test_a_service_calls_a_webhook(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
import queue

class Shop:
    '''A service of somebody else's: told a URL, it posts there whenever something is sold.'''

    def __init__(self):
        self.webhook = None

    def sell(self, article):
        def post():
            httpx.post(self.webhook, json={"sold": article}, trust_env=False).raise_for_status()
        threading.Thread(target=post).start()

def test_it_is_told_what_was_sold(tunnel_asgi_share):
    events = queue.Queue()
    app = FastAPI()

    @app.post("/hook")
    async def hook(request: Request):
        events.put(await request.json())

    shop = Shop()
    shop.webhook = tunnel_asgi_share(app).url + "/hook"
    shop.sell("bicycle")
    assert events.get(timeout=20) == {"sold": "bicycle"}
"""
    run(tests).assert_outcomes(passed=1)


def test_all_is_closed_when_the_test_ends(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
before = threading.active_count()
urls = []
ended = []

class App:
    async def __call__(self, scope, receive, send):
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        ended.append(1)
        await send({"type": "lifespan.shutdown.complete"})

def test_first(tunnel_asgi_share):
    urls.extend([tunnel_asgi_share(App()).url, tunnel_asgi_share(App()).url])

def test_second(tunnel_asgi_share):
    assert ended == [1, 1]
    assert threading.active_count() == before
    for url in urls:
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
"""
    run(tests).assert_outcomes(passed=2)


def test_a_session_shares_one_url(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
@pytest.fixture(scope="session")
def site(tunnel_asgi_share_session):
    return tunnel_asgi_share_session(plain)

urls = set()

@pytest.mark.parametrize("time", [1, 2])
def test_it_is_still_there(site, time):
    urls.add(site.url)
    assert get(site.url) == "plain"
    assert len(urls) == 1

def test_an_app_can_be_swapped_in(site):
    site.app = api
    assert get(site.url) == f'"{site.url}/"'
"""
    run(tests).assert_outcomes(passed=3)


def test_an_app_that_does_not_start_fails_the_test_that_shares_it(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
async def broken(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})

def test_broken(tunnel_asgi_share):
    tunnel_asgi_share(broken)
"""
    result = run(tests)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*LifespanFailed*", "*no database*"])


def test_options_are_those_of_share_in_thread(run: Callable[..., pytest.RunResult]) -> None:
    tests = """
import tunnel_asgi

def test_root_path(tunnel_asgi_share):
    assert get(tunnel_asgi_share(api, root_path="/below").url).endswith('/below/"')

def test_a_domain_needs_no_relay(tunnel_asgi_share):
    with pytest.raises(tunnel_asgi.InvalidDomain):
        tunnel_asgi_share(api, local=False, domain="example")
"""
    run(tests).assert_outcomes(passed=2)


def test_in_a_fresh_process_the_plugin_is_found_and_the_server_imported_when_it_is_used(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("""
import sys
import urllib.request

def is_imported():
    return bool({"uvicorn", "websockets", "tunnel_asgi.server"} & set(sys.modules))

async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})

def test_before():
    assert "tunnel_asgi.pytest_plugin" in sys.modules
    assert not is_imported()

def test_use(tunnel_asgi_share):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(tunnel_asgi_share(app).url, timeout=20) as answer:
        assert answer.status == 204
    assert is_imported()
""")
    arguments = ("-p", "no:cacheprovider", "-W", "error")
    pytester.runpytest_subprocess(*arguments, timeout=50).assert_outcomes(passed=2)
