"""Several processes for one app: ``--workers``, ``--reload``, and ``run()`` that chooses.

Nothing binds a port, so a new worker can wait for visitors *before* the old one goes. That is the one idea here:
a replacement is started, and only when it says it is ready is its predecessor told to drain. A replacement that
does not start changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import ChangeReload

from tunnel_asgi.errors import ConfigError, TunnelError
from tunnel_asgi.server import Config, Server

__all__ = ["Supervisor", "WorkersFailed", "run"]

logger = logging.getLogger("uvicorn.error")

_spawn = multiprocessing.get_context("spawn")

KILL_MARGIN = 5.0  # seconds a worker may take beyond its own graceful shutdown
RESPAWN_DELAY = 1.0  # seconds before a worker that died is replaced; a crash loop must not burn a core
READY = "ready"


class WorkersFailed(TunnelError):
    """No worker could start; each has said why."""

    def __str__(self) -> str:
        return "no worker could start (their own messages stand above)"


def run(app: Any, *, app_dir: str | None = None, **options: Any) -> None:
    """Serve ``app`` until a signal comes. Blocking; owns the event loop, the signals and the processes.

    ``app`` must be an import string for ``reload`` and ``workers``. ``app_dir`` is put first on ``sys.path``.
    Other options: see ``Config``.

    Raises:
        TunnelError: as ``Config`` and ``Server.serve``. Exceptions of the app's own module pass through.
    """
    if app_dir is not None:
        sys.path.insert(0, app_dir)
    config = Config(app, **options)
    if config.use_subprocess and not isinstance(app, str):
        raise ConfigError("to use reload or workers, pass the app as an import string such as 'main:app'")
    with contextlib.suppress(KeyboardInterrupt):
        if config.use_subprocess:
            with config.embedded_relay():
                Supervisor(config).run()
        else:
            config.load_app()  # before there is a loop, for modules that start one while they are imported
            Server(config).run()


class Supervisor:
    """Keeps ``config.workers`` processes serving; replaces them on a change of the code and on SIGHUP."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._serving: list[_Worker] = []
        self._starting: list[_Worker] = []
        self._leaving: list[_Worker] = []
        self._count = 1 if config.should_reload else config.workers
        self._ever_ready = False
        self._announced = False
        self._signals: list[int] = []
        self._changes: list[str] = []
        self._respawn_at: float | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def run(self) -> None:
        """Supervise until a signal comes and the last worker is gone.

        Raises:
            WorkersFailed: without reload, if no worker ever started.
        """
        logger.info("Started parent process [%d]", os.getpid())
        with self._signal_handlers(), self._watcher():
            try:
                self._replace_all()
                while not self._over():
                    self._wait()
                self._stop()
            finally:
                self._kill_all()
        logger.info("Stopped parent process [%d]", os.getpid())
        if not self._ever_ready and not self._signals and not self._config.should_reload:
            raise WorkersFailed

    # What happened.

    def _wait(self) -> None:
        workers = [*self._serving, *self._starting, *self._leaving]
        sources: list[Any] = [worker.process.sentinel for worker in workers]
        sources += [worker.pipe for worker in self._starting]
        wait([*sources, self._wake_read], timeout=self._next_deadline())
        self._drain_wakeups()
        for worker in workers:
            self._look_at(worker)
        self._act_on_requests()
        self._act_on_deadlines()

    def _look_at(self, worker: _Worker) -> None:
        if worker in self._starting and worker.is_ready():
            self._became_ready(worker)
        if not worker.process.is_alive():
            self._died(worker)

    def _became_ready(self, worker: _Worker) -> None:
        self._starting.remove(worker)
        self._serving.append(worker)
        self._ever_ready = True
        if not self._announced:
            self._announced = True
            logger.info("Serving at %s (Press CTRL+C to quit)", self._config.public_url)
        while len(self._serving) > self._count:
            self._retire(self._serving.pop(0))

    def _died(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        if worker in self._leaving:
            self._leaving.remove(worker)
        elif worker in self._serving:
            self._serving.remove(worker)
            logger.warning("Worker [%s] ended with exit code %s", worker.process.pid, worker.process.exitcode)
            self._respawn_at = time.monotonic() + RESPAWN_DELAY
        elif worker in self._starting:
            self._starting.remove(worker)
            self._failed_to_start(worker)

    def _failed_to_start(self, worker: _Worker) -> None:
        if self._serving:
            logger.error("Worker [%s] did not start; the running code goes on serving", worker.process.pid)
        elif self._config.should_reload:
            logger.error("Worker [%s] did not start; waiting for a change", worker.process.pid)

    def _over(self) -> bool:
        if self._signals:
            return True
        nothing_left = not self._serving and not self._starting and self._respawn_at is None
        return nothing_left and not self._config.should_reload

    # What is done about it.

    def _replace_all(self) -> None:
        for worker in self._starting:
            self._retire(worker)
        self._starting = [self._spawn_worker() for _ in range(self._count)]

    def _spawn_worker(self) -> _Worker:
        worker = _Worker(self._config)
        worker.process.start()
        worker.close_childs_end()
        return worker

    def _retire(self, worker: _Worker) -> None:
        worker.leave(self._grace())
        self._leaving.append(worker)

    def _grace(self) -> float:
        return (self._config.timeout_graceful_shutdown or 0) + KILL_MARGIN

    def _act_on_requests(self) -> None:
        hangups, self._signals = (
            [number for number in self._signals if number == _SIGHUP],
            [number for number in self._signals if number != _SIGHUP],
        )
        changes, self._changes = self._changes, []
        if changes:
            logger.warning("Detected changes in %s. Reloading...", ", ".join(sorted(set(changes))))
        if hangups:
            logger.info("Received SIGHUP, replacing the workers one by one.")
        if (changes or hangups) and not self._signals:
            self._respawn_at = None
            self._replace_all()

    def _act_on_deadlines(self) -> None:
        now = time.monotonic()
        if self._respawn_at is not None and now >= self._respawn_at:
            self._respawn_at = None
            missing = self._count - len(self._serving) - len(self._starting)
            self._starting += [self._spawn_worker() for _ in range(missing)]
        for worker in self._leaving:
            worker.kill_if_late(now)

    def _next_deadline(self) -> float | None:
        deadlines = [worker.kill_at for worker in self._leaving]
        if self._respawn_at is not None:
            deadlines.append(self._respawn_at)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _stop(self) -> None:
        """Let every worker drain; a second signal forces them."""
        for worker in [*self._serving, *self._starting]:
            self._retire(worker)
        self._serving, self._starting = [], []
        forced = False
        while self._leaving:
            self._wait()
            if len(self._signals) > 1 and not forced:
                forced = True
                for worker in self._leaving:
                    worker.terminate()

    def _kill_all(self) -> None:
        for worker in [*self._serving, *self._starting, *self._leaving]:
            worker.process.kill()
            worker.process.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # Wake-ups: signals and changes come from elsewhere.

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_write, b"\0")

    def _drain_wakeups(self) -> None:
        if wait([self._wake_read], timeout=0):
            os.read(self._wake_read, 4096)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._wake()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Generator[None]:
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM, _SIGHUP) if number is not None]
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _watcher(self) -> Generator[None]:
        if not self._config.should_reload:
            yield
            return
        watcher = _ChangeWatcher(self._config, self._on_changes)
        watcher.start()
        try:
            yield
        finally:
            watcher.stop()

    def _on_changes(self, paths: list[str]) -> None:
        self._changes += paths
        self._wake()


_SIGHUP: int | None = getattr(signal, "SIGHUP", None)


class _ChangeWatcher(threading.Thread):
    """uvicorn's own watcher (watchfiles if installed, else polling), asked from a thread."""

    def __init__(self, config: Config, on_changes: Callable[[list[str]], None]) -> None:
        super().__init__(name="tunnel-asgi watcher", daemon=True)
        self._reloader = ChangeReload(config, target=lambda _: None, sockets=[])
        self._on_changes = on_changes

    def run(self) -> None:
        for changes in self._reloader:
            if changes:
                self._on_changes([os.path.relpath(path) for path in changes])
                if hasattr(self._reloader, "mtimes"):  # the polling one reports a change until it is told
                    self._reloader.mtimes = {}

    def stop(self) -> None:
        self._reloader.should_exit.set()
        self.join()


class _Worker:
    """One process, and the pipe on which it says it is ready."""

    def __init__(self, config: Config) -> None:
        self.pipe, self._childs_end = _spawn.Pipe()
        self.process = _spawn.Process(target=_work, args=(config, self._childs_end))
        self.kill_at = 0.0

    def close_childs_end(self) -> None:
        """Only the child may hold it, or its death would not show here."""
        self._childs_end.close()

    def is_ready(self) -> bool:
        try:
            return self.pipe.poll() and self.pipe.recv() == READY
        except (EOFError, OSError):
            return False

    def leave(self, grace: float) -> None:
        """Drain and exit; ``kill_if_late`` acts after ``grace`` seconds."""
        self.kill_at = time.monotonic() + grace
        self.terminate()

    def terminate(self) -> None:
        if self.process.is_alive():
            self.process.terminate()

    def kill_if_late(self, now: float) -> None:
        if now >= self.kill_at and self.process.is_alive():
            logger.warning("Worker [%s] did not leave in time, killing it", self.process.pid)
            self.process.kill()


class _WorkerServer(Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Ctrl+C reaches the whole process group; the parent alone decides, and sends SIGTERM.
        if sig != signal.SIGINT:
            super().handle_exit(sig, frame)


def _work(config: Config, pipe: Connection) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config.configure_logging()
    server = _WorkerServer(config, on_started=lambda: pipe.send(READY))
    threading.Thread(target=_leave_with_parent, args=(pipe, server), daemon=True).start()
    try:
        server.run()
    except TunnelError as error:
        logger.error("%s", error)
        sys.exit(1 if server.started else STARTUP_FAILURE)


def _leave_with_parent(pipe: Connection, server: Server) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()  # nothing is ever sent: this returns when the parent is gone
    server.should_exit = True
