"""What tests about the network share: a bounded event loop that must end clean, clients, visitors, TLS."""

from __future__ import annotations

import asyncio
import datetime
import functools
import gc
import ipaddress
import selectors
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, cast

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.client import ClientConnection, connect

from tunnel_asgi.auth import AccessKey, JwtManager
from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.relay import Relay
from tunnel_asgi.relay.tcp import reset
from tunnel_asgi.server import Config, Server

gc.freeze()  # what was imported is no garbage: ``run_async`` need not look through it each time

TEST_TIMEOUT = 20.0  # seconds: far beyond any good run

CUSTOMER = "acme"
KEY_ID = "test-key"
SECRET = "sesame"
KEYS = {CUSTOMER: {KEY_ID: SECRET}, "other": {"other-key": "open"}}
DOMAIN = TunnelDomain.parse("www-app-acme.t00.smallware.io")

P = ParamSpec("P")


def run_async(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run the test in a loop of its own: bounded, and without a task or an unheard exception left at its end."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        unheard: list[dict[str, Any]] = []

        async def bounded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
            async with asyncio.timeout(TEST_TIMEOUT):
                await test(*args, **kwargs)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left: {left}"

        asyncio.run(bounded())
        gc.collect()  # so that an unclosed socket complains here
        assert not unheard, unheard

    return run


def make_token(customer_id: str = CUSTOMER, *, key_id: str = KEY_ID, secret: str = SECRET) -> str:
    """A good token for the keys above."""
    return JwtManager(AccessKey(key_id, secret), customer_id).get_token()


def dial(relay: Relay, domain: TunnelDomain = DOMAIN, *, token: str | None = None, **options: Any) -> connect:
    """A raw client: ``async with dial(relay) as ws`` or ``await dial(relay)``."""
    headers = {"Authorization": f"Bearer {make_token(domain.customer_id) if token is None else token}"}
    options = {"additional_headers": headers, "compression": None, "proxy": None, "close_timeout": 1} | options
    return connect(f"{relay.server_url}/{domain}", **options)


@asynccontextmanager
async def serving(
    *, clients: int = 1, domain: TunnelDomain | None = DOMAIN, **options: Any
) -> AsyncIterator[tuple[Relay, list[ClientConnection]]]:
    """A relay for ``DOMAIN`` at which this many raw clients wait, in the order of the list."""
    async with Relay(keys=KEYS, domain=domain, **options) as relay:
        ends = []
        try:
            for n in range(clients):
                ends.append(await dial(relay))
                await relay.wait_for_waiting(n + 1)
            yield relay, ends
        finally:
            for ws in ends:
                await ws.close()


class Visitor:
    """A raw visitor of a relay: ``async with visiting(relay) as visitor``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def send_eof(self) -> None:
        self.writer.write_eof()

    async def read(self, n: int) -> bytes:
        """Exactly ``n`` bytes."""
        return await self.reader.readexactly(n)

    async def read_all(self) -> bytes:
        """Everything up to the end.

        Raises:
            ConnectionResetError: the end was none.
        """
        return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    def pause(self) -> None:
        """Read nothing more from the socket."""
        self.reader._transport.pause_reading()  # type: ignore[attr-defined]

    def resume(self) -> None:
        self.reader._transport.resume_reading()  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Fail: a TCP reset."""
        reset(cast(asyncio.Transport, self.writer.transport))


@asynccontextmanager
async def visiting(
    relay: Relay, *, ssl: ssl.SSLContext | None = None, port: int | None = None
) -> AsyncIterator[Visitor]:
    """A visitor at the relay's visitors' port (or at another one), closed at the end."""
    visitor = Visitor(*await asyncio.open_connection("127.0.0.1", port or relay.port, ssl=ssl))
    try:
        yield visitor
    finally:
        await visitor.close()


def make_tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server and client context of a throwaway certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate_file, key_file)
    return server, ssl.create_default_context(cafile=str(certificate_file))


# What tests of the ASGI server share


class Served:
    """A server whose visitors come through an embedded relay."""

    def __init__(self, relay: Relay, server: Server, task: asyncio.Task[None]) -> None:
        self.relay = relay
        self.server = server
        self.task = task

    @property
    def url(self) -> str:
        """What visitors open."""
        return self.relay.url

    @property
    def ws_url(self) -> str:
        """The same, for a WebSocket client."""
        return self.relay.url.replace("http", "ws", 1)

    def client(self, **options: Any) -> httpx.AsyncClient:
        """An HTTP client for visitors: ``async with served.client() as client``."""
        return httpx.AsyncClient(**{"base_url": self.url, "trust_env": False, **options})

    def open_ws(self, path: str = "/", **options: Any) -> connect:
        """A WebSocket client for visitors: ``async with served.open_ws("/chat") as ws``."""
        return connect(self.ws_url + path, **{"proxy": None, **options})


def make_server(app: Any, relay: Relay, *, on_started: Callable[[], None] | None = None, **options: Any) -> Server:
    """A server for ``app`` that dials this relay."""
    given = {
        "domain": str(DOMAIN),
        "key": SECRET,
        "key_id": KEY_ID,
        "server_url": relay.server_url,
        "log_config": None,
        "standby": 2,
        **options,
    }
    return Server(Config(app, **given), on_started=on_started)


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[Served]:
    """Serve ``app`` to the visitors of a relay; at the end nothing may be left and no rule broken.

    Raises:
        TunnelError: as ``Server.serve``.
    """
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        started = asyncio.Event()
        server = make_server(app, relay, on_started=started.set, **options)
        task = asyncio.create_task(server.serve())
        starting = asyncio.create_task(started.wait())
        try:
            await asyncio.wait({task, starting}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            yield Served(relay, server, task)
        finally:
            starting.cancel()
            server.should_exit = True
            await asyncio.wait({task, starting})
        await task
        assert relay.violations == []
        assert relay.tunnels == []
        assert not server.server_state.connections
        assert not server.server_state.tasks


VIRTUAL_LIMIT = 30 * 24 * 3600.0  # seconds on the virtual clock


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer when there is nothing to do. For tests without sockets.

    Waiting for what no timer will bring is an error instead of a hang.
    """

    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("the test waits for what will never happen")
        if not ready and timeout:
            self._loop.now += timeout
            assert self._loop.now < VIRTUAL_LIMIT, "the test goes on for ever"
        return ready


def run_virtually(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run the test on a virtual clock; it must leave no unheard exception behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        unheard: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.get_loop().set_exception_handler(lambda loop, context: unheard.append(context))
            runner.run(test(*args, **kwargs))
        assert not unheard, unheard

    return run
