"""Serve an ASGI app through a tunnel: uvicorn's server whose ``startup`` opens a pool instead of a port."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import logging
import os
import socket
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.config
import uvicorn.server
from uvicorn.importer import ImportFromStringError, import_from_string
from uvicorn.lifespan.off import LifespanOff
from uvicorn.lifespan.on import LifespanOn
from uvicorn.middleware.asgi2 import ASGI2Middleware
from uvicorn.middleware.message_logger import MessageLoggerMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tunnel_asgi.config import PublicURL, TunnelConfig, read_key_file
from tunnel_asgi.errors import AppLoadFailed, ConfigError, LifespanFailed
from tunnel_asgi.guard import Timeouts, guarded, guarded_websocket
from tunnel_asgi.local import LocalRelay
from tunnel_asgi.pool import STANDBY, TunnelPool, adaptive_standby

__all__ = ["Config", "Server", "serve"]

logger: logging.Logger = logging.getLogger("uvicorn.error")

GRACEFUL_SHUTDOWN = 10  # seconds; uvicorn's default is for ever, so one SSE visitor would block Ctrl+C
LAST_WORDS = 1.0  # seconds for what cancelled tasks still do and answer
MAX_PORT = 65535

DIFFERENT_DEFAULTS: Mapping[str, Any] = {
    "http": "h11",
    "proxy_headers": False,
    "timeout_graceful_shutdown": GRACEFUL_SHUTDOWN,
}
"""uvicorn's options whose defaults are others here."""

SOCKET_OPTIONS = frozenset(
    {
        "host",
        "uds",
        "fd",
        "backlog",
        "http2",  # needs ALPN, and the visitor's TLS ends at the tunnel server
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_keyfile_password",
        "ssl_version",
        "ssl_cert_reqs",
        "ssl_ca_certs",
        "ssl_ciphers",
        "ssl_context_factory",
    }
)
"""uvicorn's options that only make sense for a port of one's own."""


def logging_config() -> dict[str, Any]:
    """uvicorn's default logging configuration, with the logger ``tunnel_asgi`` beside its own."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"]["tunnel_asgi"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config


class Config(uvicorn.Config):
    """uvicorn's ``Config`` with a tunnel instead of a socket.

    ``app`` and every uvicorn option but those about sockets mean what they mean there. Different defaults:
    ``http="h11"``, ``proxy_headers=False`` (the visitor's address comes from the tunnel, so anything a visitor
    claims is untrusted), ``timeout_graceful_shutdown=10``.

    The tunnel: ``domain``, ``key`` (or ``key_file``, or SMALLWARE_KEY), ``key_id``, ``server_url``,
    ``trust_ca``, ``allow_insecure_server`` as in ``TunnelConfig``. ``public_url`` is what visitors open if it
    is not ``https://<domain>``. With ``local=True`` an embedded relay on loopback serves visitors on ``port``
    (0: any free one; ``tls=True``: https) and neither domain nor key is needed. ``standby`` is how many
    WebSockets wait when nobody is connected. ``timeout_first_byte``, ``timeout_request_head`` and
    ``timeout_request_body`` are deadlines for visitors in seconds, 0 for none; ``timeout_write`` is how long a visitor
    may read nothing of what waits for it. A request body of more than ``limit_body`` bytes is answered 413; None or 0
    for no limit.

    Raises:
        ConfigError: an option cannot work. Nothing has been dialled.
    """

    def __init__(
        self,
        app: Any,
        *,
        domain: str | None = None,
        key: str | None = None,
        key_file: str | os.PathLike[str] | None = None,
        key_id: str | None = None,
        server_url: str | None = None,
        trust_ca: str | os.PathLike[str] | None = None,
        allow_insecure_server: bool = False,
        public_url: str | None = None,
        local: bool = False,
        port: int = 8000,
        tls: bool = False,
        standby: int = STANDBY,
        timeout_first_byte: float = Timeouts.first_byte,
        timeout_request_head: float = Timeouts.head,
        timeout_request_body: float = Timeouts.body,
        timeout_write: float = TunnelConfig.write_timeout,
        limit_body: int | None = None,
        **uvicorn_options: Any,
    ) -> None:
        for name in SOCKET_OPTIONS & uvicorn_options.keys():
            raise ConfigError(f"{name!r} is about a socket, and a tunnel opens no port: leave it out")
        _check_numbers(
            port=port,
            timeout_first_byte=timeout_first_byte,
            timeout_request_head=timeout_request_head,
            timeout_request_body=timeout_request_body,
            timeout_write=timeout_write,
            limit_body=limit_body or 0,
        )
        if standby < 1:
            raise ConfigError("standby must be at least 1: no visitor can come without a waiting WebSocket")
        uvicorn_options.setdefault("log_config", logging_config())  # None is an answer: leave logging alone
        for name, default in DIFFERENT_DEFAULTS.items():
            if uvicorn_options.get(name) is None:
                uvicorn_options[name] = default
        super().__init__(app, port=port, **uvicorn_options)

        self.local = local
        self.tls = tls
        self.standby = standby
        self.timeouts: Timeouts = Timeouts(timeout_first_byte, timeout_request_head, timeout_request_body)
        self.timeout_write = timeout_write
        self.limit_body = limit_body or 0
        self.public_url = PublicURL.parse(public_url) if public_url else None
        self.tunnel: TunnelConfig | None = None
        self.ca_path: Path | None = None
        """With ``local`` and ``tls``, the certificate that visitors must trust; known while it is served."""
        if local:
            if domain or server_url:
                raise ConfigError("--local brings its own domain and server: leave out --domain and --server")
        elif tls:
            raise ConfigError("tls goes with local: the visitor's TLS ends at the tunnel server")
        else:
            self.tunnel = _tunnel_config(
                domain=domain,
                key=key or (read_key_file(key_file) if key_file else None),
                key_id=key_id,
                server_url=server_url,
                trust_ca=trust_ca,
                allow_insecure_server=allow_insecure_server,
            )
            self.tunnel = dataclasses.replace(self.tunnel, write_timeout=timeout_write)
            self.tunnel.make_ssl_context()  # an unreadable CA must show before the app starts
            if self.public_url is None:
                self.public_url = PublicURL("https", str(self.tunnel.tunnel_domain), 443)

    @contextlib.contextmanager
    def embedded_relay(self) -> Generator[None]:
        """With ``local``, run the relay and point the tunnel at it; otherwise, or if that is done, nothing.

        Raises:
            RelayFailed: the port cannot be opened.
        """
        if self.tunnel is not None:
            yield
            return
        with LocalRelay(port=self.port, tls=self.tls) as relay:
            self.tunnel = dataclasses.replace(relay.tunnel_config, write_timeout=self.timeout_write)
            given, self.public_url = self.public_url, self.public_url or PublicURL.parse(relay.url)
            self.ca_path = relay.ca_path
            if self.ca_path is not None:
                logger.info("Development CA for this machine: %s (curl --cacert, or import it)", self.ca_path)
            try:
                yield
            finally:
                self.tunnel, self.public_url = None, given

    def configure_logging(self) -> None:
        """Set up logging as ``log_config`` says.

        Raises:
            ConfigError: it cannot be used, or there is no such log level.
        """
        if isinstance(self.log_level, str) and self.log_level.lower() not in uvicorn.config.LOG_LEVELS:
            raise ConfigError(
                f"there is no log level {self.log_level!r}: it is one of {', '.join(uvicorn.config.LOG_LEVELS)}"
            )
        try:
            super().configure_logging()
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:  # all that logging.config raises
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"the log configuration {self.log_config!r} cannot be used: {reason}") from error
        if self.log_level is not None:
            logging.getLogger("tunnel_asgi").setLevel(logging.getLogger("uvicorn.error").level)

    def get_loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop] | None:
        """The event loop ``Server.run`` uses.

        Raises:
            ConfigError: there is none of that name, or it is not installed.
        """
        try:
            if self.loop not in uvicorn.config.LOOP_FACTORIES:
                import_from_string(self.loop)  # uvicorn would log and exit
            return super().get_loop_factory()
        except ImportFromStringError as error:
            raise ConfigError(f"there is no event loop {self.loop!r}: {error}") from error
        except ImportError as error:
            raise ConfigError(f"the event loop {self.loop!r} is not installed (uvloop is in [fast])") from error

    def load_app(self) -> Any:
        """Import the app.

        Raises:
            AppLoadFailed: the module or attribute does not exist, or is not callable. An exception raised
                inside the module is passed on as it is.
        """
        try:
            app = import_from_string(self.app)
        except ImportFromStringError as error:
            raise AppLoadFailed(f"cannot load the app: {error}") from error
        if not callable(app):
            raise AppLoadFailed(f"{_app_name(self.app)} is not an ASGI app: it is of type {type(app).__name__}")
        return app

    def load(self) -> None:
        """Load the app, the parsers and the lifespan.

        Raises:
            AppLoadFailed: as ``load_app``; also when what it names, or the factory returns, is not an ASGI app.
            ConfigError: a parser that is not installed was asked for, or what a WSGI app needs is not.
        """
        self._choose_parser()
        asked_for = self.interface
        wrap_wsgi = _wsgi_wrapper() if asked_for == "wsgi" else None
        try:
            super().load()
        except ImportFromStringError as error:
            raise ConfigError(f"cannot load a protocol: {error}") from error
        except SystemExit as error:
            raise self._factory_failure(error) from error
        self._check_interface(_unwrapped(self.loaded_app), guessed=asked_for == "auto")
        if wrap_wsgi is not None:
            self.loaded_app = _rewrapped(self.loaded_app, wrap_wsgi)
        if not hasattr(self.http_protocol_class, "timeouts"):
            logger.warning("%r has none of our checks and deadlines for visitors", self.http_protocol_class)
        if self.lifespan_class is LifespanOn:
            self.lifespan_class = Lifespan
        if self.ws in ("auto", "websockets-sansio", "wsproto") and self.ws_protocol_class is not None:
            self.ws_protocol_class: type[asyncio.Protocol] | None = guarded_websocket(self.ws_protocol_class)

    def _factory_failure(self, error: SystemExit) -> BaseException:
        cause = error.__context__
        if not isinstance(cause, TypeError) or cause.__traceback__ is None:
            return error  # the user's own exit
        if cause.__traceback__.tb_next is not None:
            return cause  # it was called, and failed inside
        return AppLoadFailed(f"the factory {_app_name(self.app)} could not be called without arguments: {cause}")

    def _check_interface(self, app: Any, *, guessed: bool) -> None:
        if not callable(app):
            raise AppLoadFailed(f"{_app_name(self.app)} returned a {type(app).__name__}, not an ASGI app")
        if guessed and self.interface == "asgi2" and _is_wsgi(app):
            raise AppLoadFailed(f"{_app_name(self.app)} is a WSGI app, not an ASGI app: use --interface wsgi")

    def _choose_parser(self) -> None:
        if self.ws == "wsproto" and importlib.util.find_spec("wsproto") is None:
            raise ConfigError("wsproto is not installed: pip install wsproto, or leave out --ws")
        if self.http not in ("auto", "h11", "httptools"):
            return  # a parser of the user's own, or one whose rules we do not know
        try:
            self.http: type[asyncio.Protocol] | str = guarded(
                "h11" if self.http == "h11" else "httptools", self.timeouts, limit_body=self.limit_body
            )
        except ImportError as error:
            if self.http == "httptools":
                raise ConfigError("httptools is not installed: pip install 'tunnel-asgi[fast]'") from error
            self.http = guarded("h11", self.timeouts, limit_body=self.limit_body)


def _check_numbers(*, port: int, **limits: float) -> None:
    for name, value in {"port": port, **limits}.items():
        if not value >= 0:  # nor NaN
            raise ConfigError(f"{name} must not be negative")
    if port > MAX_PORT:
        raise ConfigError(f"port must be at most {MAX_PORT}")


def _tunnel_config(**given: Any) -> TunnelConfig:
    return TunnelConfig.from_env(**{name: value for name, value in given.items() if value})


def _app_name(app: Any) -> str:
    return repr(app) if isinstance(app, str) else f"the app ({type(app).__name__})"


def _unwrapped(app: Any) -> Any:
    """The app without what uvicorn put around it."""
    wrappers = (ProxyHeadersMiddleware, MessageLoggerMiddleware, ASGI2Middleware, _wsgi_middleware())
    while type(app) in wrappers:
        app = app.app
    return app


def _wsgi_middleware() -> type:
    middleware: type = vars(uvicorn.config)["WSGIMiddleware"]  # a2wsgi's, or uvicorn's own
    return middleware


def _wsgi_wrapper() -> Callable[[Any], Any]:
    try:
        from tunnel_asgi.wsgi import WSGIApp
    except ImportError as error:
        raise ConfigError("a WSGI app needs a2wsgi: pip install 'tunnel-asgi[wsgi]'") from error
    return WSGIApp


def _rewrapped(app: Any, wrap_wsgi: Callable[[Any], Any]) -> Any:
    """The app with our adapter for WSGI where uvicorn put its own, inside of all it put around it."""
    inner = app.app
    if type(app) is _wsgi_middleware():
        return wrap_wsgi(inner)
    app.app = _rewrapped(inner, wrap_wsgi)
    return app


def _is_wsgi(app: Any) -> bool:
    """Whether it needs two arguments, ``environ`` and ``start_response``; ASGI 2 takes one."""
    try:
        signature = inspect.signature(app)
    except (TypeError, ValueError):
        return False
    return _accepts(signature, 2) and not _accepts(signature, 1)


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class Lifespan(LifespanOn):
    """uvicorn's lifespan, with a hand on its task."""

    task: asyncio.Task[None] | None = None

    async def main(self) -> None:
        self.task = asyncio.current_task()
        await super().main()


class Server(uvicorn.Server):
    """uvicorn's server over a tunnel.

    ``await serve()`` returns when ``should_exit`` is set or a signal came, and raises when the tunnel fails for
    good. ``on_started`` is called once visitors can come; the default logs the public URL.
    """

    config: Config

    def __init__(self, config: Config, *, on_started: Callable[[], None] | None = None) -> None:
        self._on_started = on_started or self.announce
        self._exit_event: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.pool: TunnelPool | None = None
        super().__init__(config)

    @property
    def should_exit(self) -> bool:
        """Set it to end ``serve()`` gracefully, from any thread or a signal handler."""
        return self._should_exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._should_exit = value
        if value and self._exit_event is not None:
            self._call_soon(self._exit_event.set)

    @property
    def force_exit(self) -> bool:
        """Set it, beside ``should_exit``, to wait for nothing and nobody any more."""
        return self._force_exit

    @force_exit.setter
    def force_exit(self, value: bool) -> None:
        self._force_exit = value
        if value:
            self._call_soon(self._abandon)

    def _call_soon(self, callback: Callable[[], object]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it is all over
                self._loop.call_soon_threadsafe(callback)

    def _abandon(self) -> None:
        for task in self._tasks():
            task.cancel()
        if self.pool is not None:
            self.pool.close()
            self.pool.abort_clients()

    def _tasks(self) -> list[asyncio.Task[None]]:
        """Of requests and of the lifespan, as far as they are not done."""
        lifespan = getattr(self.lifespan, "task", None)
        tasks = [*self.server_state.tasks, *([lifespan] if lifespan is not None else [])]
        return [task for task in tasks if not task.done()]

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Cancelling shuts down cleanly, too. ``sockets`` has no meaning here.

        Raises:
            ConfigError: the app cannot be loaded.
            LifespanFailed: the app refused to start.
            TunnelError: the tunnel failed for good: before it opened, or later and the last visitor is gone.
        """
        with self.capture_signals():
            if not self.config.loaded:
                self.config.load()
            with self.config.embedded_relay():
                await self._serve()

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifespan: LifespanOn | LifespanOff = self.config.lifespan_class(self.config)
        self._exit_event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self.should_exit:  # a signal came while the app was imported
            self._exit_event.set()
        logger.info("Started server process [%d]", os.getpid())
        try:
            await self._start_lifespan()
            await self._serve_visitors()
        finally:
            await self._end_tasks()
        logger.info("Finished server process [%d]", os.getpid())
        if self.pool is not None and self.pool.failure is not None:
            raise self.pool.failure

    async def _start_lifespan(self) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise LifespanFailed

    async def _serve_visitors(self) -> None:
        try:
            if not self.should_exit:
                await self._open_pool()
            if not self.should_exit:
                await self.main_loop()
        finally:
            await self.shutdown()

    async def _open_pool(self) -> None:
        """Return once a WebSocket waits, or ``should_exit`` is set."""
        assert self.config.tunnel is not None
        assert self.config.public_url is not None
        public = self.config.public_url
        self.pool = TunnelPool(
            self.config.tunnel,
            self._make_protocol,
            standby=adaptive_standby(self.config.standby),
            extra={"sockname": (public.host, public.port), "sslcontext": public.scheme == "https" or None},
        )
        self.servers = [self.pool]  # type: ignore[list-item]
        await self.on_tick(0)  # default headers, for a visitor who comes at once
        await self.pool.start_serving()
        await self._until_ready(self.pool)
        if self.should_exit:
            return
        self.started = True
        self._on_started()

    def announce(self) -> None:
        """Say where the app can be reached."""
        logger.info("Serving at %s (Press CTRL+C to quit)", self.config.public_url)

    async def _until_ready(self, pool: TunnelPool) -> None:
        assert self._exit_event is not None
        ready = asyncio.ensure_future(pool.wait_ready())
        stop = asyncio.ensure_future(self._exit_event.wait())
        try:
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
        finally:
            for waiter in (ready, stop):
                waiter.cancel()
            await asyncio.gather(ready, stop, return_exceptions=True)

    def _make_protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self._loop
        )

    async def on_tick(self, counter: int) -> bool:
        over = self._tunnel_is_over()
        return await super().on_tick(counter) or over

    def _tunnel_is_over(self) -> bool:
        """Whether the tunnel failed for good, and the last visitor is gone."""
        pool = self.pool
        if pool is None or pool.failure is None:
            return False
        if pool.accepting:
            logger.error("The tunnel failed, no new visitors can come: %s", pool.failure)
            pool.close()
        return not pool.busy

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop waiting, finish what is in flight, end the lifespan, close the tunnel."""
        if self.pool is None:
            self.servers: list[asyncio.Server] = []
        try:
            await super().shutdown()
        finally:
            if self.pool is not None:
                await self._close_pool(self.pool)

    async def _close_pool(self, pool: TunnelPool) -> None:
        pool.close_clients()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0 if self.force_exit else LAST_WORDS):
                    await pool.wait_closed()
        finally:
            await pool.aclose(abort=self.force_exit)

    async def _end_tasks(self) -> None:
        """Cancel what would outlive ``serve()``, and give it a moment."""
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one of either kind forces, a third breaks off what blocks the loop."""
        self._captured_signals.append(sig)
        if self.force_exit:
            raise KeyboardInterrupt
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


async def serve(app: Any, **options: Any) -> None:
    """Serve ``app`` inside a running loop until cancelled or a signal comes. Options: see ``Config``.

    Raises:
        TunnelError: as ``Config`` and ``Server.serve``. It never exits the process.
    """
    await Server(Config(app, **options)).serve()
