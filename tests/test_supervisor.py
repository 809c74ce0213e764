"""Several processes for one app: workers, their replacement, and a reload no visitor notices."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.supervisors.statreload import StatReload
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.processes import DEADLINE, TUNNEL_ASGI, RelayThread, Running, is_alive, relay_thread, wait_gone
from tests.support import DOMAIN, KEY_ID, SECRET
from tunnel_asgi import supervisor
from tunnel_asgi.auth import AccessKey
from tunnel_asgi.errors import ConfigError
from tunnel_asgi.local import LocalRelay
from tunnel_asgi.server import Config
from tunnel_asgi.supervisor import Supervisor
from tunnel_asgi.worker import READY

APP = """
import asyncio
import contextlib
import os
import signal
import sys
import time

VERSION = "one"


def say(text):
    sys.stderr.write(text + "\\n")  # at once, so that two processes do not mix their lines


async def lifespan(receive, send):
    await receive()
    say(f"lifespan of {VERSION} began")
    await send({"type": "lifespan.startup.complete"})
    await receive()
    say(f"lifespan of {VERSION} ended")
    await send({"type": "lifespan.shutdown.complete"})


async def websocket(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": f"{VERSION} {message['text']}"})


async def read(receive):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def answer(send, text):
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    if scope["type"] == "websocket":
        return await websocket(receive, send)
    path = scope["path"]
    if path == "/echo":
        say("echoing")
        return await answer(send, f"{VERSION} {(await read(receive)).decode()}")
    if path == "/crash":
        os._exit(7)
    if path == "/block":
        say("blocking")
        with open("gate") as gate:  # a FIFO: this stands until the test writes
            gate.read()
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    if path == "/stdin":
        return await answer(send, sys.stdin.readline().strip())
    await answer(send, f"{VERSION} {os.getpid()}")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(APP)
    return tmp_path


def serve(folder: Path, *arguments: str, **options: Any) -> Running:
    return Running("main:app", "--local", "--port", "0", "--no-access-log", *arguments, cwd=folder, **options)


def edit(folder: Path, version: str, also: str = "") -> None:
    """Change the app in one step, as editors do."""
    new = folder / "main.new"
    new.write_text(APP.replace('"one"', repr(version)) + also)
    new.replace(folder / "main.py")


def port_of(app: Running) -> int:
    return int(app.url().rpartition(":")[2])


def ask(port: int, path: str = "/") -> str:
    """The answer to a request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
        return ask_on(connection, path)


def ask_on(connection: http.client.HTTPConnection, path: str = "/") -> str:
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    assert answer.status == 200, (answer.status, body)
    return body


def ask_until(port: int, wanted: Callable[[str], bool]) -> str:
    """Ask again and again, each time on a new connection, until the answer is as wanted."""
    deadline = time.monotonic() + DEADLINE
    while not wanted(answer := ask(port)):
        assert time.monotonic() < deadline, f"the last answer was {answer!r}"
    return answer


class Visitors:
    """Two who ask without pause: one on new connections, one on a connection that is kept as long as it lasts."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._news = threading.Condition()
        self.failures: list[BaseException] = []
        self.answers: dict[str, list[str]] = {"new": [], "kept": []}
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in self.answers]

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, version: str) -> None:
        """Until both were answered by it, and by nothing else since."""

        def both() -> bool:
            return all(answers and answers[-1].startswith(version) for answers in self.answers.values())

        with self._news:
            assert self._news.wait_for(lambda: self.failures or both(), DEADLINE), f"no answer of {version}"
        self.check()

    def wait_for_more(self, count: int) -> None:
        """Until each was answered so many times more."""
        wanted = {name: len(answers) + count for name, answers in self.answers.items()}
        with self._news:
            assert self._news.wait_for(
                lambda: self.failures or all(len(self.answers[name]) >= wanted[name] for name in wanted), DEADLINE
            )
        self.check()

    def check(self) -> None:
        assert not self.failures

    def versions(self, name: str) -> list[str]:
        """The versions in the order they came, each change once."""
        seen: list[str] = []
        for answer in self.answers[name]:
            version = answer.split()[0]
            if not seen or seen[-1] != version:
                seen.append(version)
        return seen

    def _run(self, name: str) -> None:
        kept = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        try:
            while not self._stop.is_set():
                self._note(name, ask(self._port) if name == "new" else ask_on(kept))
        except BaseException as error:
            with self._news:
                self.failures.append(error)
                self._news.notify_all()
        finally:
            kept.close()

    def _note(self, name: str, answer: str) -> None:
        with self._news:
            self.answers[name].append(answer)
            self._news.notify_all()


def workers_of(port: int, number: int) -> list[int]:
    """The processes that serve now, once there are so many."""
    found: dict[int, None] = {}
    deadline = time.monotonic() + DEADLINE
    with contextlib.ExitStack() as stack:
        while len(found) < number:  # connections that stay open take WebSockets of one after the other
            assert time.monotonic() < deadline
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
            stack.callback(connection.close)
            found[int(ask_on(connection).split()[1])] = None
    return list(found)


# Workers


def test_two_workers_serve_from_two_processes(folder: Path) -> None:
    with serve(folder, "--workers", "2") as app:
        port = port_of(app)
        workers = workers_of(port, 2)
        assert sorted(workers) == sorted(app.worker_pids(2))
        assert app.pid not in workers
        assert app.stop() == 0
        assert not any(map(is_alive, workers))
        assert app.count("lifespan of one ended") == 2
        assert app.count("Serving at") == 1


def test_the_number_of_workers_may_come_from_web_concurrency(folder: Path) -> None:
    with serve(folder, env={"WEB_CONCURRENCY": "2"}) as app:
        app.url()
        assert len(set(app.worker_pids(2))) == 2
        assert app.stop() == 0


def test_a_worker_that_is_killed_is_replaced(folder: Path) -> None:
    with serve(folder, "--workers", "2") as app:
        workers = workers_of(port_of(app), 2)
        os.kill(workers[0], signal.SIGKILL)
        app.expect(rf"WARNING: .*Worker \[{workers[0]}\] ended \(exit code -9\)")
        assert len(set(app.worker_pids(3))) == 3
        assert app.stop() == 0
        assert app.count("lifespan of one ended") == 2


def test_when_every_worker_crashes_visitors_wait_for_the_next_ones(folder: Path) -> None:
    with serve(folder, "--workers", "2") as app:
        port = port_of(app)
        for pid in workers_of(port, 2):
            os.kill(pid, signal.SIGKILL)
        app.expect_times(2, r"Worker .* \(exit code -9\)")
        assert ask(port).startswith("one ")
        assert app.stop() == 0


@pytest.mark.parametrize("options", [["--workers", "2"], ["--reload"]])
def test_a_worker_that_has_served_its_share_is_replaced_without_a_gap(options: list[str], folder: Path) -> None:
    with serve(folder, "--limit-max-requests", "50", *options) as app:
        with Visitors(port_of(app)) as visitors:
            app.expect_times(4, "has served its share of requests")
            app.expect_times(4, "Finished server process")
        visitors.check()
        assert app.stop() == 0
        assert "ended (exit code" not in app.output


def test_a_tunnel_refused_later_ends_everything_with_its_reason(folder: Path, relay: RelayThread) -> None:
    with Running(*tunnel_options(relay), "--workers", "2", cwd=folder) as app:
        app.url()
        app.worker_pids(2)
        relay.call(relay.relay.refuse, 402)
        for tunnel in list(relay.relay.tunnels):
            relay.call(tunnel.cut)
        app.expect("Error: no credit left")
        assert app.wait() == 3
        assert app.count("Error: ") == 1
        assert app.count("lifespan of one ended") >= 2
        assert "Traceback" not in app.output


@pytest.mark.parametrize("app_name", ["main:nothing", "nowhere:app"])
def test_a_worker_that_cannot_start_ends_everything_with_one_line(app_name: str, folder: Path) -> None:
    with Running(app_name, "--local", "--port", "0", "--workers", "2", cwd=folder) as app:
        assert app.wait() == 3
        lines = [line for line in app.text("stderr").splitlines() if not line.startswith("INFO")]
        assert len(lines) == 1
        assert lines[0].startswith("Error: cannot load the app: ")


def test_a_replacement_that_cannot_start_leaves_the_others_serving_and_is_tried_again(folder: Path) -> None:
    with serve(folder, "--workers", "2") as app:
        port = port_of(app)
        workers = workers_of(port, 2)
        edit(folder, "two", also="\n1 / 0\n")
        os.kill(workers[0], signal.SIGKILL)
        app.expect(r"did not start \(exit code 1\); the running code goes on serving")
        assert ask(port) == f"one {workers[1]}"
        edit(folder, "three")
        app.expect("lifespan of three began")
        assert app.stop() == 0


def test_sighup_rolls_the_workers_without_a_gap(folder: Path) -> None:
    with serve(folder, "--workers", "2") as app:
        port = port_of(app)
        before = workers_of(port, 2)
        edit(folder, "two")
        with Visitors(port) as visitors:
            visitors.wait_for("one")
            app.send(signal.SIGHUP)
            visitors.wait_for("two")
            for pid in before:
                wait_gone(pid)
            visitors.wait_for_more(20)
        visitors.check()
        for name in visitors.answers:
            assert visitors.versions(name)[0] == "one"
            assert visitors.versions(name)[-1] == "two"
        assert app.stop() == 0
        assert app.count("lifespan of one ended") == 2
        assert app.count("lifespan of two ended") == 2


def test_requests_and_websockets_that_run_finish_on_the_old_code(folder: Path) -> None:
    with serve(folder, "--workers", "2") as app:
        port = port_of(app)
        before = workers_of(port, 2)
        edit(folder, "two")
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
        with (
            connect(f"ws://127.0.0.1:{port}/", proxy=None) as ws,
            socket.create_connection(("127.0.0.1", port), DEADLINE) as visitor,
        ):
            visitor.sendall(head + b"sl")
            app.expect("echoing")
            app.send(signal.SIGHUP)
            ask_until(port, lambda answer: answer.startswith("two"))
            app.expect_times(2, "Handing over")
            ws.send("hello")
            assert ws.recv(DEADLINE) == "one hello"
            visitor.sendall(b"ow")
            answer = b""
            while not answer.endswith(b"one slow"):
                answer += visitor.recv(4096)
            if b"connection: close" not in answer:  # a connection that is kept is not cut, but asked to end
                visitor.sendall(head + b"next")
            while more := visitor.recv(4096):
                answer += more
        assert answer.endswith((b"one slow", b"one next"))
        assert answer.count(b"connection: close") == 1
        for pid in before:
            wait_gone(pid)
        assert app.stop() == 0


def test_what_outlasts_the_grace_is_ended_websockets_with_1012_and_without_noise(folder: Path) -> None:
    with serve(folder, "--workers", "2", "--timeout-graceful-shutdown", "1") as app:
        port = port_of(app)
        before = workers_of(port, 2)
        stream = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        with connect(f"ws://127.0.0.1:{port}/", proxy=None) as ws, contextlib.closing(stream):
            stream.request("GET", "/stream")
            answer = stream.getresponse()
            assert answer.read(5) == b"first"
            app.send(signal.SIGHUP)
            with pytest.raises(ConnectionClosed):
                ws.recv(DEADLINE)
            assert ws.close_code == 1012
            with pytest.raises(http.client.IncompleteRead):
                answer.read()
        for pid in before:
            wait_gone(pid)
        assert app.stop() == 0
        for noise in ("Traceback", "Cancel", "killing"):
            assert noise not in app.output


def test_sigterm_while_a_worker_hands_over_is_an_ordinary_end(folder: Path) -> None:
    with serve(folder, "--workers", "2", "--timeout-graceful-shutdown", "600") as app:
        port = port_of(app)
        workers_of(port, 2)
        with connect(f"ws://127.0.0.1:{port}/", proxy=None) as ws:
            app.send(signal.SIGHUP)
            app.worker_pids(4)
            app.expect_times(1, "lifespan of one ended")  # of the one without a visitor
            app.send(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                ws.recv(DEADLINE)
            assert ws.close_code == 1012
        assert app.wait() == 0
        assert app.count("lifespan of one ended") == 4


# A worker that hangs


@pytest.fixture
def gate(folder: Path) -> Iterator[Callable[[], None]]:
    """What opens the gate for whoever stands before it."""
    os.mkfifo(folder / "gate")

    def open_gate() -> None:
        os.close(os.open(folder / "gate", os.O_WRONLY | os.O_NONBLOCK))

    yield open_gate
    with contextlib.suppress(OSError):  # nobody stands there
        open_gate()


def test_a_worker_whose_loop_stands_still_is_replaced_and_may_finish(folder: Path, gate: Callable[[], None]) -> None:
    with serve(folder, "--workers", "2", "--timeout-worker-healthcheck", "1") as app:
        port = port_of(app)
        workers = workers_of(port, 2)
        blocked = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        with contextlib.closing(blocked):
            blocked.request("GET", "/block")
            app.expect("blocking")
            hung = int(app.expect(r"ERROR: .*Worker \[(\d+)\] hangs, starting another one")[1])
            assert hung in workers
            app.worker_pids(3)
            gate()
            answer = blocked.getresponse()
            assert answer.read() == f"one {hung}".encode()
        wait_gone(hung)
        assert app.stop() == 0
        assert app.count("hangs") == 1
        assert app.count("killing") == 0


def test_a_worker_that_hangs_for_good_is_killed(folder: Path) -> None:
    options = ["--workers", "2", "--timeout-worker-healthcheck", "1", "--timeout-graceful-shutdown", "0"]
    with serve(folder, *options) as app:
        workers = workers_of(port_of(app), 2)
        os.kill(workers[0], signal.SIGSTOP)
        app.expect(rf"Worker \[{workers[0]}\] hangs")
        app.expect(rf"Worker \[{workers[0]}\] did not leave in time, killing it")
        wait_gone(workers[0])
        assert app.stop() == 0
        assert app.count("killing") == 1


def test_a_second_signal_does_not_wait_for_a_worker_that_hangs(folder: Path) -> None:
    with serve(folder, "--workers", "2", "--timeout-graceful-shutdown", "600") as app:
        workers = workers_of(port_of(app), 2)
        os.kill(workers[0], signal.SIGSTOP)
        app.send(signal.SIGINT)
        wait_gone(workers[1])  # the first signal has been heeded
        app.send(signal.SIGINT)
        assert app.wait() == 0
        assert app.count(rf"Worker \[{workers[0]}\] did not leave in time, killing it") == 1


# The end


def test_ctrl_c_reaches_the_whole_group_and_drains_once(folder: Path) -> None:
    with serve(folder, "--workers", "2", "--timeout-graceful-shutdown", "600") as app:
        port = port_of(app)
        workers_of(port, 2)
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as visitor:
            visitor.sendall(head + b"sl")
            app.expect("echoing")
            os.killpg(app.pid, signal.SIGINT)
            app.expect_times(2, "Shutting down")
            visitor.sendall(b"ow")
            with visitor.makefile("rb") as reader:
                assert reader.read().endswith(b"one slow")
        assert app.wait() == 0
        assert app.count("lifespan of one ended") == 2
        assert "Traceback" not in app.output


@pytest.mark.parametrize("options", [["--workers", "2"], ["--reload"]])
def test_workers_end_when_their_parent_is_killed(options: list[str], folder: Path) -> None:
    with serve(folder, *options) as app:
        app.url()
        workers = app.worker_pids(2 if "--workers" in options else 1)
        app.send(signal.SIGKILL)
        assert app.wait() == -signal.SIGKILL
        for pid in workers:
            wait_gone(pid)
        assert app.count("lifespan of one ended") == len(workers)


def test_a_worker_that_still_starts_ends_with_its_parent(folder: Path, gate: Callable[[], None]) -> None:
    edit(folder, "two", also="\nprint(f'importing in {os.getpid()}', file=sys.stderr)\nopen('gate').read()\n")
    with serve(folder, "--reload") as app:
        worker = int(app.expect(r"importing in (\d+)")[1])
        app.send(signal.SIGTERM)
        assert app.wait() == 0
        assert not is_alive(worker)


def test_sighup_of_a_closed_terminal_is_the_end(folder: Path) -> None:
    parent, child = os.openpty()
    command = (sys.executable, "-c", ON_TERMINAL, os.ttyname(child), *TUNNEL_ASGI)
    with serve(folder, "--reload", command=command) as app:
        with os.fdopen(parent, "rb", buffering=0) as terminal:
            shown = b""
            while b"Serving at" not in shown:
                shown += terminal.read(4096)
            worker = int(re.findall(rb"Started server process \[(\d+)\]", shown)[0])
            os.close(child)
        app.wait()
        wait_gone(worker)


def test_a_signal_that_another_thread_gets_is_heeded(folder: Path) -> None:
    command = (sys.executable, "-c", DEAF_MAIN_THREAD)
    with serve(folder, "--reload", command=command) as app:
        app.url()
        app.send(signal.SIGHUP)
        app.expect("Received SIGHUP")


DEAF_MAIN_THREAD = """
import signal, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
from tunnel_asgi.cli import tunnel_asgi
tunnel_asgi()
"""

ON_TERMINAL = """
import os, sys
terminal = os.open(sys.argv[1], os.O_RDWR)  # a session leader's first one: it becomes the controlling terminal
for descriptor in range(3):
    os.dup2(terminal, descriptor)
os.execv(sys.argv[2], sys.argv[2:])
"""


# Reload

WITHOUT_WATCHFILES = (
    sys.executable,
    "-c",
    "import sys; sys.modules['watchfiles'] = None; from tunnel_asgi.cli import tunnel_asgi; tunnel_asgi()",
)
WATCHERS = pytest.mark.parametrize("command", [TUNNEL_ASGI, WITHOUT_WATCHFILES], ids=["watchfiles", "polling"])


@WATCHERS
def test_no_visitor_notices_an_edit_or_a_mistake_in_between(command: tuple[str, ...], folder: Path) -> None:
    pytest.importorskip("watchfiles")
    with serve(folder, "--reload", command=command) as app:
        with Visitors(port_of(app)) as visitors:
            visitors.wait_for("one")
            edit(folder, "two")
            visitors.wait_for("two")

            edit(folder, "three", also="\nthis is no Python\n")
            app.expect("SyntaxError")
            app.expect("did not start .*; the running code goes on serving")
            visitors.wait_for_more(20)

            edit(folder, "four", also="\n1 / 0\n")
            app.expect("ZeroDivisionError")
            edit(folder, "five", also="\nimport nowhere\n")
            app.expect("No module named 'nowhere'")
            visitors.wait_for_more(20)

            edit(folder, "six")
            visitors.wait_for("six")
        visitors.check()
        for name in visitors.answers:
            assert visitors.versions(name)[-1] == "six"
            assert set(visitors.versions(name)) == {"one", "two", "six"}
        assert app.stop() == 0
        assert app.count("SyntaxError") == 1
        assert app.count("Traceback") == 2  # a syntax error has no frames of the app
        assert app.count("Serving at") == 1


@WATCHERS
def test_a_lifespan_that_fails_in_the_new_code_fails_no_visitor(command: tuple[str, ...], folder: Path) -> None:
    failing = """
async def lifespan(receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})
"""
    with serve(folder, "--reload", command=command) as app:
        port = port_of(app)
        edit(folder, "two", also=failing)
        app.expect("no database")
        app.expect("did not start: the application failed to start.*; the running code goes on serving")
        assert ask(port).startswith("one")
        edit(folder, "three")
        ask_until(port, lambda answer: answer.startswith("three"))
        assert app.stop() == 0
        assert app.count("no database") == 1


def test_a_start_that_fails_waits_for_a_change(folder: Path) -> None:
    edit(folder, "one", also="\n1 / 0\n")
    with serve(folder, "--reload") as app:
        app.expect("ZeroDivisionError")
        app.expect(r"did not start \(exit code 1\); waiting for a change")
        edit(folder, "two")
        assert ask(port_of(app)).startswith("two")
        assert app.stop() == 0


def test_an_app_that_cannot_be_found_is_waited_for(folder: Path) -> None:
    (folder / "main.py").rename(folder / "main.txt")
    with serve(folder, "--reload") as app:
        app.expect('did not start: cannot load the app: Could not import module "main".*; waiting for a change')
        (folder / "main.txt").rename(folder / "main.py")
        assert ask(port_of(app)).startswith("one")
        assert app.stop() == 0
        assert "Traceback" not in app.output


def test_a_refused_key_is_not_waited_for(folder: Path, relay: RelayThread) -> None:
    relay.call(relay.relay.refuse, 401)
    with Running(*tunnel_options(relay), "--reload", cwd=folder) as app:
        app.expect(f"Error: the tunnel server does not accept key '{KEY_ID}'")
        assert app.wait() == 3
        assert SECRET not in app.output


def test_a_change_while_a_worker_still_starts_replaces_that_one(folder: Path, gate: Callable[[], None]) -> None:
    slow = "\nprint('importing two', file=sys.stderr)\nopen('gate').read()\n"
    with serve(folder, "--reload") as app:
        with Visitors(port_of(app)) as visitors:
            edit(folder, "two", also=slow)
            app.expect("importing two")
            visitors.wait_for_more(20)
            edit(folder, "three")
            visitors.wait_for("three")
        visitors.check()
        for name in visitors.answers:
            assert set(visitors.versions(name)) == {"one", "three"}
        assert app.stop() == 0


STUCK = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(f"importing {os.getpid()}")
open("gate").read()
"""


def test_however_fast_changes_come_one_generation_starts_and_one_at_most_is_told_to_go(
    folder: Path, gate: Callable[[], None]
) -> None:
    with serve(folder, "--reload") as app:
        port = port_of(app)
        starting: list[int] = []
        for n in range(4):
            edit(folder, f"v{n}", also=STUCK)
            starting.append(int(app.expect(r"importing (\d+)")[1]))
            for earlier in starting[:-2]:
                wait_gone(earlier)
        assert ask(port).startswith("one")
        edit(folder, "last")
        ask_until(port, lambda answer: answer.startswith("last"))
        assert app.stop() == 0, "it waited for a worker that serves nobody"
        assert not any(map(is_alive, starting))
        assert "did not leave in time" not in app.output


def test_a_worker_that_was_told_to_go_just_as_it_was_ready_is_not_killed(tmp_path: Path) -> None:
    class Told(list[str]):
        process = SimpleNamespace(pid=1, kill=lambda: pytest.fail("a visitor may be there"))

        def retire(self, grace: float) -> None:
            self.append("retire")

        def answered(self) -> None: ...

    parent: Any = Supervisor(Config("main:app", local=True, log_config=None))
    parent._spawn = lambda number: None
    parent._starting = [worker := Told()]
    with parent._bell:
        parent._replace_all()
        parent._heard(worker, READY)
        parent._replace_all()
    assert worker == ["retire"]
    assert parent._leaving == [worker]


def test_a_crashed_worker_is_started_again_under_reload(folder: Path) -> None:
    with serve(folder, "--reload") as app:
        port = port_of(app)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            ask(port, "/crash")
        app.expect(r"ended \(exit code 7\)")
        assert ask(port).startswith("one")
        assert app.stop() == 0


def test_many_edits_in_a_row_end_with_the_last_one_and_leave_no_process(folder: Path) -> None:
    with serve(folder, "--reload") as app:
        with Visitors(port_of(app)) as visitors:
            for n in range(8):
                edit(folder, f"v{n}")
                visitors.wait_for_more(5)
            visitors.wait_for("v7")
        visitors.check()
        assert app.stop() == 0
        for match in app.expect_times(1, r"Started server process \[(\d+)\]"):
            assert not is_alive(int(match[1]))


def test_stdin_is_the_terminals_in_a_worker_too(folder: Path) -> None:
    """So that a debugger works."""
    read, write = os.pipe()
    os.write(write, b"from the keyboard\n")
    os.close(write)
    redirect = "import os, sys; os.dup2(int(sys.argv[1]), 0); os.execv(sys.argv[2], sys.argv[2:])"
    command = (sys.executable, "-c", redirect, str(read), *TUNNEL_ASGI)
    try:
        with serve(folder, "--reload", command=command, pass_fds=[read]) as app:
            assert ask(port_of(app), "/stdin") == "from the keyboard"
            assert app.stop() == 0
    finally:
        os.close(read)


def watcher(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.chdir(folder)
    config = Config("main:app", local=True, reload=True, log_config=None, **options)
    return supervisor._ChangeWatcher(config, lambda paths: None)._reloader


def test_the_options_of_reload_reach_the_watcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("watchfiles")
    for name in ("a", "b"):
        (folder / name).mkdir()
    reloader = watcher(
        folder,
        monkeypatch,
        reload_dirs=["a"],
        reload_includes=["*.css"],
        reload_excludes=["b", "generated.py"],
        reload_delay=7.0,
    )
    assert reloader.config.reload_delay == 7
    assert reloader.reload_dirs == [folder / "a"]
    judged = {name: reloader.watch_filter(folder / "a" / name) for name in ("x.py", "x.css", "x.txt", "generated.py")}
    assert judged == {"x.py": True, "x.css": True, "x.txt": False, "generated.py": False}


def test_only_what_the_options_name_is_watched(folder: Path) -> None:
    pytest.importorskip("watchfiles")
    (folder / "styles").mkdir()
    options = ["--reload-dir", "styles", "--reload-include", "*.css", "--reload-delay", "0.05"]
    with serve(folder, "--reload", *options) as app:
        port = port_of(app)
        edit(folder, "two")  # not in styles
        (folder / "styles" / "x.txt").write_text("")
        (folder / "styles" / "x.css").write_text("")
        app.expect(r"Detected changes in styles/x\.css\. Reloading\.\.\.")
        ask_until(port, lambda answer: answer.startswith("two"))
        assert app.stop() == 0
        assert app.count("Detected changes") == 1


def test_polling_reports_a_change_once_and_misses_none_in_between(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "ChangeReload", StatReload)
    monkeypatch.chdir(folder)
    (folder / "other.py").touch()
    (folder / "gone.py").touch()
    seen: list[list[str]] = []
    changed = threading.Event()

    def on_change(paths: list[str]) -> None:
        seen.append(paths)
        changed.set()

    config = Config("main:app", local=True, reload=True, reload_delay=0.001, log_config=None)
    watcher = supervisor._ChangeWatcher(config, on_change)
    watcher._take_note()
    watcher.start()
    try:
        for n, name in enumerate(["main.py", "other.py"], 1):
            later = time.time() + 10 * n
            os.utime(folder / name, (later, later))
            assert changed.wait(DEADLINE)
            changed.clear()
        (folder / "gone.py").unlink()
    finally:
        watcher.stop()
    assert seen == [["main.py"], ["other.py"]]


def test_a_watcher_that_fails_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        should_exit = threading.Event()

        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def __iter__(self) -> Iterator[None]:
            raise OSError("too many files are watched")

    monkeypatch.setattr(supervisor, "ChangeReload", Failing)
    monkeypatch.chdir(folder)
    watcher = supervisor._ChangeWatcher(Config("main:app", local=True, reload=True, log_config=None), print)
    watcher.start()
    watcher.stop()
    assert "Cannot watch for changes any more: too many files are watched" in caplog.text


# What a worker gets


def test_a_config_pickles_with_all_that_a_worker_needs() -> None:
    config = Config(
        "main:app",
        domain=str(DOMAIN),
        key=f"{KEY_ID}.{SECRET}",
        server_url="ws://127.0.0.1:1/tunnels",
        headers=[("X-A", "1")],
        workers=2,
        env_file=None,
        root_path="/r",
        timeout_request_body=7,
    )
    copy = pickle.loads(pickle.dumps(config))
    assert copy.tunnel == config.tunnel
    assert copy.tunnel.access_key == AccessKey(KEY_ID, SECRET)
    assert copy.public_url == config.public_url
    assert copy.headers == [("X-A", "1")]
    assert copy.log_config == config.log_config
    assert copy.timeouts == config.timeouts
    assert copy.root_path == "/r"


def test_a_config_of_an_embedded_relay_pickles_while_it_runs() -> None:
    config = Config("main:app", local=True, port=0, log_config=None)
    with config.embedded_relay():
        copy = pickle.loads(pickle.dumps(config))
        assert copy.tunnel == config.tunnel
        assert str(copy.public_url) == str(config.public_url)
        with copy.embedded_relay():  # it is there: no second one
            assert copy.tunnel == config.tunnel


@pytest.mark.parametrize("options", [{"reload": True}, {"workers": 2}])
def test_an_app_object_cannot_go_to_another_process(options: dict[str, Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(ConfigError, match="import string such as 'main:app'"):
        supervisor.run(app, local=True, port=0, log_config=None, **options)


def test_a_relay_that_cannot_open_its_port_starts_no_process(folder: Path) -> None:
    with LocalRelay(port=0) as taken:
        options = ["--local", "--port", str(taken.relay.port), "--workers", "2"]
        with Running("main:app", *options, cwd=folder) as app:
            assert app.wait() == 3
            assert app.text("stderr").startswith("Error: port ")
            assert app.text("stderr").count("\n") == 1


@pytest.fixture
def relay() -> Iterator[RelayThread]:
    with relay_thread(domain=DOMAIN) as running:
        yield running


def tunnel_options(relay: RelayThread) -> list[str]:
    return ["main:app", "--domain", str(DOMAIN), "--server", relay.relay.server_url, "--key", f"{KEY_ID}.{SECRET}"]
