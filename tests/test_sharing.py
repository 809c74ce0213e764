"""Apps shared from a running loop, and in a thread from synchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.sync.client import connect as connect_blocking

from tests.processes import DEADLINE, relay_thread
from tests.support import DOMAIN, KEY_ID, KEYS, SECRET, TEST_TIMEOUT, run_async
from tunnel_asgi.errors import (
    AppLoadFailed,
    AuthenticationFailed,
    ConfigError,
    LifespanFailed,
    ListenerClosed,
    RelayFailed,
)
from tunnel_asgi.relay import Relay
from tunnel_asgi.sharing import Share, share, share_in_thread


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread of ours stays, no signal handler and no logger is another one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    before = environment()
    yield
    assert environment() == before


def environment() -> list[Any]:
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("tunnel-asgi")]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.error", "uvicorn.access", "tunnel_asgi")]
    return [threads, handlers, [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]]


class App:
    """Answers with its name, the state of its lifespan and the public address; ``life`` tells what happened to it.

    ``/slow`` tells by ``entered`` that it was called, and answers when ``release`` is set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.life: list[str] = []
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._echo(receive, send)
        else:
            await self._answer(scope, send)

    async def _live(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        scope["state"]["owner"] = self.name
        self.life.append("startup")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        self.life.append("shutdown")
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: dict[str, Any], send: Any) -> None:
        if scope["path"] == "/slow":
            self.entered.set()
            await self.release.wait()
        self.life.append("answer")
        body = f"{self.name} {scope['state'].get('owner')} {scope['scheme']}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def _echo(self, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": f"{self.name}: {message['text']}"})


async def refuse_to_start(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


class NeverReady:
    """An app whose startup does not end."""

    def __init__(self, *, on_startup: Callable[[], object] = lambda: None) -> None:
        self.starting = asyncio.Event()
        self.cancelled = False
        self._on_startup = on_startup

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.starting.set()
        self._on_startup()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def visiting(tunnel: Share) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=tunnel.url, trust_env=False)


async def read(tunnel: Share, path: str = "/") -> str:
    async with visiting(tunnel) as client:
        return (await client.get(path)).text


def read_blocking(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=TEST_TIMEOUT) as answer:
        text: str = answer.read().decode()
        return text


def is_taken(url: str) -> bool:
    host, _, port = url.rpartition("/")[2].partition(":")
    with socket.socket() as other:
        return other.connect_ex((host, int(port))) == 0


def through(relay: Relay, *, key: str = SECRET, **options: Any) -> dict[str, Any]:
    """Options for a tunnel server that is not embedded."""
    given = {"domain": str(DOMAIN), "key": key, "key_id": KEY_ID, "server_url": relay.server_url}
    return {**given, "public_url": relay.url, **options}


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


# In a running loop


@run_async
async def test_an_app_has_a_url_in_the_block_and_none_after_it() -> None:
    app = App("one")
    tunnel = share(app, local=True)
    assert tunnel.url == ""
    async with tunnel as entered:
        assert entered is tunnel
        assert tunnel.url.startswith("http://127.0.0.1:")
        assert tunnel.ca_path is None
        assert tunnel.app is app
        assert await read(tunnel) == "one one http"
    assert not is_taken(tunnel.url)
    assert app.life == ["startup", "answer", "shutdown"]


@run_async
async def test_it_can_be_awaited_and_closed_where_a_block_does_not_fit() -> None:
    tunnel = await share(App("one"), local=True)
    assert await read(tunnel) == "one one http"
    await tunnel.close()
    await tunnel.close()
    assert not is_taken(tunnel.url)


@run_async
async def test_what_was_never_opened_is_closed_already() -> None:
    await share(App("one"), local=True).close()


@run_async
async def test_it_opens_once() -> None:
    async with share(App("one"), local=True) as tunnel:
        with pytest.raises(RuntimeError, match="call share"):
            await tunnel
    with pytest.raises(RuntimeError, match="call share"):
        await tunnel


@run_async
async def test_signals_and_logging_stay_the_hosts() -> None:
    before = environment()[1:]
    async with share(App("one"), local=True) as tunnel:
        await read(tunnel)
        assert environment()[1:] == before


@run_async
async def test_several_apps_do_not_mix() -> None:
    apps = [App(name) for name in ("one", "two", "three")]
    async with contextlib.AsyncExitStack() as stack:
        tunnels = [await stack.enter_async_context(share(app, local=True)) for app in apps]
        answers = await asyncio.gather(*[read(tunnel) for tunnel in tunnels])
        assert answers == ["one one http", "two two http", "three three http"]
        await tunnels[0].close()
        assert await read(tunnels[1]) == "two two http"
        with pytest.raises(httpx.ConnectError):
            await read(tunnels[0])


@run_async
async def test_an_app_can_share_another_one() -> None:
    async def outer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] != "lifespan"
        async with share(App("inner"), local=True) as tunnel:
            body = (await read(tunnel)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async with share(outer, local=True) as tunnel:
        assert await read(tunnel) == "inner inner http"


@run_async
async def test_an_import_string_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(
        tmp_path, monkeypatch, "shared_app", "from tests.test_sharing import App\none, two = App('one'), App('two')\n"
    )
    async with share("shared_app:one", local=True) as tunnel:
        assert await read(tunnel) == "one one http"
        await tunnel.swap("shared_app:two")
        assert await read(tunnel) == "two two http"
        assert tunnel.app == "shared_app:two"


@run_async
async def test_a_tunnel_server_elsewhere_serves_as_well() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        async with share(App("one"), **through(relay)) as tunnel:
            assert tunnel.url == relay.url
            assert await read(tunnel) == "one one http"
        assert relay.tunnels == []
        assert relay.violations == []


@run_async
async def test_without_another_public_url_it_is_that_of_the_domain() -> None:
    async with Relay(keys=KEYS) as relay, share(App("one"), **through(relay, public_url=None)) as tunnel:
        assert tunnel.url == f"https://{DOMAIN}"


@run_async
async def test_with_tls_it_names_the_ca_to_trust() -> None:
    async with share(App("one"), local=True, tls=True) as tunnel:
        trust = ssl.create_default_context(cafile=tunnel.ca_path)
        async with httpx.AsyncClient(verify=trust, trust_env=False) as client:
            assert (await client.get(tunnel.url)).text == "one one https"


@pytest.mark.parametrize("option", [{"reload": True}, {"workers": 2}])
def test_reload_and_workers_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"use tunnel_asgi\.run"):
        share(App("one"), local=True, **option)


def test_what_cannot_work_is_raised_by_the_call() -> None:
    for start in (share, share_in_thread):
        with pytest.raises(AppLoadFailed, match="no_such_module"):
            start("no_such_module:app", local=True)
        with pytest.raises(AppLoadFailed, match="not an ASGI app"):
            start(42, local=True)
        with pytest.raises(ConfigError):
            start(App("one"), local=True, domain=str(DOMAIN))
        with pytest.raises(ConfigError, match="no event loop"):
            share_in_thread(App("one"), local=True, loop="no_such_loop:new")


@run_async
async def test_an_app_that_refuses_to_start_is_raised_on_entering() -> None:
    with pytest.raises(LifespanFailed):
        async with share(refuse_to_start, local=True):
            pass


@run_async
async def test_a_taken_port_is_raised_on_entering() -> None:
    app = App("two")
    async with share(App("one"), local=True) as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(RelayFailed, match=f"port {port}"):
            await share(app, local=True, port=port)
    assert app.life == []


@run_async
async def test_a_key_that_is_not_accepted_is_raised_on_entering() -> None:
    app = App("one")
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        with pytest.raises(AuthenticationFailed):
            await share(app, **through(relay, key="wrong"))
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_cancelling_during_the_apps_startup_leaves_nothing() -> None:
    app = NeverReady()
    tunnel = share(app, local=True)
    opening = asyncio.ensure_future(tunnel.__aenter__())
    await app.starting.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert app.cancelled
    await tunnel.close()  # who closes it in any case is not cancelled by that


@run_async
async def test_cancelling_while_no_tunnel_server_answers_leaves_nothing() -> None:
    app = App("one")
    async with Relay(keys=KEYS) as relay:
        relay.hang()
        opening = asyncio.ensure_future(share(app, **through(relay)).__aenter__())
        await relay.wait_until(lambda relay: relay.dials > 0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_closing_while_it_starts_ends_the_start() -> None:
    async with Relay(keys=KEYS) as relay:
        relay.hang()
        tunnel = share(App("one"), **through(relay))
        opening = asyncio.ensure_future(tunnel.__aenter__())
        await relay.wait_until(lambda relay: relay.dials > 0)
        with pytest.raises(ListenerClosed):
            tunnel.app = App("two")
        await tunnel.close()
        with pytest.raises(ListenerClosed, match="while it started"):
            await opening


@run_async
async def test_leaving_lets_a_running_request_finish() -> None:
    app = App("one")
    async with share(app, local=True) as tunnel:
        slow = asyncio.create_task(read(tunnel, "/slow"))
        await app.entered.wait()
        asyncio.get_running_loop().call_later(0.05, app.release.set)
    assert await slow == "one one http"
    assert app.life == ["startup", "answer", "shutdown"]


@run_async
async def test_leaving_waits_no_longer_than_it_was_told() -> None:
    app = App("one")
    async with share(app, local=True, timeout_graceful_shutdown=0) as tunnel:
        slow = asyncio.create_task(read(tunnel, "/slow"))
        await app.entered.wait()
    await asyncio.wait({slow})
    assert slow.exception() is not None or slow.result() != "one one http"
    assert app.life == ["startup", "shutdown"]


@run_async
async def test_who_is_cancelled_while_leaving_waits_for_nobody() -> None:
    app = App("one")
    tunnel = await share(app, local=True)
    slow = asyncio.create_task(read(tunnel, "/slow"))
    await app.entered.wait()
    await tunnel.swap(App("two"))
    await asyncio.wait_for(slower := asyncio.create_task(read(tunnel)), TEST_TIMEOUT)
    assert slower.result() == "two two http"
    leaving = asyncio.create_task(tunnel.close())
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.wait({slow})
    assert slow.exception() is not None or slow.result() != "one one http"
    assert app.life == ["startup"]
    assert not is_taken(tunnel.url)


@run_async
async def test_cancelling_the_block_leaves_nothing() -> None:
    app = App("one")
    entered = asyncio.Event()

    async def block() -> None:
        async with share(app, local=True):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert app.life == ["startup", "shutdown"]


@contextlib.asynccontextmanager
async def failing_tunnel() -> AsyncIterator[Share]:
    """One whose tunnel fails for good once it is open. Leaving is up to the test."""
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        tunnel = await share(App("one"), **through(relay))
        relay.refuse(401)
        for end in relay.tunnels:
            end.cut()
        await over(tunnel)
        yield tunnel


async def over(tunnel: Share) -> None:
    """Wait until the tunnel has failed for good, which nothing but leaving tells."""
    assert tunnel._serving is not None
    await asyncio.wait({tunnel._serving})


@run_async
async def test_a_tunnel_that_failed_for_good_is_raised_on_leaving() -> None:
    async with failing_tunnel() as tunnel:
        with pytest.raises(AuthenticationFailed):
            await tunnel.__aexit__(None, None, None)
        with pytest.raises(ListenerClosed):
            await tunnel.swap(App("two"))


@run_async
async def test_a_tunnel_that_failed_does_not_hide_an_exception_of_the_block() -> None:
    async with failing_tunnel() as tunnel:
        await tunnel.__aexit__(ZeroDivisionError, ZeroDivisionError(), None)


# Another app behind the same URL


@run_async
async def test_a_swap_starts_the_new_app_before_it_ends_the_old_one() -> None:
    order: list[str] = []
    old, new = App("old"), App("new")
    old.life = new.life = order
    async with share(old, local=True) as tunnel, visiting(tunnel) as client:
        url = tunnel.url
        assert (await client.get("/")).text == "old old http"
        await tunnel.swap(new)
        assert tunnel.app is new
        assert tunnel.url == url
        assert (await client.get("/")).text == "new new http"  # on the same connection
    assert order == ["startup", "answer", "startup", "shutdown", "answer", "shutdown"]


@run_async
async def test_running_requests_finish_on_the_old_app() -> None:
    old, new = App("old"), App("new")
    async with share(old, local=True) as tunnel:
        slow = asyncio.create_task(read(tunnel, "/slow"))
        await old.entered.wait()
        await tunnel.swap(new)
        assert await read(tunnel) == "new new http"
        assert old.life == ["startup"]
        old.release.set()
        assert await slow == "old old http"
    assert old.life == ["startup", "answer", "shutdown"]
    assert new.life == ["startup", "answer", "shutdown"]


@run_async
async def test_a_websocket_stays_with_the_app_it_was_opened_on() -> None:
    async with share(App("old"), local=True) as tunnel:
        address = tunnel.url.replace("http", "ws", 1)
        async with connect(address, proxy=None) as first:
            await tunnel.swap(App("new"))
            async with connect(address, proxy=None) as second:
                for ws, name in ((first, "old"), (second, "new")):
                    await ws.send("who?")
                    assert await ws.recv() == f"{name}: who?"


@run_async
async def test_the_old_app_has_no_more_time_than_a_shutdown_gives() -> None:
    old = App("old")
    async with share(old, local=True, timeout_graceful_shutdown=0) as tunnel:
        slow = asyncio.create_task(read(tunnel, "/slow"))
        await old.entered.wait()
        await tunnel.swap(App("new"))
        await asyncio.wait({slow})
        assert slow.exception() is not None or slow.result() != "old old http"
        assert await read(tunnel) == "new new http"
    assert old.life == ["startup", "shutdown"]


@run_async
async def test_a_swap_that_fails_leaves_the_old_app() -> None:
    old = App("old")
    async with share(old, local=True) as tunnel:
        with pytest.raises(LifespanFailed):
            await tunnel.swap(refuse_to_start)
        with pytest.raises(AppLoadFailed):
            await tunnel.swap("no_such_module:app")
        assert tunnel.app is old
        assert await read(tunnel) == "old old http"
        assert old.life == ["startup", "answer"]


@run_async
async def test_a_swap_that_is_cancelled_ends_the_new_apps_startup() -> None:
    new = NeverReady()
    async with share(App("old"), local=True) as tunnel:
        swapping = asyncio.create_task(tunnel.swap(new))
        await new.starting.wait()
        swapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await swapping
        assert new.cancelled
        assert await read(tunnel) == "old old http"


@run_async
async def test_an_app_that_has_started_too_late_is_ended_again() -> None:
    ready = asyncio.Event()

    class Late(App):
        async def _live(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            self.entered.set()
            await ready.wait()
            await super()._live(scope, receive, send)

    new = Late("new")
    async with share(App("old"), local=True) as tunnel:
        swapping = asyncio.create_task(tunnel.swap(new))
        await new.entered.wait()
    ready.set()
    with pytest.raises(ListenerClosed, match="not open"):
        await swapping
    assert new.life == ["startup", "shutdown"]


@run_async
async def test_an_app_that_lingers_after_its_shutdown_is_cancelled() -> None:
    class Lingering(App):
        async def _live(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
            await super()._live(scope, receive, send)
            await asyncio.Event().wait()

    async with share(Lingering("old"), local=True) as tunnel:
        await tunnel.swap(App("new"))


@run_async
async def test_an_assignment_swaps_at_once_and_runs_no_lifespan_of_the_new_app() -> None:
    old, new = App("old"), App("new")
    async with share(old, local=True) as tunnel, visiting(tunnel) as client:
        assert (await client.get("/")).text == "old old http"
        tunnel.app = new
        assert tunnel.app is new
        assert (await client.get("/")).text == "new None http"
        with pytest.raises(AppLoadFailed):
            tunnel.app = 42
        assert (await client.get("/")).text == "new None http"
    assert old.life == ["startup", "answer", "shutdown"]
    assert new.life == ["answer", "answer"]


# In a thread


def test_synchronous_code_shares_in_a_thread() -> None:
    app = App("one")
    with share_in_thread(app, local=True) as tunnel:
        assert tunnel.app is app
        assert tunnel.ca_path is None
        assert read_blocking(tunnel.url) == "one one http"
    assert not is_taken(tunnel.url)
    assert app.life == ["startup", "answer", "shutdown"]


def test_a_share_in_a_thread_serves_until_it_is_closed() -> None:
    tunnel = share_in_thread(App("one"), local=True, loop="asyncio")
    assert read_blocking(tunnel.url) == "one one http"
    tunnel.close()
    tunnel.close()
    assert not is_taken(tunnel.url)
    with pytest.raises(ListenerClosed):
        tunnel.swap(App("two"))


def test_however_many_threads_close_it_each_returns_when_it_is_closed() -> None:
    app = App("one")
    tunnel = share_in_thread(app, local=True)

    def close() -> list[str]:
        tunnel.close()
        return list(app.life)

    with ThreadPoolExecutor(4) as threads:
        closings = [threads.submit(close) for _ in range(4)]
        assert [closing.result(TEST_TIMEOUT) for closing in closings] == [["startup", "shutdown"]] * 4


def test_a_swap_that_has_not_ended_when_the_tunnel_closes_is_told_so() -> None:
    begun = threading.Event()
    new = NeverReady(on_startup=begun.set)
    with ThreadPoolExecutor(1) as threads:
        with share_in_thread(App("old"), local=True) as tunnel:
            swapping = threads.submit(tunnel.swap, new)
            assert begun.wait(TEST_TIMEOUT)
        with pytest.raises(ListenerClosed, match="closed meanwhile"):
            swapping.result(TEST_TIMEOUT)
    assert new.cancelled


def test_several_threads_do_not_mix() -> None:
    with share_in_thread(App("one"), local=True) as one, share_in_thread(App("two"), local=True) as two:
        assert [read_blocking(tunnel.url) for tunnel in (one, two)] == ["one one http", "two two http"]


@run_async
async def test_a_loop_that_is_blocked_does_not_matter_to_a_thread() -> None:
    with share_in_thread(App("one"), local=True) as tunnel:
        assert read_blocking(tunnel.url) == "one one http"


@pytest.mark.parametrize("assign", [False, True])
def test_in_a_thread_an_assignment_is_a_swap_with_lifespan(assign: bool) -> None:
    old, new = App("old"), App("new")
    with share_in_thread(old, local=True) as tunnel:
        if assign:
            tunnel.app = new
        else:
            tunnel.swap(new)
        assert tunnel.app is new
        assert read_blocking(tunnel.url) == "new new http"
        with pytest.raises(LifespanFailed):
            tunnel.app = refuse_to_start
        assert read_blocking(tunnel.url) == "new new http"
    assert old.life == ["startup", "shutdown"]
    assert new.life == ["startup", "answer", "answer", "shutdown"]


def test_a_failed_start_is_raised_by_the_call_and_leaves_no_thread() -> None:
    with pytest.raises(LifespanFailed):
        share_in_thread(refuse_to_start, local=True)
    with share_in_thread(App("one"), local=True) as tunnel, pytest.raises(RelayFailed):
        share_in_thread(App("two"), local=True, port=int(tunnel.url.rpartition(":")[2]))


def test_closing_from_the_apps_own_loop_is_refused() -> None:
    failures: list[Exception] = []

    async def close_it(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] != "lifespan"
        try:
            tunnel.close()
        except RuntimeError as error:
            failures.append(error)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with share_in_thread(close_it, local=True) as tunnel:
        read_blocking(tunnel.url)
        [failure] = failures
        assert "wait for itself" in str(failure)
        assert read_blocking(tunnel.url) == ""


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """As at a terminal: a shell starts what runs in the background with Ctrl+C ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_during_the_start_ends_it() -> None:
    app = NeverReady(on_startup=interrupt)
    with pytest.raises(KeyboardInterrupt):
        share_in_thread(app, local=True)
    assert app.cancelled


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_while_it_closes_waits_for_nobody() -> None:
    class Clinging(App):
        async def _echo(self, receive: Any, send: Any) -> None:
            await super()._echo(receive, send)  # ends when the server closes it
            interrupt()
            await asyncio.Event().wait()

    app = Clinging("one")
    tunnel = share_in_thread(app, local=True)
    with connect_blocking(tunnel.url.replace("http", "ws", 1), proxy=None), pytest.raises(KeyboardInterrupt):
        tunnel.close()
    assert app.life == ["startup"]
    assert not is_taken(tunnel.url)


@pytest.mark.parametrize("raised", [None, ZeroDivisionError()])
def test_a_tunnel_in_a_thread_that_failed_for_good_is_raised_on_leaving(raised: Exception | None) -> None:
    with relay_thread(domain=DOMAIN) as relay:
        tunnel = share_in_thread(App("one"), **through(relay.relay))
        relay.call(relay.relay.refuse, 401)
        for end in relay.relay.tunnels:
            relay.call(end.cut)
        asyncio.run_coroutine_threadsafe(over(tunnel._share), tunnel._loop).result(DEADLINE)
        with pytest.raises(AuthenticationFailed) if raised is None else contextlib.nullcontext():
            tunnel.__exit__(None if raised is None else type(raised), raised, None)
