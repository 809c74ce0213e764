"""Serve an ASGI app through a tunnel: the tunnel is the server, no port is opened.

In short::

    tunnel_asgi.run("main:app", domain="www-x-cust.e0.smallware.io", reload=True)  # blocking
    await tunnel_asgi.serve(app, domain="www-x-cust.e0.smallware.io")  # inside a running loop
    with tunnel_asgi.share_in_thread(app, local=True) as tunnel:  # notebooks, tests; ``async with share(...)``, too
        print(tunnel.url)

Anything else that talks over a stream: ``TunnelListener``, ``start_tunnel_server``, ``create_tunnel_server`` and
``forward_tunnel_tcp``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from tunnel_asgi.server import Config, Server, serve
    from tunnel_asgi.sharing import Share, ThreadShare, share, share_in_thread
    from tunnel_asgi.supervisor import WorkersFailed, run
    from tunnel_asgi.transport import TunnelTransport

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
    "Share",
    "ThreadShare",
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
    "share",
    "share_in_thread",
    "start_tunnel_server",
]

__version__: str

if not TYPE_CHECKING:  # pragma: no branch
    # Nobody waits for what is not used: uvicorn, websockets, cryptography. pytest imports this package at every start.
    _HOMES = {
        "auth": ["AccessKey", "JwtManager"],
        "config": ["TunnelConfig"],
        "domain": ["TunnelDomain"],
        "forward": ["ForwardStats", "forward_tunnel", "forward_tunnel_tcp"],
        "listener": ["TunnelListener", "create_tunnel_server", "start_tunnel_server"],
        "pool": ["TunnelPool"],
        "server": ["Config", "Server", "serve"],
        "sharing": ["Share", "ThreadShare", "share", "share_in_thread"],
        "supervisor": ["WorkersFailed", "run"],
        "transport": ["TunnelTransport"],
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("tunnel-asgi")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}")
        value = globals()[name] = getattr(module, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
