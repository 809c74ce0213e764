"""The promises of SECURITY.md: every threat has a test that exists, and no secret or token shows anywhere."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import re
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request

import tunnel_asgi
from tests.fakes import QUIET, Line, Recorder, make_config
from tests.processes import TUNNEL_ASGI, RelayThread, Running, relay_thread
from tests.support import CUSTOMER, DOMAIN, KEY_ID, make_tls_contexts, run_async
from tunnel_asgi.auth import AccessKey, JwtManager
from tunnel_asgi.connection import dial
from tunnel_asgi.errors import TunnelError
from tunnel_asgi.relay import Relay

ROOT = Path(__file__).parent.parent

SECRET = "never-to-be-shown-4711"
PASSWORD = "of-the-proxy-4712"
KEYS = {CUSTOMER: {KEY_ID: SECRET}}


# SECURITY.md


def names_in(page: Path) -> set[tuple[str, str]]:
    return set(re.findall(r"`(test_\w+\.py)::(\w+)`", page.read_text()))


def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_the_threat_table_names_exists() -> None:
    named = names_in(ROOT / "SECURITY.md")
    assert len(named) > 30
    files = {file: functions_in(ROOT / "tests" / file) for file, _ in named}
    assert not {(file, test) for file, test in named if test not in files[file]}


def test_every_row_of_the_threat_table_names_a_test() -> None:
    _, _, threats = (ROOT / "SECURITY.md").read_text().partition("\n## Threats")
    rows = [line for line in threats.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row] == []


# Secrets: what is seen, and by whom


class Spy:
    """Sees all that is logged, at every level, with tracebacks; is told what else shows; and knows the tokens."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self.shown: list[str] = []
        self.tokens: set[str] = set()

    def see(self, thing: object) -> None:
        """A traceback with all its causes, or what anything looks like."""
        if isinstance(thing, BaseException):
            self.shown += traceback.format_exception(thing)
        self.shown += [repr(thing), str(thing)]

    def hear(self, request: Request) -> None:
        """The tunnel server reads a token."""
        self.tokens.add(request.headers["Authorization"].removeprefix("Bearer "))

    def check(self, *more_secrets: str) -> None:
        formatter = logging.Formatter()
        logged = [f"{formatter.format(record)} {record.args!r}" for record in self._caplog.records]
        everything = "\n".join([*self.shown, *logged])
        parts = {part for token in self.tokens for part in token.split(".")}
        for secret in (SECRET, PASSWORD, "eyJ", "Bearer", *parts, *more_secrets):
            assert secret not in everything

    def said(self, pattern: str) -> bool:
        """Whether it was logged."""
        return any(re.search(pattern, record.getMessage()) for record in self._caplog.records)


@pytest.fixture
def spy(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Spy:
    for name in ("", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "websockets", "tunnel_asgi"):
        caplog.set_level(1, name)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "propagate", True)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return Spy(caplog)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/broken":
        raise LookupError("of the app")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def serve_until(told: Awaitable[object], spy: Spy, server_url: str, **options: Any) -> None:
    """Serve the app, log everything, until told; whatever it raises is seen."""
    given = {"domain": str(DOMAIN), "key": f"{KEY_ID}.{SECRET}", "server_url": server_url, "log_config": None} | options
    server = tunnel_asgi.Server(tunnel_asgi.Config(app, log_level="trace", standby=1, **given))
    serving = asyncio.create_task(server.serve())
    waiting = asyncio.ensure_future(told)
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    spy.see(server)
    spy.see(server.config)
    spy.see(server.config.tunnel)
    spy.see(server.pool)
    waiting.cancel()
    server.should_exit = server.force_exit = True
    await asyncio.wait({serving, waiting})
    if error := serving.exception():
        assert isinstance(error, TunnelError)
        spy.see(error)


async def said(spy: Spy, pattern: str) -> None:
    while not spy.said(pattern):  # noqa: ASYNC110  (a log tells nobody)
        await asyncio.sleep(0.005)


# Secrets: what can happen


@run_async
async def test_serving_well_shows_no_secret_at_any_level(spy: Spy) -> None:
    async def visit(relay: Relay) -> None:
        await relay.wait_for_waiting()
        async with httpx.AsyncClient(base_url=relay.url, trust_env=False) as client:
            assert (await client.get("/")).text == "hello"
            assert (await client.get("/broken")).status_code == 500
            [tunnel] = [tunnel for tunnel in relay.tunnels if tunnel.state == "open"]
            await tunnel.drop("the visitor left")
        await said(spy, "was dropped: the visitor left")

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        await serve_until(visit(relay), spy, relay.server_url)
    assert spy.said("visitor 127.0.0.1 connected")
    assert spy.said("Exception in ASGI application")
    assert spy.said("ASGI .* Started scope="), "the level is not trace"
    spy.check()


@pytest.mark.parametrize("status", [302, 401, 402, 403, 404, 429, 503])
@run_async
async def test_a_refusal_shows_no_secret(status: int, spy: Spy) -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        relay.refuse(status, headers={"Location": f"{relay.server_url}/elsewhere"})
        await serve_until(relay.wait_until(lambda relay: relay.refused > 1), spy, relay.server_url)
    spy.check()


@run_async
async def test_a_key_the_server_does_not_know_shows_no_secret_on_either_side(spy: Spy) -> None:
    async with Relay(keys={CUSTOMER: {KEY_ID: "another-secret-4713"}}, domain=DOMAIN) as relay:
        await serve_until(asyncio.Event().wait(), spy, relay.server_url)
    assert any("does not accept key" in shown for shown in spy.shown)
    spy.check("another-secret-4713")


@pytest.mark.parametrize("key", [f".{SECRET}", f"{SECRET}.", "\ud800" + SECRET])
def test_a_key_that_cannot_be_used_is_not_repeated(key: str, spy: Spy) -> None:
    with pytest.raises(TunnelError) as raised:
        make_config(key=key, key_id=None)
    spy.see(raised.value)
    spy.check()


@run_async
async def test_a_certificate_nobody_trusts_shows_no_secret(spy: Spy, tmp_path: Path) -> None:
    context, _ = make_tls_contexts(tmp_path)
    async with raw_server(lambda head: b"", ssl=context) as port:
        await serve_until(said(spy, "certificate is not trusted"), spy, f"wss://127.0.0.1:{port}/tunnels")
    spy.check()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 407 Who are you?\r\n\r\n", b"garbage\r\n\r\n"])
@run_async
async def test_a_proxy_that_fails_shows_no_secret_and_no_password(
    answer: bytes, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with raw_server(lambda head: answer) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:{PASSWORD}@127.0.0.1:{port}")
        await serve_until(said(spy, "cannot reach the tunnel server"), spy, "wss://relay.test/tunnels")
    spy.check()


@asynccontextmanager
async def raw_server(answer: Callable[[bytes], bytes], **options: Any) -> AsyncIterator[int]:
    """Answers every head with these bytes, and closes; its port."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0, **options) as server:
        yield server.sockets[0].getsockname()[1]


QUOTED_IN_THE_UPGRADE = {
    "accept": "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: {token}\r\n\r\n",
    "upgrade": "HTTP/1.1 101 Switching Protocols\r\nUpgrade: {token}\r\nConnection: {token}\r\n\r\n",
    "status line": "HTTP/1.1 {token}\r\n\r\n",
    "header line": "HTTP/1.1 200 OK\r\n{token}\r\n\r\n",
    "reason": "HTTP/1.1 503 {token}\r\nRetry-After: {token}\r\nDate: {token}\r\n\r\n{token}",
    "body": "HTTP/1.1 403 No\r\nContent-Length: 10\r\n\r\n{token}",
    "redirect": "HTTP/1.1 302 Found\r\nLocation: wss://{token}/{token}\r\n\r\n",
}


@pytest.mark.parametrize("where", QUOTED_IN_THE_UPGRADE)
@run_async
async def test_a_server_that_quotes_the_token_in_its_answer_does_not_get_it_logged(where: str, spy: Spy) -> None:
    answered = asyncio.Event()

    def answer(head: bytes) -> bytes:
        found = re.search(rb"Authorization: Bearer (\S+)", head)
        assert found is not None
        spy.tokens.add(found[1].decode())
        answered.set()
        return QUOTED_IN_THE_UPGRADE[where].format(token=found[1].decode()).encode()

    async with raw_server(answer) as port:
        await serve_until(said(spy, "trying again|refused"), spy, f"ws://127.0.0.1:{port}/tunnels")
    assert answered.is_set()
    spy.check()


QUOTING: dict[str, Callable[[ServerConnection, str], Awaitable[object]]] = {
    "connection id": lambda ws, token: ws.send(f"CONNECT: 203.0.113.7, {token}"),
    "address": lambda ws, token: ws.send(f"CONNECT: {token}"),
    "text": lambda ws, token: ws.send(token),
    "bytes": lambda ws, token: ws.send(token.encode()),
    "close reason": lambda ws, token: ws.close(1008, token[:120]),
}


@pytest.mark.parametrize("where", QUOTING)
@run_async
async def test_a_server_that_quotes_the_token_in_a_message_does_not_get_it_logged(where: str, spy: Spy) -> None:
    done = asyncio.Event()

    async def handler(ws: ServerConnection) -> None:
        assert ws.request is not None
        spy.hear(ws.request)
        [token] = spy.tokens
        await QUOTING[where](ws, token)
        if where == "connection id":
            await ws.send(f"DROP: {token}")
            await ws.recv()
            await ws.recv()
            await ws.send(f"CONNECT: 203.0.113.7, {token}")
            await ws.send(f"GET / HTTP/1.1\r\nHost: x\r\n{token}: {token}\r\n\r\n".encode())
            await ws.recv()
        await ws.close()
        done.set()

    async with serve(handler, "127.0.0.1", 0, compression=None, logger=QUIET) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        # A visitor's own header reaches the log at level trace: it is the app's business, and not asked for here.
        await serve_until(done.wait(), spy, f"ws://127.0.0.1:{port}/tunnels", access_log=False)
    spy.check()


# Secrets: what things look like


@run_async
async def test_no_public_object_shows_a_secret(spy: Spy) -> None:
    public = {name: getattr(tunnel_asgi, name) for name in tunnel_asgi.__all__}
    classes = {name for name, thing in public.items() if inspect.isclass(thing) and not issubclass(thing, Exception)}
    config = make_config(key=SECRET, key_id=KEY_ID)
    given: dict[str, Any] = {"domain": str(DOMAIN), "key": f"{KEY_ID}.{SECRET}", "log_config": None}
    jwt = JwtManager(config.access_key, CUSTOMER)
    spy.tokens |= {jwt.get_token(), jwt.refresh_token()}
    line = await Line.open(key=SECRET)
    line.send("CONNECT: 203.0.113.7")
    pool = tunnel_asgi.TunnelPool(config, Recorder, standby=lambda visitors: 1)
    share = tunnel_asgi.share(app, **given)
    things: dict[str, object] = {
        "AccessKey": AccessKey.parse(f"{KEY_ID}.{SECRET}"),
        "Config": tunnel_asgi.Config(app, **given),
        "ForwardStats": tunnel_asgi.ForwardStats(0, 0),
        "JwtManager": jwt,
        "Server": tunnel_asgi.Server(tunnel_asgi.Config(app, **given)),
        "Share": share,
        "ThreadShare": tunnel_asgi.ThreadShare(share, asyncio.get_running_loop),
        "TunnelConfig": config,
        "TunnelDomain": config.tunnel_domain,
        "TunnelListener": tunnel_asgi.TunnelListener(config),
        "TunnelPool": pool,
        "TunnelTransport": line.owner.transports[0],
    }
    assert set(things) == classes, "tell here what the new one looks like"
    for thing in [*things.values(), line.connection, dial]:
        spy.see(thing)
    await line.close()
    spy.check()


# Secrets: other processes

APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})
"""

LOGGING = {"version": 1, "root": {"level": 1, "handlers": ["all"]}, "disable_existing_loggers": False}
LOGGING["handlers"] = {"all": {"class": "logging.StreamHandler"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(APP)
    (tmp_path / "key").write_text(f"{KEY_ID}.{SECRET}\n")
    (tmp_path / "log.json").write_text(json.dumps(LOGGING))
    return tmp_path


@pytest.fixture
def relay() -> Iterator[RelayThread]:
    with relay_thread(keys=KEYS, domain=DOMAIN) as running:
        yield running


def seen_by_others(pid: int) -> str:
    """The arguments of a process, as every user of the machine can read them."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


KEY_FROM = {
    "file": (["--key-file", "key"], {}),
    "environment": ([], {"SMALLWARE_KEY": f"{KEY_ID}.{SECRET}"}),
    "command line": (["--key", f"{KEY_ID}.{SECRET}"], {}),
}


@pytest.mark.parametrize("source", KEY_FROM)
@pytest.mark.parametrize("mode", [["--workers", "2"], ["--reload"]], ids=["workers", "reload"])
def test_a_worker_shows_no_key_but_where_the_user_put_it(
    source: str, mode: list[str], folder: Path, relay: RelayThread
) -> None:
    pytest.importorskip("watchfiles")
    key, env = KEY_FROM[source]
    options = ["main:app", "--domain", str(DOMAIN), "--server", relay.relay.server_url, "--log-level", "trace"]
    with Running(*options, *key, *mode, "--log-config", "log.json", cwd=folder, env=env) as running:
        relay.wait_until(lambda relay: any(tunnel.state == "waiting" for tunnel in relay.tunnels))
        workers = [int(match[1]) for match in running.expect_times(1, r"Started server process \[(\d+)\]")]
        assert httpx.get(relay.relay.url, trust_env=False).text == "hello"
        for worker in workers:
            assert worker != running.pid
            assert SECRET not in seen_by_others(worker)
            assert (SECRET in environment_of(worker)) is (source == "environment")
        assert (SECRET in seen_by_others(running.pid)) is (source == "command line")
        assert running.stop() == 0
    for secret in (SECRET, "eyJ", "Bearer"):
        assert secret not in running.output


FORWARD = (sys.executable, "-c", "from tunnel_asgi.forward_cli import smallware_tunnel; smallware_tunnel()")


@pytest.mark.parametrize(
    "command", [[*TUNNEL_ASGI, "main:app", "--log-config", "log.json"], [*FORWARD]], ids=["tunnel-asgi", "forward"]
)
@pytest.mark.parametrize("status", [401, 404])
def test_a_command_that_is_refused_shows_no_key(
    command: list[str], status: int, folder: Path, relay: RelayThread
) -> None:
    relay.call(relay.relay.refuse, status)
    tunnel = ["--server", relay.relay.server_url, "--key-file", "key"]
    more = [str(DOMAIN), "9"] if "main:app" not in command else ["--domain", str(DOMAIN)]
    with Running(*more, *tunnel, command=tuple(command), cwd=folder) as running:
        assert running.wait() != 0
    assert "refused" in running.output or "does not accept" in running.output
    for secret in (SECRET, "eyJ", "Bearer"):
        assert secret not in running.output
