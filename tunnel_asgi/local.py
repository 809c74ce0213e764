"""The embedded relay in a thread of its own, for ``--local``."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.devca import DevelopmentCA
from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.relay import Relay

__all__ = ["LocalRelay"]

DOMAIN = TunnelDomain.parse("www-app-local.t00.localhost", suffix=None)
HOST = "127.0.0.1"


class LocalRelay:
    """A relay on loopback that hands every visitor to one tunnel. A context manager.

    The thread keeps it apart from the app: it outlives reloads, workers and handlers that block.

    Raises:
        RelayFailed: on entering; the port is taken or may not be opened.
    """

    def __init__(self, *, port: int = 8000, tls: bool = False) -> None:
        self._port = port
        self._secret = secrets.token_urlsafe(32)
        self._started: Future[Relay] = Future()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="tunnel-asgi relay", daemon=True)
        self._ssl: ssl.SSLContext | None = None
        self.ca_path: Path | None = None
        """With ``tls``, the certificate that visitors must trust."""
        if tls:
            ca = DevelopmentCA.load_or_create()
            self._ssl, self.ca_path = ca.server_context(["localhost", HOST, "::1"]), ca.certificate_path

    def __enter__(self) -> LocalRelay:
        self._thread.start()
        try:
            self.relay: Relay = self._started.result()
        except Exception:
            self._thread.join()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """What visitors open."""
        return self.relay.url

    @property
    def tunnel_config(self) -> TunnelConfig:
        """What a client of this relay needs."""
        return TunnelConfig(str(DOMAIN), key=self._secret, key_id="local", server_url=self.relay.server_url)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        keys = {DOMAIN.customer_id: {"local": self._secret}}
        async with Relay(keys=keys, domain=DOMAIN, host=HOST, port=self._port, ssl=self._ssl) as relay:
            self._started.set_result(relay)
            await self._stop.wait()
