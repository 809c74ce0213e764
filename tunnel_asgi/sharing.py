"""Share an app from code that goes on: ``share`` in a running loop, ``share_in_thread`` from synchronous code."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import threading
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from tunnel_asgi.errors import ConfigError, LifespanFailed, ListenerClosed, TunnelError
from tunnel_asgi.server import LAST_WORDS, Config, Server

__all__ = ["Share", "ThreadShare", "share", "share_in_thread"]

P = ParamSpec("P")
T = TypeVar("T")


def share(app: Any, **options: Any) -> Share:
    """Give an app a public URL inside a running loop.

    ``async with share(app, local=True) as tunnel`` serves visitors of ``tunnel.url`` in the block. ``app`` is an app
    or an import string. Options: see ``Config``, but logging is left alone unless ``log_config`` is given, ``port``
    is 0 (any free one) unless told otherwise, and ``reload`` and ``workers`` are not for here. No signal handler is
    installed. The app is loaded by this call and started on entering.

    Raises:
        ConfigError: an option cannot work, or the app cannot be loaded. On entering: see ``Share``.
    """
    return Share(_config(app, options))


def share_in_thread(app: Any, **options: Any) -> ThreadShare:
    """Give an app a public URL from synchronous code, or from a loop that others block.

    The app is loaded here, started in an event loop in a thread of its own, and serves visitors of ``url`` when this
    returns. ``close()`` ends that, and so does leaving ``with share_in_thread(app, local=True) as tunnel``. Options
    and errors: as ``share``, and those of its start.
    """
    config = _config(app, options)
    tunnel = ThreadShare(Share(config), config.get_loop_factory() or asyncio.new_event_loop)
    tunnel._open()
    return tunnel


def _config(app: Any, options: dict[str, Any]) -> Config:
    if options.get("reload") or (options.get("workers") or 1) > 1:
        raise ConfigError("reload and workers start processes, which sharing does not: use tunnel_asgi.run for them")
    return Config(app, **{"port": 0, "log_config": None, **options})


class Share:
    """An app behind a public URL. Made by ``share``; belongs to the loop it is opened in.

    ``async with`` opens and closes it; so do ``tunnel = await share(app)`` and ``await tunnel.close()``. It opens
    once. Leaving lets requests in flight finish, for ``timeout_graceful_shutdown`` seconds at most; who is
    cancelled meanwhile waits for nobody any more.

    Raises:
        LifespanFailed: on entering; the app refused to start.
        RelayFailed: on entering; with ``local``, the port cannot be opened.
        TunnelError: on entering, if the tunnel cannot be opened; on leaving, if it failed for good since, unless
            the block raised an exception of its own.
    """

    def __init__(self, config: Config) -> None:
        self.url: str = ""
        """What visitors open. Empty before the start."""
        self.ca_path: Path | None = None
        """With ``local`` and ``tls``, the certificate that clients must trust."""
        self._config = config  # never loaded itself: every app is loaded with a copy
        self._current = self._load(config.app)
        self._server = _GuestServer(self._current, self._answer, on_started=self._on_started)
        self._serving: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        if self._serving is not None:
            raise RuntimeError("this was opened before: call share() again")
        self._started = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self._server.serve())
        try:
            await asyncio.wait({self._serving, self._started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            raise
        if self._serving.done():
            self._serving.result()
            raise ListenerClosed("the tunnel was closed while it started")
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except TunnelError:
            if value is None:
                raise

    async def close(self) -> None:
        """Take no more visitors, finish what is in flight, end the lifespan, close the tunnel. Idempotent.

        Raises:
            TunnelError: the tunnel had failed for good.
        """
        if self._serving is None:
            return
        self._server.should_exit = True
        ending = {self._serving, *self._retiring}
        try:
            await asyncio.wait(ending)
        except asyncio.CancelledError:
            self._server.force_exit = True
            for task in self._retiring:
                task.cancel()
            await asyncio.wait(ending)
            raise
        if not self._serving.cancelled():  # with its start
            self._serving.result()

    @property
    def app(self) -> Any:
        """What was given: the app, or its import string.

        Assigning another one swaps it in at once, for new requests; those that run finish on the old app. An
        assignment cannot wait, so the new app's lifespan does not run: ``swap`` does that.

        Raises:
            ConfigError: the app cannot be loaded. The old one stays.
            ListenerClosed: the tunnel is not open.
        """
        return self._current.app

    @app.setter
    def app(self, app: Any) -> None:
        self._check_open()
        self._put(self._load(app, lifespan=False))

    async def swap(self, app: Any) -> None:
        """Start another app and, once it has started, let it answer new requests behind the same URL.

        Requests that run finish on the old app, for ``timeout_graceful_shutdown`` seconds at most; then its
        lifespan ends. That is not waited for here, but by ``close``.

        Raises:
            ConfigError: the app cannot be loaded. Whatever is raised, the old app stays.
            LifespanFailed: it refused to start.
            ListenerClosed: the tunnel is not open.
        """
        await self._deploy(self._load(app))

    def _load(self, app: Any, *, lifespan: bool = True) -> _Deployment:
        config = copy.copy(self._config)
        config.app = app
        if not lifespan:
            config.lifespan = "off"
        config.load()
        return _Deployment(config)

    async def _deploy(self, new: _Deployment) -> None:
        self._check_open()
        await new.start()
        if not self._is_open():
            await new.retire()
        self._check_open()
        self._put(new)

    def _put(self, new: _Deployment) -> None:
        old, self._current = self._current, new
        self._server.lifespan = new.lifespan
        assert self._serving is not None
        retiring = self._serving.get_loop().create_task(old.retire())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self._current.answer(scope, receive, send)

    def _on_started(self) -> None:
        self.url = str(self._server.config.public_url)
        self.ca_path = self._server.config.ca_path
        assert self._started is not None
        self._started.set_result(None)

    def _is_open(self) -> bool:
        serving = self._serving is not None and not self._serving.done()
        return serving and bool(self.url) and not self._server.should_exit

    def _check_open(self) -> None:
        if not self._is_open():
            raise ListenerClosed("the tunnel is not open")


class _Deployment:
    """One app behind the URL: its lifespan, and the requests it answers."""

    def __init__(self, config: Config) -> None:
        self.app = config.app
        self.config = config
        self.lifespan: Any = config.lifespan_class(config)
        self._requests: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        try:
            await self.lifespan.startup()
            if self.lifespan.should_exit:
                raise LifespanFailed
        except BaseException:
            await self._end_lifespan()
            raise

    async def answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        request = asyncio.current_task()
        assert request is not None
        self._requests.add(request)
        try:
            # The connection may be older than this app, and has another one's state.
            await self.config.loaded_app({**scope, "state": self.lifespan.state.copy()}, receive, send)
        finally:
            self._requests.discard(request)

    async def retire(self) -> None:
        """Wait for its requests, bounded, and end its lifespan."""
        try:
            await self._finish_requests()
            await self.lifespan.shutdown()
        finally:
            await self._end_lifespan()

    async def _finish_requests(self) -> None:
        if not self._requests:
            return
        _, late = await asyncio.wait(self._requests, timeout=self.config.timeout_graceful_shutdown)
        for request in late:
            request.cancel("another app took over, timeout graceful shutdown exceeded")
        if late:
            await asyncio.wait(late, timeout=LAST_WORDS)

    async def _end_lifespan(self) -> None:
        """Cancel what would outlive it: an app may go on after its last word."""
        task: asyncio.Task[None] | None = getattr(self.lifespan, "task", None)
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=LAST_WORDS)


class _GuestServer(Server):
    """A server in somebody else's loop, for apps that come and go."""

    def __init__(self, first: _Deployment, app: Any, *, on_started: Callable[[], None]) -> None:
        config = copy.copy(first.config)
        config.loaded_app = app
        config.lifespan_class = lambda _: first.lifespan
        super().__init__(config, on_started=on_started)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()  # Ctrl+C stays the host's


class ThreadShare:
    """An app behind a public URL, in a thread. Made by ``share_in_thread``; its methods are for any other thread.

    A context manager that closes on leaving. Leaving lets requests in flight finish, for
    ``timeout_graceful_shutdown`` seconds at most; an interrupt (Ctrl+C) meanwhile waits for nobody any more.
    """

    def __init__(self, share: Share, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._share = share
        self._stop = asyncio.Event()
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._run, name="tunnel-asgi share", daemon=True)
        self._gate = threading.RLock()  # who closes holds it, so that nobody is left waiting for a loop that has ended
        self._ended = False

    @property
    def url(self) -> str:
        """What visitors open."""
        return self._share.url

    @property
    def ca_path(self) -> Path | None:
        """With ``local`` and ``tls``, the certificate that clients must trust."""
        return self._share.ca_path

    @property
    def app(self) -> Any:
        """What was given: the app, or its import string. Assigning another one is ``swap``."""
        return self._share.app

    @app.setter
    def app(self, app: Any) -> None:
        self.swap(app)

    def swap(self, app: Any) -> None:
        """As ``Share.swap``: returns when the new app, its lifespan started, answers new requests."""
        self._call(self._share._deploy, self._share._load(app))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TunnelError:
            if value is None:
                raise

    def close(self) -> None:
        """As ``Share.close``; then the thread ends. Idempotent, and whoever else calls it meanwhile waits as well."""
        self._check_thread()
        with self._gate:
            if self._ended:
                return
            try:
                self._call(self._share.close)
            finally:
                self._end()

    def _open(self) -> None:
        self._thread.start()
        try:
            self._call(self._share.__aenter__)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        self._ended = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stop.wait())

    def _call(self, method: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it in the thread's loop. An interrupt here cancels it there."""
        self._check_thread()
        with self._gate:
            if self._ended:
                raise ListenerClosed("the tunnel is closed")
            future = asyncio.run_coroutine_threadsafe(method(*args, **kwargs), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ListenerClosed("the tunnel was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise

    def _check_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("this would wait for itself: call it from another thread than the app's")
