"""Several processes for one app: ``--workers``, ``--reload``, and ``run()`` that chooses.

Nothing binds a port, so a new worker can wait for visitors *before* the old one goes. That is the one idea here:
a replacement is started, and only when it says it is ready is its predecessor told to retire. A replacement that
does not start changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from uvicorn.supervisors import ChangeReload
from uvicorn.supervisors.statreload import StatReload

from tunnel_asgi.errors import ConfigError, TunnelError
from tunnel_asgi.server import Config, Server
from tunnel_asgi.worker import KILL_MARGIN, READY, SIGHUP, WORN_OUT, Failed, Worker

__all__ = ["Supervisor", "WorkersFailed", "run"]

logger: logging.Logger = logging.getLogger("uvicorn.error")

RESPAWN_DELAY = 1.0  # seconds between two starts of one worker, doubled by each that fails: a loop must not burn a core
MAX_RESPAWN_DELAY = 60.0  # seconds
FORCED_GRACE = 3.0  # seconds a worker has after a second signal: it waits for nobody then, unless its loop stands still


class WorkersFailed(TunnelError):
    """No worker serves, and none could start."""

    def __init__(self, reason: str = "no worker could start (the reason stands above)") -> None:
        super().__init__(reason)


def run(app: Any, *, app_dir: str | None = None, **options: Any) -> None:
    """Serve ``app`` until a signal comes. Blocking; owns the event loop, the signals and the processes.

    ``app`` must be an import string for ``reload`` and ``workers``. ``app_dir`` is put first on ``sys.path``.
    Other options: see ``Config``.

    Raises:
        TunnelError: as ``Config`` and ``Server.serve``. Exceptions of the app's own module pass through.
    """
    if app_dir is not None:
        sys.path.insert(0, app_dir)
    config = _make_config(app, options)
    if config.use_subprocess and not isinstance(app, str):
        raise ConfigError("to use reload or workers, pass the app as an import string such as 'main:app'")
    config.get_loop_factory()  # a loop that is not installed must show before anything else
    with contextlib.suppress(KeyboardInterrupt):
        if config.use_subprocess:
            with config.embedded_relay():
                Supervisor(config).run()
        else:
            config.load_app()  # before there is a loop, for modules that start one while they are imported
            Server(config).run()


def _make_config(app: Any, options: dict[str, Any]) -> Config:
    try:
        return Config(app, **options)
    except ModuleNotFoundError as error:
        if error.name != "dotenv":
            raise
        raise ConfigError("--env-file needs python-dotenv, which is not installed") from error


class Supervisor:
    """Keeps ``config.workers`` processes serving; replaces them on a change of the code and on SIGHUP.

    A worker that dies is replaced, and so is one whose loop stands still for ``timeout_worker_healthcheck``
    seconds (never under ``reload``: there it may stand in a debugger).
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._serving: list[Worker] = []  # in the order in which they will retire
        self._starting: list[Worker] = []
        self._leaving: list[Worker] = []
        self._superseded: list[Worker] = []  # those of the leaving that were told to while they started
        self._count = 1 if config.should_reload else config.workers
        self._patience = 0.0 if config.should_reload else config.timeout_worker_healthcheck
        self._announced = False
        self._failed_starts = 0
        self._failure: WorkersFailed | None = None
        self._respawn_at = math.inf
        self._bell = _Bell()
        self._signals: deque[int] = deque()
        self._changes: deque[str] = deque()
        self._stops = 0
        self._on_terminal = _on_terminal()

    def run(self) -> None:
        """Supervise until a signal comes and the last worker is gone. To be called once.

        Raises:
            WorkersFailed: no worker could start while none served. Under ``reload`` a change of the code is
                waited for instead, if that may help.
        """
        logger.info("Started parent process [%d]", os.getpid())
        with self._bell, self._signal_handlers(), self._watcher():
            try:
                self._replace_all()
                while not self._stops and self._failure is None:
                    self._wait()
                self._stop()
            finally:
                self._kill_all()
        logger.info("Stopped parent process [%d]", os.getpid())
        if self._failure is not None and not self._stops:
            raise self._failure

    # What happened.

    def _wait(self) -> None:
        workers = [*self._serving, *self._starting, *self._leaving]
        sources: list[Any] = [worker.process.sentinel for worker in workers]
        sources += [worker.pipe for worker in workers if not worker.mute]
        wait([*sources, self._bell.socket], timeout=self._time_left())
        self._bell.silence()
        for worker in workers:
            self._look_at(worker)
        self._act_on_requests()
        self._act_on_deadlines()

    def _look_at(self, worker: Worker) -> None:
        alive = worker.process.is_alive()  # asked first: what it said before it died is still read
        for message in worker.messages():
            self._heard(worker, message)
        if not alive:
            self._died(worker)

    def _heard(self, worker: Worker, message: object) -> None:
        if isinstance(message, Failed):
            worker.failure = message
            return
        worker.answered()
        if message == READY and worker in self._starting:
            self._became_ready(worker)
        elif message == READY and worker in self._superseded:
            self._superseded.remove(worker)  # it may have visitors by now, and finishes with them
        elif message == WORN_OUT and worker in self._serving:
            logger.info("Worker [%s] has served its share of requests, starting another one", worker.process.pid)
            worker.worn_out = True
            self._let_go_next(worker)

    def _became_ready(self, worker: Worker) -> None:
        self._starting.remove(worker)
        self._serving.append(worker)
        self._failed_starts = 0
        if not self._announced:
            self._announced = True
            logger.info("Serving at %s (Press CTRL+C to quit)", self._config.public_url)
        while len(self._serving) > self._count:
            self._retire(self._serving.pop(0))

    def _died(self, worker: Worker) -> None:
        worker.close()
        if worker in self._leaving:
            self._leaving.remove(worker)
            self._superseded = [one for one in self._superseded if one is not worker]
        elif worker in self._serving:
            self._serving.remove(worker)
            logger.warning("Worker [%s] %s", worker.process.pid, worker.epitaph("ended"))
            self._plan_respawn(worker)
        else:
            self._starting.remove(worker)
            self._failed_starts += 1
            self._did_not_start(worker)

    def _did_not_start(self, worker: Worker) -> None:
        reload = self._config.should_reload
        mendable = reload and (worker.failure is None or worker.failure.mendable)
        if not self._serving and not mendable and not worker.was_killed:
            self._failure = WorkersFailed(worker.failure.reason) if worker.failure else WorkersFailed()
            return
        if self._serving:
            next_step = "the running code goes on serving"
        else:
            next_step = "trying again" if worker.was_killed else "waiting for a change"
        logger.error("Worker [%s] %s; %s", worker.process.pid, worker.epitaph("did not start"), next_step)
        if not reload or worker.was_killed:
            self._plan_respawn(worker)

    # What is done about it.

    def _replace_all(self) -> None:
        self._kill_superseded()
        for worker in self._starting:
            self._retire(worker)
        self._superseded, self._starting = self._starting, []
        self._spawn(self._count)

    def _kill_superseded(self) -> None:
        """However fast the changes come, only one generation is still importing the app after it was told to go."""
        for worker in self._superseded:
            worker.process.kill()
        self._superseded = []

    def _spawn(self, number: int) -> None:
        for _ in range(number):
            self._starting.append(Worker(self._config))

    def _retire(self, worker: Worker) -> None:
        worker.retire(self._grace())
        self._leaving.append(worker)

    def _plan_respawn(self, worker: Worker) -> None:
        delay = min(RESPAWN_DELAY * 2**self._failed_starts, MAX_RESPAWN_DELAY)
        self._respawn_at = min(self._respawn_at, worker.started_at + delay)

    def _grace(self) -> float:
        return (self._config.timeout_graceful_shutdown or 0) + KILL_MARGIN

    def _act_on_requests(self) -> None:
        changes, signals = list(_drain(self._changes)), list(_drain(self._signals))
        hangups = len([number for number in signals if number == SIGHUP and self._on_terminal == _on_terminal()])
        self._stops += len(signals) - hangups
        if self._stops:
            return
        if changes:
            logger.warning("Detected changes in %s. Reloading...", ", ".join(sorted(set(changes))))
        if hangups:
            logger.info("Received SIGHUP, replacing the workers")
        if changes or hangups:
            self._respawn_at = math.inf
            self._replace_all()

    def _act_on_deadlines(self) -> None:
        now = time.monotonic()
        for worker in self._leaving:
            worker.kill_if_late(now)
        if self._patience:
            for worker in list(self._serving):
                if worker.check(now, self._patience):
                    logger.error("Worker [%s] hangs, starting another one", worker.process.pid)
                    self._let_go_next(worker)
        if now >= self._respawn_at and not self._stops:
            self._respawn_at = math.inf
            staying = [worker for worker in self._serving if not worker.hangs and not worker.worn_out]
            self._spawn(self._count - len(staying) - len(self._starting))

    def _let_go_next(self, worker: Worker) -> None:
        """But not before there is another: one that hangs may only be busy, and come back."""
        self._serving.remove(worker)
        self._serving.insert(0, worker)
        self._plan_respawn(worker)

    def _time_left(self) -> float | None:
        """Seconds to the next thing to do, None if there is none."""
        deadlines = [self._respawn_at, *(worker.kill_at for worker in self._leaving)]
        if self._patience:
            deadlines += [worker.check_at for worker in self._serving]
        first = min(deadlines)
        return None if math.isinf(first) else max(0.0, first - time.monotonic())

    def _stop(self) -> None:
        """Let every worker drain; a second signal forces them."""
        self._leaving += [*self._serving, *self._starting]
        self._serving, self._starting = [], []
        self._kill_superseded()
        for worker in self._leaving:
            worker.stop(self._grace())
        forced = False
        while self._leaving:
            self._wait()
            if self._stops > 1 and not forced:
                forced = True
                for worker in self._leaving:
                    worker.stop(FORCED_GRACE)

    def _kill_all(self) -> None:
        for worker in [*self._serving, *self._starting, *self._leaving]:
            worker.process.kill()
            worker.close()

    # Requests come from signal handlers and from the watcher's thread.

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._bell.ring()

    def _on_change(self, paths: list[str]) -> None:
        self._changes.extend(paths)
        self._bell.ring()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Generator[None]:
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM, SIGHUP) if number is not None]
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        # The system may hand a signal to any thread; only this wakes ours for its handler then.
        waker = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(waker)
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _watcher(self) -> Generator[None]:
        if not self._config.should_reload:
            yield
            return
        watcher = _ChangeWatcher(self._config, self._on_change)
        watcher.start()
        try:
            yield
        finally:
            watcher.stop()


_Item = TypeVar("_Item")


def _drain(queue: deque[_Item]) -> Iterator[_Item]:
    while queue:
        yield queue.popleft()


def _on_terminal() -> bool:
    """False also when the terminal was closed. Then SIGHUP means the end, not a request for new workers."""
    return os.isatty(2)


class _Bell:
    """Wakes ``wait()`` from a signal handler or another thread."""

    def __init__(self) -> None:
        self.socket, self._outside = socket.socketpair()
        """What to wait for."""
        self.socket.setblocking(False)
        self._outside.setblocking(False)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()
        self._outside.close()

    def fileno(self) -> int:
        """Where a byte rings it, too."""
        return self._outside.fileno()

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            self._outside.send(b"\0")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(4096)


class _ChangeWatcher(threading.Thread):
    """uvicorn's own watcher (watchfiles if installed, else polling), asked from a thread."""

    def __init__(self, config: Config, on_change: Callable[[list[str]], None]) -> None:
        super().__init__(name="tunnel-asgi watcher", daemon=True)
        self._reloader = ChangeReload(config, target=lambda _: None, sockets=[])
        self._on_change = on_change

        self._has_looked = False
        self._reloader.pause = self._pause  # type: ignore[method-assign]

    def run(self) -> None:
        try:
            for changes in self._reloader:
                if changes:
                    self._take_note()
                    self._on_change([os.path.relpath(path) for path in changes])
        except OSError as error:
            logger.error("Cannot watch for changes any more: %s", error)

    def stop(self) -> None:
        self._reloader.should_exit.set()
        self.join()

    def _pause(self) -> None:
        """uvicorn's own pause, but not before the first look: a change would be missed meanwhile."""
        if self._has_looked:
            type(self._reloader).pause(self._reloader)
        self._has_looked = True

    def _take_note(self) -> None:
        """The polling watcher reports a change again and again until it is told."""
        if not isinstance(self._reloader, StatReload):
            return
        for path in self._reloader.iter_py_files():
            with contextlib.suppress(OSError):
                self._reloader.mtimes[path] = Path(path).stat().st_mtime
