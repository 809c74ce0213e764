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
READ_AHEAD = 4  # pieces of a request body that the app has not asked for, each of 64 KiB or so
WRITE_AHEAD = 10  # pieces of an answer that are not sent yet

VISITOR = "tunnel_asgi.visitor"
"""Key in a request's scope."""

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
        # Its queue has no bound: a thread that waits for room there waits for ever when its request is cancelled.
        self._middleware = cast(Any, WSGIMiddleware)(self._run, send_queue_size=0)
        self._middleware.executor = _Threads()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._middleware(scope, receive, send)
            return
        visitor = _Visitor(receive, send)
        watch = asyncio.create_task(visitor.watch())
        try:
            async with self._threads:
                await self._middleware({**scope, VISITOR: visitor}, visitor.receive, visitor.send)
        finally:
            watch.cancel()
            visitor.leave()
            await asyncio.wait([watch])

    def _run(self, environ: Environ, start_response: Callable[..., Any]) -> Generator[bytes]:
        """The app in its thread."""
        visitor: _Visitor = environ["asgi.scope"][VISITOR]
        environ["wsgi.input"] = io.BufferedReader(_Input(environ["wsgi.input"]))
        environ["wsgi.input_terminated"] = True  # without Content-Length Werkzeug would read nothing
        environ["wsgi.errors"] = sys.stderr
        answer: Iterable[bytes] = self.app(environ, visitor.bounded(start_response))
        try:
            for chunk in answer:
                if not visitor.wait_for_room():
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
    """Both directions of one request. What comes is read a little ahead, or nobody would notice a visitor who leaves.

    But not before the app reads or answers: until then it may still refuse a body that waits for ``100 Continue``.
    """

    def __init__(self, receive: Any, send: Any) -> None:
        self.gone = threading.Event()
        self._receive = receive
        self._send = send
        self._begun = asyncio.Event()
        self._ahead: asyncio.Queue[Message] = asyncio.Queue(READ_AHEAD)
        self._room = threading.Semaphore(WRITE_AHEAD)

    async def receive(self) -> Message:
        """A piece of the body.

        Raises:
            ConnectionResetError: the visitor left before its end.
        """
        self._begun.set()
        message = await self._ahead.get()
        if message["type"] == "http.disconnect":
            self.leave()
            raise ConnectionResetError("the visitor left before the end of the request body")
        return message

    async def send(self, message: Message) -> None:
        try:
            await self._send(message)
        except BaseException:
            self.leave()  # or the app's thread would wait for room for ever
            raise
        self._room.release()
        self._begun.set()

    def wait_for_room(self) -> bool:
        """In the app's thread: wait until another piece of the answer may be sent. False if none may any more."""
        if not self.gone.is_set():
            self._room.acquire()
        return not self.gone.is_set()

    def bounded(self, start_response: Callable[..., Any]) -> Callable[..., Any]:
        """The same, whose ``write`` waits for room and raises ``ConnectionResetError`` if the visitor left."""

        def start(*args: Any) -> Callable[[bytes], None]:
            write = start_response(*args)

            def write_bounded(data: bytes) -> None:
                if not self.wait_for_room():
                    raise ConnectionResetError("the visitor left before the end of the answer")
                write(data)

            return write_bounded

        return start

    async def watch(self) -> None:
        """Read ahead until the visitor leaves."""
        await self._begun.wait()
        while not self.gone.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
            await self._ahead.put(message)

    def leave(self) -> None:
        """Nothing more comes and goes, for whoever still waits."""
        self.gone.set()
        self._room.release()
        while not self._ahead.empty():
            self._ahead.get_nowait()
        self._ahead.put_nowait({"type": "http.disconnect"})


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
