"""The embedded relay in its thread."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from pathlib import Path

import httpx
import pytest

from tests.support import run_async
from tunnel_asgi import local
from tunnel_asgi.errors import ConfigError, RelayFailed
from tunnel_asgi.local import LocalRelay
from tunnel_asgi.server import Config, Server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def relay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tunnel-asgi relay"]


def is_taken(port: int) -> bool:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def test_it_listens_while_it_is_entered_and_leaves_nothing_behind() -> None:
    with LocalRelay(port=0) as relay:
        port = relay.relay.port
        assert relay.url == f"http://127.0.0.1:{port}"
        assert relay.ca_path is None
        assert is_taken(port)
        assert len(relay_threads()) == 1
    assert not is_taken(port)
    assert not relay_threads()


def test_two_at_once_take_two_ports_and_two_secrets() -> None:
    with LocalRelay(port=0) as one, LocalRelay(port=0) as other:
        assert one.relay.port != other.relay.port
        assert one.tunnel_config.key != other.tunnel_config.key
        assert one.tunnel_config.server_url != other.tunnel_config.server_url


def test_its_port_can_be_taken_again_at_once() -> None:
    with LocalRelay(port=0) as relay:
        port = relay.relay.port
    with LocalRelay(port=port) as again:
        assert again.relay.port == port


def test_a_taken_port_is_one_line_that_names_the_remedy_and_no_thread_is_left() -> None:
    with LocalRelay(port=0) as first:
        port = first.relay.port
        with pytest.raises(RelayFailed) as raised, LocalRelay(port=port):
            pass
        assert str(raised.value) == f"port {port} on 127.0.0.1 is taken: choose another with --port (0 = any free one)"
        assert len(relay_threads()) == 1


def test_a_failure_before_there_is_a_relay_does_not_leave_the_caller_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(local, "Relay", fail)
    with pytest.raises(ZeroDivisionError), LocalRelay(port=0):
        pass
    assert not relay_threads()


def test_with_tls_a_directory_that_cannot_be_written_shows_before_anything_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot keep the development CA"):
        LocalRelay(port=0, tls=True)
    assert not relay_threads()


async def describe(scope, receive, send):  # type: ignore[no-untyped-def]
    """Answer with the scheme and server the app sees."""
    if scope["type"] != "http":
        raise NotImplementedError
    body = f"{scope['scheme']} {scope['server'][0]} {scope['server'][1]}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("tls", [False, True])
@run_async
async def test_a_visitor_is_served_and_the_app_sees_the_relays_own_address(tls: bool) -> None:
    with LocalRelay(port=0, tls=tls) as relay:
        config = Config(
            describe,
            domain=relay.tunnel_config.domain,
            key=relay.tunnel_config.key,
            key_id="local",
            server_url=relay.tunnel_config.server_url,
            public_url=relay.url,
            log_config=None,
            lifespan="off",
        )
        await _visit(config, relay)


async def _visit(config: Config, relay: LocalRelay) -> None:
    ready = asyncio.Event()
    server = Server(config, on_started=ready.set)
    serving = asyncio.create_task(server.serve())
    try:
        await ready.wait()
        trust = ssl.create_default_context(cafile=str(relay.ca_path)) if relay.ca_path else True
        scheme = "https" if relay.ca_path else "http"
        async with httpx.AsyncClient(verify=trust, trust_env=False) as client:
            for host in ("127.0.0.1", "localhost") if relay.ca_path else ("127.0.0.1",):
                answer = await client.get(f"{scheme}://{host}:{relay.relay.port}/")
                assert answer.text == f"{scheme} 127.0.0.1 {relay.relay.port}"
    finally:
        server.should_exit = True
        await serving


def test_with_tls_a_client_that_does_not_trust_the_ca_is_told_so() -> None:
    with (
        LocalRelay(port=0, tls=True) as relay,
        httpx.Client(trust_env=False) as client,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.get(relay.url)
