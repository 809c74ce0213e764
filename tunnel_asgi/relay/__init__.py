r"""The embedded tunnel server: for ``--local``, and the strict judge of every end-to-end test (PROTOCOL.md 6).

    visitor <--TCP/TLS--> Visitor <--> Tunnel <--WebSocket--> client
                              \         /
                               Router: who gets whom

It shares with the client only the domain's form and the protocol tables: an end-to-end test must not compare a bug
with itself. ``server.py`` is the door, ``tunnel.py`` the middle; read on from either.
"""

from tunnel_asgi.relay.server import Relay
from tunnel_asgi.relay.tunnel import Tunnel

__all__ = ["Relay", "Tunnel"]
