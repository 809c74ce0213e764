from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import logging
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from click.testing import CliRunner, Result

from tests.processes import Running, relay_thread
from tests.support import DOMAIN, KEY_ID, SECRET, make_token, run_async
from tunnel_asgi import forward_cli
from tunnel_asgi.config import DEFAULT_SERVER_URL, TunnelConfig
from tunnel_asgi.forward_cli import smallware_tunnel
from tunnel_asgi.relay import Relay

NAME = str(DOMAIN)

# Waiting as long as a user would is not what these tests are about.
COMMAND = """
from tunnel_asgi import forward_cli, pool
pool.FIRST_DELAY = 0.1
forward_cli.GRACE = {grace}
forward_cli.smallware_tunnel(prog_name="smallware-tunnel")
"""


def run_command(*arguments: str, cwd: Path, grace: float = 10, env: dict[str, str] | None = None) -> Running:
    command = (sys.executable, "-c", COMMAND.format(grace=grace))
    return Running(*arguments, cwd=cwd, command=command, env=env)


def forwarding(relay: Relay, target: str | int, *options: str, cwd: Path, grace: float = 10) -> Running:
    key = {"SMALLWARE_KEY": f"{KEY_ID}.{SECRET}"}
    return run_command(NAME, str(target), "--server", relay.server_url, *options, cwd=cwd, grace=grace, env=key)


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[int]:
    """``python -m http.server``, but quiet; its port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def tcp_server() -> Iterator[socket.socket]:
    """A listening socket; the test accepts."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)
        yield listening


def visit(relay: Relay) -> socket.socket:
    visitor = socket.create_connection(("127.0.0.1", relay.port), timeout=20)
    return visitor


def accept(listening: socket.socket) -> socket.socket:
    connection, _ = listening.accept()
    connection.settimeout(20)
    return connection


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return cast(int, sock.getsockname()[1])


# Options: nothing is dialled


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TunnelConfig, forward_cli.Target]]:
    """What the command line asks for; nothing is done."""
    for name in ("KEY", "KEY_ID", "SERVER", "TRUST_CA", "DOMAIN"):
        monkeypatch.delenv(f"SMALLWARE_{name}", raising=False)
    asked: list[tuple[TunnelConfig, forward_cli.Target]] = []

    async def serve(config: TunnelConfig, target: forward_cli.Target) -> None:
        asked.append((config, target))

    monkeypatch.setattr(forward_cli, "_serve", serve)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(logging.getLogger("tunnel_asgi"), "level", logging.NOTSET)
    return asked


Parsed = list[tuple[TunnelConfig, forward_cli.Target]]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(smallware_tunnel, arguments)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("localhost:8080", ("localhost", 8080)),
        ("192.168.1.7:65535", ("192.168.1.7", 65535)),
        ("[::1]:1", ("::1", 1)),
    ],
)
def test_the_target_is_a_port_of_this_machine_or_host_and_port(
    text: str, target: forward_cli.Target, parsed: Parsed
) -> None:
    assert invoke("-k", "s", NAME, text).exit_code == 0
    assert [one for _, one in parsed] == [target]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--key", "s", "--key-id", "i", "--server", "wss://t.example/x", "--trust-ca", "ca.pem", "-v", "DOMAIN", "80"],
        ["DOMAIN", "80", "-k", "s", "--key-id=i", "--server=wss://t.example/x", "--trust-ca=ca.pem", "--verbose"],
        ["DOMAIN", "-k", "s", "--key-id", "i", "80", "--server", "wss://t.example/x", "--trust-ca", "ca.pem"],
    ],
)
def test_options_may_stand_before_and_after_the_arguments(arguments: list[str], parsed: Parsed) -> None:
    result = invoke(*[NAME if one == "DOMAIN" else one for one in arguments])
    assert result.exit_code == 0, result.output
    [(config, target)] = parsed
    assert config.domain == NAME
    assert (config.access_key.key_id, config.access_key.secret) == ("i", "s")
    assert config.server_url == "wss://t.example/x"
    assert config.trust_ca == "ca.pem"
    assert target == ("127.0.0.1", 80)


def test_all_values_but_the_arguments_may_come_from_the_environment(
    parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLWARE_KEY", "secret")
    monkeypatch.setenv("SMALLWARE_KEY_ID", "id")
    monkeypatch.setenv("SMALLWARE_SERVER", "wss://t.example")
    monkeypatch.setenv("SMALLWARE_TRUST_CA", "ca.pem")
    result = invoke(NAME, "80")
    assert result.output == ""
    [(config, _)] = parsed
    assert (config.access_key.key_id, config.access_key.secret) == ("id", "secret")
    assert (config.server_url, config.trust_ca) == ("wss://t.example", "ca.pem")


def test_the_published_server_is_the_default(parsed: Parsed) -> None:
    invoke("-k", "s", NAME, "80")
    [(config, _)] = parsed
    assert config.server_url == DEFAULT_SERVER_URL
    assert not config.allow_insecure_server


@pytest.mark.parametrize(
    ("spelling", "key_id", "secret"),
    [("sesame", "default", "sesame"), ("id.1.sesame", "id.1", "sesame"), ("acme.id.1.sesame", "id.1", "sesame")],
)
def test_all_three_spellings_of_a_key_are_read(spelling: str, key_id: str, secret: str, parsed: Parsed) -> None:
    invoke("--key", spelling, NAME, "80")
    [(config, _)] = parsed
    assert (config.access_key.key_id, config.access_key.secret) == (key_id, secret)


def test_the_key_may_be_in_a_file(parsed: Parsed, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" id.sesame\n")
    invoke("--key-file", str(tmp_path / "key"), NAME, "80")
    [(config, _)] = parsed
    assert (config.access_key.key_id, config.access_key.secret) == ("id", "sesame")


def test_a_key_on_the_command_line_is_warned_about_and_one_in_the_environment_is_not(
    parsed: Parsed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SMALLWARE_KEY", "secret")
    invoke(NAME, "80")
    assert caplog.messages == []
    invoke("--key", "hidden-secret", NAME, "80")
    [warning] = caplog.messages
    assert "--key shows in the process list" in warning
    assert "hidden-secret" not in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NAME, "80"], "no access key"),
        (["-k", "", NAME, "80"], "no access key"),
        (["-k", "id.", NAME, "80"], "the access key is empty"),
        (["--key-file", "missing-file", NAME, "80"], "cannot read the key file missing-file"),
        (["-k", "s", "example.com", "80"], "'example.com' is not a tunnel domain"),
        (["-k", "s", "", "80"], "no domain"),
        (["-k", "s", NAME, "http"], "'http' is not a target"),
        (["-k", "s", NAME, "0"], "'0' is not a target"),
        (["-k", "s", NAME, "65536"], "'65536' is not a target"),
        (["-k", "s", NAME, "localhost:"], "'localhost:' is not a target"),
        (["-k", "s", NAME, "http://localhost:80"], "'http://localhost:80' is not a target"),
        (["--key-file", ".", NAME, "80"], "cannot read the key file .: Is a directory"),
        (["-k", "s", NAME, ""], "'' is not a target"),
        (["-k", "s", "--server", "https://t.example", NAME, "80"], "cannot use the tunnel server URL"),
        (["-k", "s", "--server", "ws://t.example", NAME, "80"], "--allow-insecure-server"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(arguments: list[str], message: str, parsed: Parsed) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert parsed == []
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize("arguments", [[], [NAME], [NAME, "80", "90"], ["--unknown", "a", "80"]])
def test_a_command_line_that_cannot_be_read_says_how_to_get_help(arguments: list[str], parsed: Parsed) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Try 'smallware-tunnel --help' for help." in result.stderr
    assert "Error: " in result.stderr


def test_help_names_every_published_option(parsed: Parsed) -> None:
    output = invoke("--help").output
    for option in ("--key", "-k", "--key-id", "--server", "--trust-ca", "--verbose", "-v", "DOMAIN PORT"):
        assert option in output
    assert invoke("--version").output.startswith("smallware-tunnel, version ")


def test_the_console_script_is_this_command() -> None:
    [script] = entry_points(group="console_scripts", name="smallware-tunnel")
    assert script.load() is smallware_tunnel


def test_uvicorn_is_not_imported() -> None:
    program = "import sys, tunnel_asgi.forward_cli; sys.exit(bool({'uvicorn', 'starlette', 'h11'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


# Forwarding


def test_a_web_server_is_forwarded_to(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("hello")
    (tmp_path / "large.bin").write_bytes(bytes(range(256)) * 40_000)
    with (
        http_server(tmp_path) as port,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, port, cwd=tmp_path) as process,
    ):
        process.expect(f"INFO: Forwarding {NAME} to 127.0.0.1:{port} ")
        url = thread.relay.url
        with httpx.Client(trust_env=False) as client:
            assert client.get(f"{url}/page.txt").text == "hello"
            assert client.get(f"{url}/large.bin").content == bytes(range(256)) * 40_000
            assert client.get(f"{url}/missing").status_code == 404
        if curl := shutil.which("curl"):
            command = [curl, "--silent", "--noproxy", "*", f"{url}/page.txt"]
            assert subprocess.run(command, capture_output=True, check=True).stdout == b"hello"
        process.expect(r"INFO: \[[0-9a-f]{12}\] ended: \d+ bytes downloaded, \d+ uploaded")
        assert process.stop() == 0
        assert process.text("stdout") == ""
        assert thread.relay.violations == []


@pytest.mark.parametrize(
    ("name", "server", "announced"),
    [
        ("www-box-acme.e0.smallware.io", DEFAULT_SERVER_URL, "https://www-box-acme.e0.smallware.io"),
        ("ssh-box-acme.e0.smallware.io", DEFAULT_SERVER_URL, "ssh-box-acme.e0.smallware.io"),
        ("www-box-acme.e0.smallware.io", "wss://relay.example", "www-box-acme.e0.smallware.io"),
        ("www-box-acme.x.relay.example", "wss://relay.example", "www-box-acme.x.relay.example"),
    ],
)
def test_https_is_announced_only_where_visitors_are_known_to_open_it(
    name: str, server: str, announced: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunnel_asgi")
    forward_cli._announce(TunnelConfig(name, key="s", server_url=server), ("::1", 22))
    assert caplog.messages == [f"Forwarding {announced} to [::1]:22 (Press CTRL+C to quit)"]


def test_a_target_that_is_down_is_one_warning_for_each_visitor(tmp_path: Path) -> None:
    port = unused_port()
    with relay_thread(domain=DOMAIN) as thread, forwarding(thread.relay, port, cwd=tmp_path) as process:
        process.expect("Forwarding")
        for _ in range(3):
            with visit(thread.relay) as visitor:
                visitor.sendall(b"hello")
                assert visitor.recv(100) == b""
        assert process.stop() == 0
        warnings = re.findall(r"^WARNING: .*$", process.output, re.MULTILINE)
        assert len(warnings) == 3
        for warning in warnings:
            assert re.fullmatch(
                rf"WARNING: \[[0-9a-f]{{12}}\] cannot forward to 127\.0\.0\.1:{port}: Connection refused", warning
            )
        assert "Traceback" not in process.output
        assert thread.relay.violations == []


def test_a_visitor_who_fails_is_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    with (
        tcp_server() as local,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, local.getsockname()[1], cwd=tmp_path) as process,
    ):
        process.expect("Forwarding")
        with visit(thread.relay) as other:
            other.sendall(b"x")
            with accept(local) as answering:
                assert answering.recv(1) == b"x"
                with visit(thread.relay) as visitor, accept(local) as resetting:
                    visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    visitor.close()
                    with pytest.raises(ConnectionResetError):
                        resetting.recv(1)
                process.expect(r"INFO: \[[0-9a-f]{12}\] the visitor's connection failed: ")
                answering.sendall(b"z")
                assert other.recv(1) == b"z"
        assert process.stop() == 0


def test_verbose_names_the_connection_on_each_line_about_it_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("hello")
    with (
        http_server(tmp_path) as port,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, port, "--verbose", "--key", f"{KEY_ID}.{SECRET}", cwd=tmp_path) as process,
    ):
        process.expect("Forwarding")
        assert httpx.get(f"{thread.relay.url}/page.txt", trust_env=False).text == "hello"
        connection_id = process.expect(r"DEBUG: \[([0-9a-f]{12})\] visitor 127\.0\.0\.1 connected")[1]
        process.expect(rf"INFO: \[{connection_id}\] ended: ")
        assert process.stop() == 0
        about_it = [line for line in process.output.splitlines() if re.search("visitor|ended:|downloaded", line)]
        assert len(about_it) >= 3
        assert all(f"[{connection_id}]" in line for line in about_it), about_it
        assert SECRET not in process.output
        assert make_token().partition(".")[0] not in process.output


# Failures of the tunnel


def test_a_refused_key_ends_the_command_with_one_line(tmp_path: Path) -> None:
    with relay_thread(domain=DOMAIN) as thread:
        url = thread.relay.server_url
        with run_command("-k", "test-key.guess", NAME, "80", "--server", url, cwd=tmp_path) as process:
            assert process.wait() == 1
            [_, error] = process.text("stderr").splitlines()
            assert error.startswith(
                f"Error: the tunnel server does not accept key 'test-key' for {NAME} (HTTP status 401)"
            )


def test_a_ca_that_cannot_be_read_ends_the_command_with_one_line(tmp_path: Path) -> None:
    key = {"SMALLWARE_KEY": "s"}
    with run_command(NAME, "80", "--trust-ca", "missing.pem", cwd=tmp_path, env=key) as process:
        assert process.wait() == 1
        [error] = process.text("stderr").splitlines()
        assert error == "Error: cannot read missing.pem: No such file or directory (--trust-ca)"


def test_an_unreachable_server_is_said_once_and_tried_until_it_answers(tmp_path: Path) -> None:
    port = unused_port()
    key = {"SMALLWARE_KEY": f"{KEY_ID}.{SECRET}"}
    url = f"ws://127.0.0.1:{port}/tunnels"
    with run_command("-v", NAME, "80", "--server", url, cwd=tmp_path, env=key) as process:
        process.expect(f"WARNING: cannot reach the tunnel server {url}: .*; trying again until it answers")
        process.expect("DEBUG: next dial in")
        process.expect("DEBUG: next dial in")
        with relay_thread(domain=DOMAIN, tunnel_port=port):
            process.expect("INFO: Forwarding")
            assert process.stop() == 0
        assert process.count("WARNING") == 1


def test_a_failure_for_good_while_forwarding_lets_visitors_finish_and_ends_the_command(tmp_path: Path) -> None:
    with (
        tcp_server() as local,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, local.getsockname()[1], cwd=tmp_path) as process,
    ):
        process.expect("Forwarding")
        with visit(thread.relay) as visitor, accept(local) as answering:
            visitor.sendall(b"question")
            assert answering.recv(100) == b"question"
            thread.call(thread.relay.refuse, 402)
            for tunnel in [one for one in thread.relay.tunnels if one.state == "waiting"]:
                thread.call(tunnel.cut)
            process.expect("Waiting for 1 connections to end")
            answering.sendall(b"answer")
            assert visitor.recv(100) == b"answer"
        assert process.wait() == 1
        assert process.text("stderr").splitlines()[-1].startswith("Error: no credit left for")


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_visitors_finish_and_takes_no_others(number: signal.Signals, tmp_path: Path) -> None:
    with (
        tcp_server() as local,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, local.getsockname()[1], cwd=tmp_path) as process,
    ):
        process.expect("Forwarding")
        with visit(thread.relay) as visitor, accept(local) as answering:
            process.send(number)
            process.expect("INFO: Waiting for 1 connections to end")
            thread.wait_until(lambda relay: len(relay.tunnels) == 1)
            visitor.sendall(b"question")
            assert answering.recv(100) == b"question"
            answering.sendall(b"answer")
            answering.shutdown(socket.SHUT_WR)
            assert visitor.recv(100) == b"answer"
            visitor.shutdown(socket.SHUT_WR)
        assert process.wait() == 0
        process.expect(r"ended: 8 bytes downloaded, 6 uploaded")
        assert thread.relay.violations == []


def test_a_second_signal_resets_visitors_who_are_not_finished(tmp_path: Path) -> None:
    with (
        tcp_server() as local,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, local.getsockname()[1], cwd=tmp_path) as process,
    ):
        process.expect("Forwarding")
        with visit(thread.relay) as visitor, accept(local) as answering:
            process.send(signal.SIGTERM)
            process.expect("Waiting for 1 connections")
            process.send(signal.SIGTERM)
            assert process.wait() == 0
            with pytest.raises(ConnectionResetError):
                answering.recv(1)
            with contextlib.suppress(ConnectionResetError):
                assert visitor.recv(1) == b""
        assert "Traceback" not in process.output


def test_visitors_who_do_not_finish_in_time_are_reset(tmp_path: Path) -> None:
    with (
        tcp_server() as local,
        relay_thread(domain=DOMAIN) as thread,
        forwarding(thread.relay, local.getsockname()[1], cwd=tmp_path, grace=0.1) as process,
    ):
        process.expect("Forwarding")
        with visit(thread.relay), accept(local):
            process.send(signal.SIGTERM)
            process.expect("WARNING: Closing 1 connections that did not end in time")
            assert process.wait() == 0


def test_a_signal_before_the_tunnel_is_open_ends_the_command(tmp_path: Path) -> None:
    with relay_thread(domain=DOMAIN) as thread:
        thread.call(thread.relay.hang)
        with forwarding(thread.relay, 80, cwd=tmp_path) as process:
            thread.wait_until(lambda relay: relay.dials > 0)
            assert process.stop() == 0
            assert process.output == ""


# What must not happen


@run_async
async def test_an_error_of_our_own_ends_one_visitor_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(forward_cli, "forward_tunnel_tcp", fail)

    class Writer:
        def get_extra_info(self, name: str) -> str:
            return "4711"

    await forward_cli._forward(asyncio.StreamReader(), cast(asyncio.StreamWriter, Writer()), ("127.0.0.1", 80))
    [record] = caplog.records
    assert record.getMessage() == "[4711] forwarding failed"
    assert record.exc_info is not None
