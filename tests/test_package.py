"""What ``import tunnel_asgi`` gives."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import tunnel_asgi
from tunnel_asgi import errors

LIBRARY = [
    "AccessKey",
    "ForwardStats",
    "JwtManager",
    "TunnelConfig",
    "TunnelDomain",
    "TunnelListener",
    "TunnelPool",
    "TunnelTransport",
    "create_tunnel_server",
    "forward_tunnel",
    "forward_tunnel_tcp",
    "start_tunnel_server",
]
SERVER = ["Config", "Server", "Share", "ThreadShare", "WorkersFailed", "run", "serve", "share", "share_in_thread"]


def test_the_package_exports_the_library_the_server_and_every_exception() -> None:
    assert sorted(tunnel_asgi.__all__) == sorted(LIBRARY + SERVER + errors.__all__)
    assert set(tunnel_asgi.__all__) <= set(dir(tunnel_asgi))


@pytest.mark.parametrize("name", tunnel_asgi.__all__)
def test_every_public_name_is_there_and_described(name: str) -> None:
    assert inspect.getdoc(getattr(tunnel_asgi, name))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tunnel_asgi' has no attribute 'no_such_name'"):
        _ = tunnel_asgi.no_such_name  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from tunnel_asgi import no_such_name  # type: ignore[attr-defined]  # noqa: F401


def test_it_knows_its_version() -> None:
    assert tunnel_asgi.__version__ == version("tunnel-asgi")


def test_nothing_is_imported_before_it_is_used() -> None:
    program = """
import sys
import tunnel_asgi
heavy = {"asyncio", "cryptography", "email", "h11", "jwt", "starlette", "uvicorn", "websockets"}
assert not heavy & set(sys.modules)
tunnel_asgi.TunnelListener
assert not {"uvicorn", "starlette", "h11"} & set(sys.modules)
tunnel_asgi.run
assert "run" in vars(tunnel_asgi)
assert "uvicorn" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
