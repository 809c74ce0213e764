"""``uvicorn.Server``, replaced: the same constructor and the same port, but behind a relay."""

from __future__ import annotations

import inspect
from typing import Any

import uvicorn
import uvicorn.server
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import tunnel_asgi.local
import tunnel_asgi.relay.tunnel
from tunnel_asgi.protocol import ServerSide
from tunnel_asgi.relay import Relay
from tunnel_asgi.server import SOCKET_OPTIONS

from .streams import current

__all__ = ["PARSERS", "TunnelServer", "install"]

_NOT_COPIED = SOCKET_OPTIONS | {"app", "env_file"}  # the file was read when the config was made

PARSERS: dict[Any, str] = {H11Protocol: "h11", HttpToolsProtocol: "httptools"}
"""The classes that tests ask for, and the name by which ours gives the guarded one."""


class TunnelServer(tunnel_asgi.Server):
    """A server for uvicorn's ``Config``. Visitors come to ``config.port`` as they would to uvicorn's own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(tunnel_config(config))


def tunnel_config(config: uvicorn.Config) -> tunnel_asgi.Config:
    """The same options, uvicorn's defaults included, for a tunnel to a relay on the config's port."""
    options = {
        name: getattr(config, name) for name in inspect.signature(uvicorn.Config).parameters if name not in _NOT_COPIED
    }
    options["http"] = PARSERS.get(config.http, config.http)
    options["log_config"] = None  # configured when the config was made; again would take the tests' handlers away
    return tunnel_asgi.Config(config.app, local=True, **options)


class CountingSide(ServerSide):
    """The relay's side of the wire protocol, which counts."""

    def send_connect(self, ip: str, connection_id: str | None = None) -> str:
        current.relay += 1
        return super().send_connect(ip, connection_id)


class TellingRelay(Relay):
    """A relay that tells what it saw once it is closed."""

    async def aclose(self) -> None:
        await super().aclose()
        current.violations += self.violations


def install() -> None:
    """Put the tunnel where the tests look for uvicorn's server."""
    tunnel_asgi.relay.tunnel.ServerSide = CountingSide  # type: ignore[attr-defined]
    tunnel_asgi.local.Relay = TellingRelay  # type: ignore[attr-defined]
    uvicorn.Server = uvicorn.server.Server = TunnelServer  # type: ignore[misc]
