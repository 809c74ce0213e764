"""What tests of whole processes share: ``tunnel-asgi`` as a child, its output, and a relay in a thread."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from tests.support import KEYS
from tunnel_asgi.relay import Relay

DEADLINE = 30.0  # seconds for anything awaited: far beyond any good run
TUNNEL_ASGI = (sys.executable, "-m", "tunnel_asgi")

# A test run that is killed has no time to end its children: where Linux can do that, it does.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()

_OURS = ("SMALLWARE_", "TUNNEL_ASGI_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS")

T = TypeVar("T")


def environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment without anything that configures us, and with a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    # No .pyc: two edits of the same size within a second would look like one.
    added = {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | added | extra


class Running:
    """A child process whose output is read as it comes. It leads a process group, which is killed at the end."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        command: tuple[str, ...] = TUNNEL_ASGI,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.process = subprocess.Popen(
            [*_WITH_PARENT, *command, *arguments],
            cwd=cwd,
            env=environment(cwd, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        self._lines: list[tuple[str, str]] = []
        self._news = threading.Condition()
        self._seen = 0
        self._readers = [self._read("stdout", self.process.stdout), self._read("stderr", self.process.stderr)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()
        if kind is not None:
            print(self.output)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """Everything so far, both streams, as it came."""
        return "\n".join(line for _, line in self._lines)

    def text(self, stream: str) -> str:
        """What came on ``stdout`` or ``stderr``; complete once the process has ended."""
        return "".join(f"{line}\n" for name, line in self._lines if name == stream)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.output))

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line behind the last one expected."""

        def look() -> re.Match[str] | None:
            for n, (_, line) in enumerate(self._lines[self._seen :], self._seen):
                if match := re.search(pattern, line):
                    self._seen = n + 1
                    return match
            return None

        return self._wait(look, pattern)

    def expect_times(self, times: int, pattern: str) -> list[re.Match[str]]:
        """Wait until so many lines match, wherever they stand."""

        def look() -> list[re.Match[str]]:
            matches = [match for _, line in self._lines if (match := re.search(pattern, line))]
            return matches if len(matches) >= times else []

        return self._wait(look, pattern)

    def _wait(self, look: Callable[[], T | None], pattern: str) -> T:
        deadline = time.monotonic() + DEADLINE
        with self._news:
            while not (found := look()):
                left = deadline - time.monotonic()
                assert left > 0, f"{pattern!r} did not come:\n{self.output}"
                assert any(reader.is_alive() for reader in self._readers), f"{pattern!r} never came:\n{self.output}"
                self._news.wait(min(left, 1))
        return found

    def url(self) -> str:
        """Wait until visitors can be served."""
        return self.expect(r"Serving at (\S+)")[1]

    def worker_pids(self, number: int) -> list[int]:
        """The first so many workers, once all of them have started the app."""
        self.expect_times(number, "Application startup complete")
        return [int(match[1]) for match in self.expect_times(number, r"Started server process \[(\d+)\]")]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, when it has ended and all output is there."""
        code = self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join(DEADLINE)
            assert not reader.is_alive(), f"a process is left that holds the output:\n{self.output}"
        return code

    def stop(self) -> int:
        self.send(signal.SIGINT)
        return self.wait()

    def _read(self, name: str, stream: IO[str] | None) -> threading.Thread:
        assert stream is not None

        def read() -> None:
            with stream:
                for line in stream:
                    with self._news:
                        self._lines.append((name, line.rstrip("\n")))
                        self._news.notify_all()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


class RelayThread:
    """A relay that runs while the test waits for processes."""

    def __init__(self, relay: Relay, loop: asyncio.AbstractEventLoop) -> None:
        self.relay = relay
        self._loop = loop

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a plain function where the relay lives."""

        async def call() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(DEADLINE)

    def wait_until(self, predicate: Callable[[Relay], bool]) -> None:
        async def wait() -> None:
            async with asyncio.timeout(DEADLINE):
                await self.relay.wait_until(predicate)

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result()


@contextmanager
def relay_thread(**options: Any) -> Iterator[RelayThread]:
    """A relay with the keys of ``tests.support``."""
    started = threading.Event()
    running: list[RelayThread] = []
    stop = asyncio.Event()

    async def main() -> None:
        async with Relay(**({"keys": KEYS} | options)) as relay:
            running.append(RelayThread(relay, asyncio.get_running_loop()))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(DEADLINE)
    try:
        yield running[0]
    finally:
        running[0].call(stop.set)
        thread.join()


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pid: int) -> None:
    """Wait until a process that is no child of ours has ended."""
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([descriptor], [], [], DEADLINE)
    finally:
        os.close(descriptor)
    assert ready, f"process {pid} is still there"
