"""Serve an ASGI app through a tunnel: the tunnel is the server, no port is opened.

In short::

    tunnel_asgi.run("main:app", domain="www-x-cust.e0.smallware.io", reload=True)  # blocking
    await tunnel_asgi.serve(app, domain="www-x-cust.e0.smallware.io")  # inside a running loop
"""

from importlib.metadata import version

from tunnel_asgi.errors import (
    AppLoadFailed,
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    InvalidDomain,
    InvalidKey,
    InvalidServerURL,
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
from tunnel_asgi.server import Config, Server, serve
from tunnel_asgi.supervisor import WorkersFailed, run

__all__ = [
    "AppLoadFailed",
    "AuthenticationFailed",
    "BadRequest",
    "Config",
    "ConfigError",
    "ConnectionFailed",
    "InvalidDomain",
    "InvalidKey",
    "InvalidServerURL",
    "LifespanFailed",
    "ListenerClosed",
    "LocalProtocolError",
    "NoCredits",
    "ProtocolError",
    "RelayFailed",
    "Server",
    "ServerError",
    "TunnelError",
    "UpgradeRefused",
    "WebSocketError",
    "WorkersFailed",
    "run",
    "serve",
]

__version__ = version("tunnel-asgi")
