"""The command line, mostly as a whole process: what a user types, sees and gets as exit code."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from click.testing import CliRunner
from uvicorn.main import main as uvicorn_command
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.processes import DEADLINE, TUNNEL_ASGI, RelayThread, Running, environment, relay_thread
from tests.support import CUSTOMER, DOMAIN, KEY_ID, SECRET, make_tls_contexts
from tunnel_asgi import __version__, cli
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.errors import AuthenticationFailed, TunnelError
from tunnel_asgi.server import Config

APP = '''
import asyncio
import contextlib
import os
import sys

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect


def say(text):
    sys.stderr.write(text + "\\n")  # at once, so that two processes do not mix their lines


class Lifespan:
    def __init__(self, app):
        pass

    async def __aenter__(self):
        say("lifespan began")

    async def __aexit__(self, *exc_info):
        say("lifespan ended")


async def hello(request):
    return PlainTextResponse(f"hello from {request.base_url} {os.environ.get('GREETING', '')}".strip())


async def echo(request):
    """Answers when the visitor has sent it all."""
    say("echoing")
    return PlainTextResponse(await request.body())


async def silent(ws):
    await ws.accept()
    with contextlib.suppress(WebSocketDisconnect):
        await ws.receive_text()


async def never(request):
    say("waiting for ever")
    await asyncio.Event().wait()


routes = [
    Route("/", hello),
    Route("/echo", echo, methods=["POST"]),
    Route("/never", never),
    WebSocketRoute("/silent", silent),
]
app = Starlette(routes=routes, lifespan=Lifespan)


def create_app():
    return app


def create_nothing():
    return 42


def create_with(argument):
    return app


class package:
    number = 42
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(APP)
    (tmp_path / "key").write_text(f"{KEY_ID}.{SECRET}\n")
    return tmp_path


@pytest.fixture
def relay() -> Iterator[RelayThread]:
    with relay_thread(domain=DOMAIN) as running:
        yield running


def tunnel_options(relay: RelayThread, *more: str) -> list[str]:
    return ["main:app", "--domain", str(DOMAIN), "--server", relay.relay.server_url, *more]


def serve(folder: Path, *arguments: str, **options: Any) -> Running:
    return Running("main:app", "--local", "--port", "0", *arguments, cwd=folder, **options)


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TUNNEL_ASGI, *arguments],
        cwd=folder,
        env=environment(folder, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def get(url: str, path: str = "/") -> str:
    with httpx.Client(trust_env=False) as client:
        answer = client.get(url + path)
    assert answer.status_code == 200
    return answer.text


# Options


def names(command: click.Command) -> set[str]:
    return {parameter.name or "" for parameter in command.params}


def test_every_option_of_uvicorn_is_taken_over_or_on_the_ignore_list() -> None:
    theirs = names(uvicorn_command)
    assert theirs | {"version"} >= cli.IGNORED_UVICORN_OPTIONS, "the ignore list names what uvicorn no longer has"
    assert theirs - cli.IGNORED_UVICORN_OPTIONS <= names(cli.tunnel_asgi)
    assert {"reload", "workers", "factory", "app_dir", "root_path", "limit_concurrency"} <= names(cli.tunnel_asgi)


def test_an_option_a_new_uvicorn_brings_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    new = click.Option(["--of-tomorrow"], type=int, default=7)
    monkeypatch.setattr(uvicorn_command, "params", [*uvicorn_command.params, new])
    assert "of_tomorrow" in {parameter.name for parameter in cli._uvicorn_parameters()}


def test_uvicorns_own_command_is_left_as_it_was() -> None:
    defaults = {parameter.name: parameter.default for parameter in uvicorn_command.params}
    assert defaults["http"] == "auto"
    assert defaults["proxy_headers"] is True


def test_no_two_parameters_share_a_name_or_a_spelling() -> None:
    parameters = [parameter.name for parameter in cli.tunnel_asgi.params]
    spellings = [option for parameter in cli.tunnel_asgi.params for option in parameter.opts]
    assert len(set(parameters)) == len(parameters)
    assert len(set(spellings)) == len(spellings)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What ``run`` is called with; nothing runs."""
    calls: dict[str, Any] = {}
    monkeypatch.setattr(cli, "run", lambda **options: calls.update(options))
    for name in [*environment(tmp_path)]:
        if name.startswith(("SMALLWARE_", "TUNNEL_ASGI_")):
            monkeypatch.delenv(name)
    return calls


def invoke(*arguments: str, **env: str) -> str:
    outcome = CliRunner().invoke(cli.tunnel_asgi, arguments, env=env, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--domain", "d"], {"domain": "d"}),
        (["--key", "k"], {"key": "k"}),
        (["--key-file", "f"], {"key_file": "f"}),
        (["--key-id", "i"], {"key_id": "i"}),
        (["--server", "s"], {"server_url": "s"}),
        (["--trust-ca", "c"], {"trust_ca": "c"}),
        (["--allow-insecure-server"], {"allow_insecure_server": True}),
        (["--public-url", "u"], {"public_url": "u"}),
        (["--local"], {"local": True, "port": 8000, "tls": False}),
        (["--local", "--port", "1", "--tls"], {"local": True, "port": 1, "tls": True}),
        (["--standby", "9"], {"standby": 9}),
        (["--timeout-first-byte", "1.5"], {"timeout_first_byte": 1.5}),
        (["--timeout-request-head", "2"], {"timeout_request_head": 2.0}),
        (["--timeout-request-body", "0"], {"timeout_request_body": 0.0}),
        (["--timeout-write", "0"], {"timeout_write": 0.0}),
        (["--limit-body", "1000"], {"limit_body": 1000}),
        ([], {"http": "h11", "proxy_headers": False, "timeout_graceful_shutdown": 10, "use_colors": None}),
        (["--http", "httptools", "--proxy-headers"], {"http": "httptools", "proxy_headers": True}),
        (["--timeout-graceful-shutdown", "3"], {"timeout_graceful_shutdown": 3}),
        (["--use-colors"], {"use_colors": True}),
        (["--no-use-colors", "--no-access-log"], {"use_colors": False, "access_log": False}),
        (["--factory", "--app-dir", "x", "--root-path", "/r"], {"factory": True, "app_dir": "x", "root_path": "/r"}),
        (["--reload", "--reload-delay", "2"], {"reload": True, "reload_delay": 2.0, "reload_dirs": None}),
        (["--reload-dir", ".", "--reload-include", "*.css"], {"reload_dirs": ["."], "reload_includes": ["*.css"]}),
        (["--reload-exclude", "a", "--reload-exclude", "b"], {"reload_excludes": ["a", "b"]}),
        (["--header", "X-A:1", "--header", "X-B: a: b "], {"headers": [("X-A", "1"), ("X-B", "a: b")]}),
        (["--header", "X-Empty:"], {"headers": [("X-Empty", "")]}),
    ],
)
def test_an_option_reaches_run_under_the_name_the_library_has(
    arguments: list[str], expected: dict[str, Any], recorded: dict[str, Any]
) -> None:
    invoke("main:app", *arguments)
    assert recorded["app"] == "main:app"
    assert {name: recorded[name] for name in expected} == expected


def test_every_option_is_one_that_run_understands(recorded: dict[str, Any], tmp_path: Path) -> None:
    invoke("main:app", "--domain", str(DOMAIN), "--key", "k.s")
    recorded.pop("app_dir")
    config = Config(**recorded | {"log_config": None})
    assert config.tunnel == TunnelConfig(str(DOMAIN), key="k.s")


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("SMALLWARE_DOMAIN", "domain"),
        ("SMALLWARE_KEY_ID", "key_id"),
        ("SMALLWARE_SERVER", "server_url"),
        ("SMALLWARE_TRUST_CA", "trust_ca"),
        ("TUNNEL_ASGI_ROOT_PATH", "root_path"),
        ("TUNNEL_ASGI_PUBLIC_URL", "public_url"),
        ("TUNNEL_ASGI_APP", "app"),
    ],
)
def test_an_option_may_come_from_the_environment(variable: str, option: str, recorded: dict[str, Any]) -> None:
    value = "other:app" if option == "app" else "value"
    invoke(*([] if option == "app" else ["main:app"]), **{variable: value})
    assert recorded[option] == value


def test_the_command_line_wins_over_the_environment(recorded: dict[str, Any]) -> None:
    invoke("main:app", "--domain", "here", SMALLWARE_DOMAIN="there")
    assert recorded["domain"] == "here"


def test_local_needs_nothing_of_the_environment_to_be_unset(recorded: dict[str, Any]) -> None:
    invoke("main:app", "--local", SMALLWARE_DOMAIN=str(DOMAIN), SMALLWARE_SERVER="wss://example.com")
    assert (recorded["domain"], recorded["server_url"]) == (None, None)


def test_a_tunnel_needs_nothing_of_the_environment_to_be_unset(recorded: dict[str, Any]) -> None:
    invoke("main:app", "--domain", str(DOMAIN), TUNNEL_ASGI_TLS="1", TUNNEL_ASGI_PORT="0")
    assert recorded["tls"] is False


def test_the_logging_configuration_is_uvicorns_and_ours(recorded: dict[str, Any], tmp_path: Path) -> None:
    invoke("main:app")
    assert {"uvicorn", "uvicorn.access", "tunnel_asgi"} <= recorded["log_config"]["loggers"].keys()
    (tmp_path / "log.json").write_text("{}")
    invoke("main:app", "--log-config", str(tmp_path / "log.json"))
    assert recorded["log_config"] == str(tmp_path / "log.json")


def test_a_key_on_the_command_line_works_and_warns(recorded: dict[str, Any]) -> None:
    output = invoke("main:app", "--key", "very-secret")
    assert recorded["key"] == "very-secret"
    assert output == "Warning: --key shows in the process list; set SMALLWARE_KEY or use --key-file instead.\n"


@pytest.mark.parametrize("env", [{"SMALLWARE_KEY": "k.s"}, {"TUNNEL_ASGI_KEY": "k.s"}])
def test_a_key_in_the_environment_does_not_warn(env: dict[str, str], recorded: dict[str, Any]) -> None:
    assert invoke("main:app", **env) == ""


# Help and version


def test_the_help_names_every_option_and_fits_80_columns(tmp_path: Path) -> None:
    shown = run(tmp_path, "--help", COLUMNS="80", TERM="dumb")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    words = set(re.findall(r"(?<!\S)--[a-z0-9-]+", shown.stdout))
    for parameter in cli.tunnel_asgi.params:
        if isinstance(parameter, click.Option):
            assert set(parameter.opts) <= words
            assert parameter.help
    assert "Usage: python -m tunnel_asgi [OPTIONS] APP" in shown.stdout
    assert "[default: h11]" in " ".join(shown.stdout.split())
    assert "RANGE" not in shown.stdout


def test_the_help_tells_our_options_from_uvicorns(tmp_path: Path) -> None:
    ours, uvicorns = invoke("--help").split("Options of uvicorn")
    assert all(f"  {option} " in ours for option in ("--domain", "--local", "--port", "--limit-body", "--help"))
    assert all(f"  {option} " in uvicorns for option in ("--reload", "--workers", "--http", "--log-level"))
    assert not {"--host", "--uds", "--ssl-keyfile"} & set(uvicorns.split())


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    for command in (TUNNEL_ASGI, (str(Path(sys.executable).with_name("tunnel-asgi")),)):
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert shown.stdout == f"tunnel-asgi, version {__version__}\n"


# Bad input

KEYED = ("--key-file", "key", "--domain", str(DOMAIN))

BAD_INPUT = {
    "no domain": (["--key-file", "key"], "no domain: use --domain"),
    "a bad domain": (["--key-file", "key", "--domain", "example.com"], "expected <service>-<name>-<customer>.<shard>"),
    "no key": (["--domain", str(DOMAIN)], "no access key: set SMALLWARE_KEY or use --key-file"),
    "no such key file": (["--key-file", "nowhere", "--domain", str(DOMAIN)], "cannot read the key file nowhere: No "),
    "an empty key file": (["--key-file", "empty", "--domain", str(DOMAIN)], "the key file empty is empty"),
    "a binary key file": (["--key-file", "noise", "--domain", str(DOMAIN)], "the key file noise: it is not text"),
    "no such CA": ([*KEYED, "--server", "wss://127.0.0.1:1", "--trust-ca", "nowhere"], "nowhere: No such file"),
    "a CA that is none": ([*KEYED, "--server", "wss://127.0.0.1:1", "--trust-ca", "key"], "no PEM certificate"),
    "http": ([*KEYED, "--server", "http://127.0.0.1"], "expected ws:// or wss:// and a host"),
    "a password in the URL": ([*KEYED, "--server", "wss://me:sesame@127.0.0.1"], "user name or password"),
    "ws elsewhere": ([*KEYED, "--server", "ws://192.0.2.1"], "use wss://, or --allow-insecure-server"),
    "a bad public URL": ([*KEYED, "--public-url", "ftp://x"], "expected http[s]://host[:port] (--public-url)"),
    "local and domain": (["--local", "--domain", str(DOMAIN)], "leave out --domain and --server"),
    "a folder as key file": (
        ["--key-file", ".", "--domain", str(DOMAIN)],
        "cannot read the key file .: Is a directory",
    ),
    "a port without local": ([*KEYED, "--port", "80"], "a tunnel opens no port. Add --local, or leave out --port"),
    "TLS without local": (["--tls"], "TLS ends at the tunnel server. Add --local, or leave out --tls"),
    "a bad loop": ([*KEYED, "--loop", "bogus"], "bogus"),
    "a bad parser": ([*KEYED, "--http", "bogus"], "bogus"),
    "a bad WebSocket parser": ([*KEYED, "--ws", "bogus"], "bogus"),
}


@pytest.fixture
def quiet_folder(folder: Path) -> Path:
    (folder / "empty").write_text(" \n")
    (folder / "noise").write_bytes(b"\xff\xfe\x00")
    return folder


def complaint(outcome: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    assert outcome.returncode == 3, outcome.stderr
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert SECRET not in outcome.stderr
    return outcome.stderr.removeprefix("Error: ").rstrip("\n")


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_gets_one_line_that_names_the_remedy(what: str, quiet_folder: Path) -> None:
    arguments, remedy = BAD_INPUT[what]
    assert remedy in complaint(run(quiet_folder, "main:app", *arguments))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["nowhere:app"], 'Could not import module "nowhere"'),
        (["main.nowhere:app"], 'Could not import module "main.nowhere"'),
        (["main:nothing"], 'Attribute "nothing" not found in module "main"'),
        (["main:package.nothing"], 'Attribute "package.nothing" not found'),
        (["main"], "'main' does not name an app: expected module:attribute, such as main:app"),
        (["main:"], "such as main:app"),
        ([":other"], "such as main:other"),
        (["pkg.other"], "such as pkg.other:app"),
        (["main.py"], "such as main:app"),
        (["other.py:api"], "such as other:api"),
        (["./main:app"], "such as main:app"),
        (["src/shop/main.py:app"], "such as main:app --app-dir src/shop"),
        (["..main:app"], "such as main:app"),
        (["main:package.number"], "'main:package.number' is not an ASGI app: it is of type int"),
        (["main:create_nothing", "--factory"], "returned a int, not an ASGI app"),
    ],
)
def test_an_app_that_is_none_gets_one_line_and_nothing_is_dialled(
    arguments: list[str], remedy: str, folder: Path, relay: RelayThread
) -> None:
    outcome = run(folder, *arguments, "--key-file", "key", *tunnel_options(relay)[1:])
    assert remedy in complaint(outcome)
    assert relay.relay.dials == 0


def test_a_factory_that_needs_an_argument_is_told_apart_from_one_that_fails(folder: Path, relay: RelayThread) -> None:
    outcome = run(folder, "main:create_with", "--factory", "--key-file", "key", *tunnel_options(relay)[1:])
    assert outcome.returncode == 3
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("Error: the factory 'main:create_with' could not be called")
    assert relay.relay.dials == 0


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import missing_package", "ModuleNotFoundError: No module named 'missing_package'"),
        ("from main import nothing", "ImportError: cannot import name 'nothing'"),
        ("app = (", "SyntaxError: '(' was never closed"),
    ],
)
def test_an_exception_inside_the_users_module_shows_where_and_none_of_our_frames(
    code: str, last_line: str, workers: list[str], folder: Path, relay: RelayThread
) -> None:
    (folder / "broken.py").write_text(f"\n{code}\n")
    outcome = run(folder, "broken:app", "--key-file", "key", *tunnel_options(relay)[1:], *workers)
    assert outcome.returncode == 3
    assert set(re.findall(r'File "(.*?)", line (\d+)', outcome.stderr)) == {(str(folder / "broken.py"), "2")}
    assert last_line in outcome.stderr
    assert relay.relay.dials == 0


def test_an_exception_of_our_own_is_not_taken_for_the_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(ZeroDivisionError):
        invoke("main:app")


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_failing_lifespan_ends_it_before_anything_is_dialled(
    workers: list[str], folder: Path, relay: RelayThread
) -> None:
    (folder / "main.py").write_text(APP.replace('say("lifespan began")', "1 / 0"))
    outcome = run(folder, *tunnel_options(relay), "--key-file", "key", *workers)
    assert outcome.returncode == 3
    assert "ZeroDivisionError" in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("Error: the application failed to start")
    assert relay.relay.dials == 0


def test_an_env_file_without_python_dotenv_gets_one_line(folder: Path) -> None:
    (folder / "dotenv.py").write_text("raise ModuleNotFoundError(name='dotenv')")
    (folder / "env").touch()
    outcome = run(folder, "main:app", "--local", "--port", "0", "--env-file", "env")
    assert "--env-file needs python-dotenv" in complaint(outcome)


def test_a_taken_port_gets_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run(folder, "main:app", "--local", "--port", str(port))
        assert complaint(outcome) == f"port {port} on 127.0.0.1 is taken: choose another with --port (0 = any free one)"


def test_a_directory_for_the_development_ca_that_cannot_be_made_gets_one_line(folder: Path) -> None:
    outcome = run(folder, "main:app", "--local", "--port", "0", "--tls", XDG_DATA_HOME=str(folder / "main.py"))
    assert "cannot keep the development CA in" in complaint(outcome)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "APP is missing: name the module and the app in it, such as main:app"),
        (["main:app", "--nonsense"], "No such option"),
        (["main:app", "--local", "--port", "65536"], "65536 is not in the range"),
        (["main:app", "--standby", "0"], "0 is not in the range"),
        (["main:app", "--timeout-first-byte", "-1"], "-1.0 is not in the range"),
        (["main:app", "--limit-body", "-1"], "-1 is not in the range"),
        (["main:app", "--header", "X-A"], "'X-A' is not of the form Name:Value"),
        (["main:app", "--header", ":x"], "':x' is not of the form Name:Value"),
        (["main:app", "--header", "X A: 1"], "'X A: 1' is not of the form Name:Value"),
        (["main:app", "--header", "X-A: \N{SNOWMAN}"], "is not of the form Name:Value"),
        (["main:app", "--header", "X-A: 1\r\nX-B: 2"], "is not of the form Name:Value"),
        (["main:app", "--host", "0.0.0.0"], "there is no --host: a tunnel opens no port"),
        (["main:app", "--uds=app.sock"], "there is no --uds: a tunnel opens no port"),
        (
            ["main:app", "--ssl-keyfile", "key"],
            "there is no --ssl-keyfile: the visitor's TLS ends at the tunnel server",
        ),
        (["main:app", "--http2"], "there is no --http2: the tunnel carries HTTP/1.1"),
        (["main:app", "--reload-dir", "nowhere"], "does not exist"),
    ],
)
def test_a_wrong_use_of_an_option_is_a_usage_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNNEL_ASGI_APP", raising=False)
    outcome = CliRunner().invoke(cli.tunnel_asgi, arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())


# Dialled, and refused


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, f"does not accept key '{KEY_ID}' for {DOMAIN} (HTTP status 401)"),
        (403, f"does not accept key '{KEY_ID}' for {DOMAIN} (HTTP status 403)"),
        (402, f"no credit left for {DOMAIN} (HTTP status 402)"),
        (404, f"refused {DOMAIN} with HTTP status 404: check the domain and the server URL"),
    ],
)
def test_a_refusal_ends_it_with_one_line(
    status: int, expected: str, workers: list[str], folder: Path, relay: RelayThread
) -> None:
    relay.call(relay.relay.refuse, status)
    outcome = run(folder, *tunnel_options(relay), "--key-file", "key", *workers)
    assert outcome.returncode == 3
    errors = [line for line in outcome.stderr.splitlines() if not line.startswith(("INFO", "lifespan"))]
    assert len(errors) == 1, outcome.stderr
    assert errors[0].startswith("Error: ")
    assert expected in errors[0]
    assert SECRET not in outcome.stderr
    assert "eyJ" not in outcome.stderr  # how every token begins
    assert "Serving at" not in outcome.stderr
    assert "lifespan ended" in outcome.stderr


def test_a_wrong_secret_and_the_domain_of_another_are_refused_by_a_real_judge(folder: Path, relay: RelayThread) -> None:
    wrong = run(folder, *tunnel_options(relay), SMALLWARE_KEY=f"{KEY_ID}.guess")
    assert "(HTTP status 401)" in wrong.stderr
    assert "guess" not in wrong.stderr
    other = str(DOMAIN).replace(CUSTOMER, "other")
    (folder / "other-key").write_text(f"{KEY_ID}.{SECRET}")
    not_mine = run(folder, *tunnel_options(relay), "--domain", other, "--key-file", "other-key")
    assert f"does not accept key '{KEY_ID}' for {other}" in not_mine.stderr
    assert (wrong.returncode, not_mine.returncode) == (3, 3)


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_server_out_of_reach_is_retried_and_said_once_and_ctrl_c_ends_it(workers: list[str], folder: Path) -> None:
    with socket.socket() as bound:  # but not listening: nobody else gets the port, and every dial is refused
        bound.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{bound.getsockname()[1]}/tunnels"
        arguments = ["main:app", "--domain", str(DOMAIN), "--key-file", "key", "--server", url, *workers]
        with Running(*arguments, "--log-level", "debug", cwd=folder) as app:
            app.expect(f"WARNING: .*cannot reach the tunnel server {url}.*trying again")
            for _ in range(2 if workers else 3):
                app.expect("next dial in")
            assert app.stop() == 0
            assert app.count("cannot reach") - app.count("next dial.*cannot reach") == (2 if workers else 1)
            assert "Serving at" not in app.output
            assert app.count("lifespan ended") == (2 if workers else 1)
            assert "Traceback" not in app.output


# Serving


@pytest.mark.parametrize(
    "key", [["--key-file", "key"], ["--key", f"{KEY_ID}.{SECRET}"], ["--key", SECRET, "--key-id", KEY_ID]]
)
def test_an_app_is_served_through_a_relay_at_its_public_url(key: list[str], folder: Path, relay: RelayThread) -> None:
    with Running(*tunnel_options(relay, *key), cwd=folder) as app:
        assert app.url() == f"https://{DOMAIN}"
        assert get(relay.relay.url) == f"hello from https://127.0.0.1:{relay.relay.port}/"
        assert app.stop() == 0
        assert SECRET not in app.output
        assert app.count("process list") == ("--key" in key)
        assert app.count("Serving at") == 1


def test_the_console_script_serves_and_uses_the_environment(folder: Path, relay: RelayThread) -> None:
    env = {
        "SMALLWARE_DOMAIN": str(DOMAIN),
        "SMALLWARE_KEY": f"{KEY_ID}.{SECRET}",
        "SMALLWARE_SERVER": relay.relay.server_url,
        "TUNNEL_ASGI_APP": "main:app",
    }
    script = str(Path(sys.executable).with_name("tunnel-asgi"))
    with Running(cwd=folder, env=env, command=(script,)) as app:
        assert app.url() == f"https://{DOMAIN}"
        assert get(relay.relay.url).startswith("hello")
        assert app.stop() == 0
        assert SECRET not in app.output
        assert "Warning" not in app.output


def test_local_says_the_url_once_and_a_visitor_who_comes_then_is_served(folder: Path) -> None:
    with serve(folder) as app:
        url = app.url()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert get(url) == f"hello from {url}/"
        assert app.stop() == 0
        assert app.count(re.escape(url)) == 1
        assert app.output.index("lifespan began") < app.output.index("Serving at")


def test_local_with_tls_serves_https_and_prints_where_the_ca_is(folder: Path) -> None:
    with serve(folder, "--tls") as app:
        path = app.expect(r"Development CA for this machine: (\S+)")[1]
        url = app.url()
        assert url.startswith("https://127.0.0.1:")
        assert Path(path).is_relative_to(folder)
        with httpx.Client(verify=ssl.create_default_context(cafile=path), trust_env=False) as client:
            assert client.get(url).text == f"hello from {url}/"
        assert app.stop() == 0


def test_a_factory_in_another_folder_is_served(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "main.py").rename(folder / "elsewhere" / "other.py")
    arguments = ["other:create_app", "--factory", "--app-dir", "elsewhere", "--local", "--port", "0"]
    with Running(*arguments, cwd=folder) as app:
        assert get(app.url()).startswith("hello")
        assert app.stop() == 0


def test_headers_and_an_env_file_reach_the_app(folder: Path, relay: RelayThread) -> None:
    # python-dotenv is not among our requirements; this much of it stands in for it.
    (folder / "dotenv.py").write_text(
        "import os\n"
        "def load_dotenv(dotenv_path):\n"
        "    os.environ.update(line.strip().split('=', 1) for line in open(dotenv_path))\n"
    )
    (folder / "env").write_text(f"SMALLWARE_KEY={KEY_ID}.{SECRET}\nGREETING=salut\n")
    with Running(*tunnel_options(relay, "--env-file", "env", "--header", "X-Mine: 1"), cwd=folder) as app:
        app.url()
        answer = httpx.get(relay.relay.url, trust_env=False)
        assert answer.text.endswith("salut")
        assert answer.headers["x-mine"] == "1"
        assert app.stop() == 0
        assert SECRET not in app.output
        assert "Warning" not in app.output


def test_the_public_url_decides_what_the_app_sees(folder: Path, relay: RelayThread) -> None:
    options = tunnel_options(relay, "--key-file", "key", "--public-url", "http://tunnel.example:8080")
    with Running(*options, cwd=folder) as app:
        assert app.url() == "http://tunnel.example:8080"
        assert app.stop() == 0


@pytest.mark.parametrize(("flag", "colored"), [("--use-colors", True), ("--no-use-colors", False)])
def test_colors_can_be_forced(flag: str, colored: bool, folder: Path) -> None:
    with serve(folder, flag) as app:
        app.url()
        assert app.stop() == 0
        assert ("\x1b[" in app.output) is colored


def test_a_server_with_a_ca_of_its_own_is_trusted_with_trust_ca(folder: Path) -> None:
    server_context, _ = make_tls_contexts(folder)
    # Our relay's clients dial plain ws://, so this is only the TLS handshake: it must get past the certificate.
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept_one() -> None:
            plain, _ = listening.accept()
            with server_context.wrap_socket(plain, server_side=True) as secure:
                seen.append(secure.recv(65536))
                secure.sendall(b"HTTP/1.1 402 Payment Required\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=accept_one)
        thread.start()
        url = f"wss://127.0.0.1:{listening.getsockname()[1]}/tunnels"
        arguments = ["main:app", *KEYED, "--server", url, "--trust-ca", "certificate.pem", "--standby", "1"]
        outcome = run(folder, *arguments)
        thread.join()
    assert "no credit left" in outcome.stderr
    assert seen[0].startswith(f"GET /tunnels/{DOMAIN} HTTP/1.1".encode())
    assert outcome.returncode == 3


# The end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_signal_drains_requests_finish_websockets_get_1012_the_lifespan_ends(
    number: signal.Signals, workers: list[str], folder: Path
) -> None:
    with serve(folder, *workers) as app:
        url = app.url()
        app.worker_pids(2 if workers else 1)
        port = int(url.rpartition(":")[2])
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nConnection: close\r\n\r\n01234"
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as visitor:
            visitor.sendall(head)
            app.expect("echoing")
            with connect(f"ws://127.0.0.1:{port}/silent", proxy=None) as ws:
                app.send(number)
                with pytest.raises(ConnectionClosed):
                    ws.recv(DEADLINE)
                assert ws.close_code == 1012
            visitor.sendall(b"56789")
            with visitor.makefile("rb") as reader:
                answer = reader.read()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"0123456789")
        # As under uvicorn: SIGTERM is passed on once all is done, Ctrl+C and a parent's end are no failure.
        assert app.wait() == (-signal.SIGTERM if number is signal.SIGTERM and not workers else 0)
        assert app.count("lifespan ended") == (2 if workers else 1)
        assert "Traceback" not in app.output


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_second_signal_forces_the_end(workers: list[str], folder: Path) -> None:
    with serve(folder, "--timeout-graceful-shutdown", "600", *workers) as app:
        port = int(app.url().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as visitor:
            visitor.sendall(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
            app.expect("waiting for ever")
            app.send(signal.SIGINT)
            app.expect("Waiting for connections to close|Waiting for background tasks")
            app.send(signal.SIGINT)
            assert app.wait() == 0


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_request_that_never_ends_delays_the_end_for_a_bounded_time(workers: list[str], folder: Path) -> None:
    with serve(folder, "--timeout-graceful-shutdown", "1", *workers) as app:
        port = int(app.url().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as visitor:
            visitor.sendall(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
            app.expect("waiting for ever")
            assert app.stop() == 0
            assert "lifespan ended" in app.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--reload"]])
def test_the_exit_code_is_uvicorns(number: signal.Signals, options: list[str], folder: Path) -> None:
    with Running("main:app", "--port", "0", *options, cwd=folder, command=(sys.executable, "-m", "uvicorn")) as theirs:
        theirs.expect("Uvicorn running")
        if options:
            theirs.expect("Application startup complete")
        with serve(folder, *options) as ours:
            ours.url()
            theirs.send(number)
            ours.send(number)
            assert ours.wait() == theirs.wait()


def test_limit_max_requests_ends_it_well(folder: Path) -> None:
    with serve(folder, "--limit-max-requests", "1") as app:
        assert get(app.url()).startswith("hello")
        assert app.wait() == 0
        assert "Maximum request limit of 1 exceeded" in app.output


def test_a_tunnel_that_fails_for_good_later_ends_it_with_one_line(folder: Path, relay: RelayThread) -> None:
    with Running(*tunnel_options(relay, "--key-file", "key"), cwd=folder) as app:
        app.url()
        relay.call(relay.relay.refuse, 402)
        for tunnel in list(relay.relay.tunnels):
            relay.call(tunnel.cut)
        app.expect("Error: no credit left")
        assert app.wait() == 3
        assert "lifespan ended" in app.output
        assert "Traceback" not in app.output


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_output_is_no_reason_to_fail(closed: str, folder: Path, relay: RelayThread) -> None:
    command = ("/bin/sh", "-c", f'exec "$@" {closed}>&-', "sh", *TUNNEL_ASGI)
    with Running(*tunnel_options(relay, "--key-file", "key"), cwd=folder, command=command) as app:
        relay.wait_until(lambda relay: bool(relay.tunnels))
        assert get(relay.relay.url).startswith("hello")
        assert app.stop() == 0
        assert "Traceback" not in app.output


def test_a_broken_pipe_makes_no_noise(folder: Path, relay: RelayThread) -> None:
    """As in ``tunnel-asgi ... | head -1``: the access log goes to a pipe whose reader is gone."""
    command = ("/bin/sh", "-c", '"$@" | true', "sh", *TUNNEL_ASGI)
    with Running(*tunnel_options(relay, "--key-file", "key"), cwd=folder, command=command) as app:
        app.url()
        for _ in range(3):
            assert get(relay.relay.url).startswith("hello")
        process = int(re.findall(r"Started server process \[(\d+)\]", app.output)[0])
        os.kill(process, signal.SIGINT)
        app.wait()
        assert "Traceback" not in app.output
        assert "BrokenPipe" not in app.output


def test_no_option_and_no_error_repeats_a_secret() -> None:
    error = AuthenticationFailed(401, domain=str(DOMAIN), key_id=KEY_ID)
    assert isinstance(error, TunnelError)
    assert SECRET not in str(error)
    assert SECRET not in repr(dataclasses.replace(TunnelConfig(str(DOMAIN), key=SECRET)))
