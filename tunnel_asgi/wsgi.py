"""WSGI apps, through a2wsgi: their input as PEP 3333 wants it, and an end for answers whose visitor has left."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import Callable, Generator, Iterable, MutableMapping
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from a2wsgi import WSGIMiddleware

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["WSGIApp"]

THREADS = 40  # requests at once, as Starlette has for functions that block; a slow visitor holds one

GONE = "tunnel_asgi.gone"
"""Key in a request's scope: whether somebody still waits for the answer."""

P = ParamSpec("P")
T = TypeVar("T")
Environ = dict[str, Any]
Message = MutableMapping[str, Any]


class WSGIApp:
    """An ASGI app that runs ``app``, a WSGI app, in threads.

    What the app reads from ``wsgi.input`` ends where the body ends; if the visitor leaves before, reading raises
    ``ConnectionResetError``. The answer's iterable is asked for no more once the visitor has left, and closed.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._threads = asyncio.Semaphore(THREADS)
        self._middleware = cast(Any, WSGIMiddleware)(self._run)
        self._middleware.executor = _Threads()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._middleware(scope, receive, send)
            return
        visitor = _Visitor(scope, receive)
        watch = asyncio.create_task(visitor.watch())
        try:
            async with self._threads:
                await self._middleware({**scope, GONE: visitor.gone}, visitor.receive, send)
        finally:
            visitor.gone.set()
            watch.cancel()
            await asyncio.wait([watch])

    def _run(self, environ: Environ, start_response: Callable[..., Any]) -> Generator[bytes]:
        """The app in its thread."""
        gone: threading.Event = environ["asgi.scope"][GONE]
        environ["wsgi.input"] = io.BufferedReader(_Input(environ["wsgi.input"]))
        environ["wsgi.input_terminated"] = True  # without Content-Length Werkzeug would read nothing
        environ["wsgi.errors"] = sys.stderr
        answer: Iterable[bytes] = self.app(environ, start_response)
        try:
            for chunk in answer:
                if gone.is_set():
                    break
                yield chunk
        finally:
            if hasattr(answer, "close"):
                answer.close()


class _Threads(Executor):
    """A thread for each call. The process may end without them: what they run may never come back."""

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        future.set_running_or_notify_cancel()
        threading.Thread(target=run, name="WSGI", daemon=True).start()
        return future


class _Visitor:
    """What comes from the visitor of one request, and when it leaves."""

    def __init__(self, scope: Any, receive: Any) -> None:
        self.gone = threading.Event()
        self._receive = receive
        self._body_read = asyncio.Event()
        if not {b"content-length", b"transfer-encoding"} & {name for name, _ in scope["headers"]}:
            self._body_read.set()

    async def receive(self) -> Message:
        """A piece of the body.

        Raises:
            ConnectionResetError: the visitor left before its end.
        """
        if self._body_read.is_set():
            return {"type": "http.request", "body": b"", "more_body": False}
        message: Message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone.set()
            raise ConnectionResetError("the visitor left before the end of the request body")
        if not message.get("more_body"):
            self._body_read.set()
        return message

    async def watch(self) -> None:
        """Notice when the visitor leaves, once nobody reads the body any more."""
        await self._body_read.wait()
        while not self.gone.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone.set()


class _Input(io.RawIOBase):
    """a2wsgi's input, whose lines and limits are left to ``io.BufferedReader``."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data: bytes = self._body.read(len(view))
        view[: len(data)] = data
        return len(data)
