"""Dials through proxies. The name of the tunnel server resolves at the proxy only, as in many a company."""

from __future__ import annotations

import asyncio
import base64
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.uri import parse_uri

from tests.fakes import FakeOwner, make_config
from tests.processes import Running, relay_thread
from tests.support import DOMAIN, KEY_ID, KEYS, SECRET, run_async, visiting
from tunnel_asgi.auth import JwtManager
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.connection import dial
from tunnel_asgi.errors import ConnectionFailed
from tunnel_asgi.listener import TunnelListener
from tunnel_asgi.relay import Relay

HOST = "relay.test"  # a name that resolves nowhere (RFC 2606)
PASSWORD = "proxy-password"
PROXY_VARIABLES = ("ws_proxy", "wss_proxy", "socks_proxy", "https_proxy", "http_proxy", "all_proxy", "no_proxy")

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Proxy:
    """A proxy that knows ``HOST``."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.refuse = refuse
        self.asked: list[tuple[str, int]] = []
        self.credentials: list[str] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self, handler: Handler) -> AsyncIterator[Proxy]:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(handler, reader, writer))
            self._tasks.add(task)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    async def _serve(self, handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """HTTP CONNECT."""
        request, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = request.split(" ")
        assert method == "CONNECT"
        host, _, port = target.rpartition(":")
        self.asked.append((host, int(port)))
        for field in fields:
            if field.lower().startswith("proxy-authorization: basic "):
                self.credentials.append(base64.b64decode(field.split(" ")[2]).decode())
        if self.refuse:
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return
        await self._join(reader, writer, host, int(port), b"HTTP/1.1 200 OK\r\n\r\n")

    async def socks5(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """SOCKS5 with a user name and password (RFC 1928 and 1929)."""
        assert await reader.readexactly(1) == b"\5"
        assert b"\2" in await reader.readexactly((await reader.readexactly(1))[0])
        writer.write(b"\5\2")
        assert await reader.readexactly(1) == b"\1"
        user = await reader.readexactly((await reader.readexactly(1))[0])
        password = await reader.readexactly((await reader.readexactly(1))[0])
        self.credentials.append(f"{user.decode()}:{password.decode()}")
        writer.write(b"\1\0")
        assert await reader.readexactly(4) == b"\5\1\0\3"  # connect, to a name
        host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        port = int.from_bytes(await reader.readexactly(2), "big")
        self.asked.append((host, port))
        if self.refuse:
            writer.write(b"\5\2\0\1" + bytes(6))
            await writer.drain()
            return
        await self._join(reader, writer, host, port, b"\5\0\0\1" + bytes(6))

    async def _join(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, answer: bytes
    ) -> None:
        assert host == HOST
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(answer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        finally:
            far_writer.close()
            with suppress(OSError):
                await far_writer.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(64 * 1024):
                writer.write(data)
                await writer.drain()
        writer.close()


def config_for(relay: Relay) -> TunnelConfig:
    port = parse_uri(relay.server_url).port
    return make_config(f"ws://{HOST}:{port}/tunnels", allow_insecure_server=True)


async def serve_a_visitor(relay: Relay) -> None:
    data = bytes(range(256)) * 4096
    async with TunnelListener(config_for(relay)) as listener, visiting(relay) as visitor:
        reader, writer = await listener.accept()
        sending = asyncio.create_task(visitor.send(data))
        assert await reader.readexactly(len(data)) == data
        await sending
        writer.write(data)
        writer.write_eof()
        assert await visitor.read_all() == data
        writer.close()
    assert relay.violations == []


async def failure_of(config: TunnelConfig) -> str:
    """How a dial fails; neither there nor in the traceback may a password stand."""
    jwt = JwtManager(config.access_key, config.tunnel_domain.customer_id)
    with pytest.raises(ConnectionFailed) as raised:
        await dial(config, jwt, None, FakeOwner())
    assert PASSWORD not in "".join(traceback.format_exception(raised.value))
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "ws_proxy"])
@run_async
async def test_an_http_proxy_in_the_environment_is_used(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, proxy.running(proxy.connect):
        monkeypatch.setenv(variable, f"http://ann:{PASSWORD}@127.0.0.1:{proxy.port}")
        await serve_a_visitor(relay)
        assert set(proxy.asked) == {(HOST, parse_uri(relay.server_url).port)}
        assert set(proxy.credentials) == {f"ann:{PASSWORD}"}


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "socks_proxy"])
@run_async
async def test_a_socks_proxy_in_the_environment_is_used(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, proxy.running(proxy.socks5):
        monkeypatch.setenv(variable, f"socks5h://ann:{PASSWORD}@127.0.0.1:{proxy.port}")
        await serve_a_visitor(relay)
        assert set(proxy.asked) == {(HOST, parse_uri(relay.server_url).port)}
        assert set(proxy.credentials) == {f"ann:{PASSWORD}"}


@pytest.mark.parametrize("no_proxy", [HOST, ".test", "*"])
@run_async
async def test_no_proxy_is_honoured(no_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getaddrinfo = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        return getaddrinfo("127.0.0.1" if host == HOST else host, *arguments, **options)

    proxy = Proxy()
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, proxy.running(proxy.connect):
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", no_proxy)
        await serve_a_visitor(relay)
        assert proxy.asked == []


@pytest.mark.parametrize("kind", ["http", "socks5h"])
@run_async
async def test_a_proxy_that_refuses_is_one_clear_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(refuse=True)
    async with proxy.running(proxy.connect if kind == "http" else proxy.socks5):
        monkeypatch.setenv("HTTPS_PROXY", f"{kind}://ann:{PASSWORD}@127.0.0.1:{proxy.port}")
        message = await failure_of(make_config(f"wss://{HOST}/tunnels"))
        assert message.startswith(f"cannot reach the tunnel server wss://{HOST}/tunnels: ")
        assert "proxy" in message


@pytest.mark.parametrize("kind", ["http", "socks5h"])
@run_async
async def test_a_proxy_that_is_down_is_one_clear_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"{kind}://ann:{PASSWORD}@127.0.0.1:{port}")
    message = await failure_of(make_config(f"wss://{HOST}/tunnels"))
    assert str(port) in message


def test_a_socks_proxy_without_its_package_names_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['python_socks'] = None; from tunnel_asgi import forward_cli as f; "
    command = (sys.executable, "-c", program + "f.smallware_tunnel()")
    env = {"SMALLWARE_KEY": f"{KEY_ID}.{SECRET}", "HTTPS_PROXY": f"socks5h://ann:{PASSWORD}@127.0.0.1:9"}
    with Running(str(DOMAIN), "80", cwd=tmp_path, command=command, env=env) as process:
        process.expect(r"Error: a SOCKS proxy .*: pip install 'tunnel-asgi\[socks\]'")
        assert process.wait() == 1
        assert PASSWORD not in process.output


def test_a_server_on_this_machine_needs_no_proxy(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "from tunnel_asgi import forward_cli as f; f.smallware_tunnel()")
    env = {"SMALLWARE_KEY": f"{KEY_ID}.{SECRET}", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with relay_thread(domain=DOMAIN) as thread:
        arguments = (str(DOMAIN), "80", "--server", thread.relay.server_url)
        with Running(*arguments, cwd=tmp_path, command=command, env=env) as process:
            process.expect("INFO: Forwarding")
            assert process.stop() == 0
