"""Serve an ASGI app through a tunnel: the tunnel is the server, no port is opened.

In short::

    tunnel_asgi.run("main:app", domain="www-x-cust.e0.smallware.io", reload=True)  # blocking
    await tunnel_asgi.serve(app, domain="www-x-cust.e0.smallware.io")  # inside a running loop

Anything else that talks over a stream: ``TunnelListener``, ``start_tunnel_server``, ``create_tunnel_server`` and
``forward_tunnel_tcp``.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tunnel_asgi.auth import AccessKey, JwtManager
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.errors import (
    AppLoadFailed,
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    InvalidDomain,
    InvalidKey,
    InvalidServerURL,
    IoError,
    LifespanFailed,
    ListenerClosed,
    LocalProtocolError,
    NoCredits,
    ProtocolError,
    RelayFailed,
    ServerError,
    TunnelError,
    UpgradeRefused,
    WebSocketError,
)
from tunnel_asgi.forward import ForwardStats, forward_tunnel, forward_tunnel_tcp
from tunnel_asgi.listener import TunnelListener, create_tunnel_server, start_tunnel_server
from tunnel_asgi.pool import TunnelPool
from tunnel_asgi.transport import TunnelTransport

if TYPE_CHECKING:
    from tunnel_asgi.server import Config, Server, serve
    from tunnel_asgi.supervisor import WorkersFailed, run

__all__ = [
    "AccessKey",
    "AppLoadFailed",
    "AuthenticationFailed",
    "BadRequest",
    "Config",
    "ConfigError",
    "ConnectionFailed",
    "ForwardStats",
    "InvalidDomain",
    "InvalidKey",
    "InvalidServerURL",
    "IoError",
    "JwtManager",
    "LifespanFailed",
    "ListenerClosed",
    "LocalProtocolError",
    "NoCredits",
    "ProtocolError",
    "RelayFailed",
    "Server",
    "ServerError",
    "TunnelConfig",
    "TunnelDomain",
    "TunnelError",
    "TunnelListener",
    "TunnelPool",
    "TunnelTransport",
    "UpgradeRefused",
    "WebSocketError",
    "WorkersFailed",
    "create_tunnel_server",
    "forward_tunnel",
    "forward_tunnel_tcp",
    "run",
    "serve",
    "start_tunnel_server",
]

__version__ = version("tunnel-asgi")

if not TYPE_CHECKING:  # pragma: no branch
    # Whoever only forwards bytes does not wait for uvicorn's import (a third of the time).
    _LAZY = {
        "Config": "tunnel_asgi.server",
        "Server": "tunnel_asgi.server",
        "WorkersFailed": "tunnel_asgi.supervisor",
        "run": "tunnel_asgi.supervisor",
        "serve": "tunnel_asgi.server",
    }

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
