"""The few things asyncio leaves to us about sockets: ports that are taken, and connections that must be reset."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tunnel_asgi.errors import RelayFailed

__all__ = ["explain_listen_errors", "netloc", "reset"]

_LINGER_ZERO = struct.pack("ii", 1, 0)


def reset(transport: asyncio.Transport) -> None:
    """Abort an open connection with a TCP reset.

    ``abort()`` alone sends a FIN, which the peer cannot tell from the good end of a response.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None:  # with TLS it goes before the transport does
        with suppress(OSError):  # the peer may have been quicker
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    transport.abort()


@contextmanager
def explain_listen_errors(host: str, port: int, option: str) -> Iterator[None]:
    """Turn an OSError of a listening socket into RelayFailed; ``option`` chooses another port."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is taken: choose another with {option} (0 = any free one)"
        else:
            message = f"cannot listen on port {port} of {host}: {error.strerror}"
        raise RelayFailed(message) from error


def netloc(sockets: Sequence[socket.socket]) -> str:
    """``host:port`` that reaches the first of these listening sockets from this machine."""
    host, port = sockets[0].getsockname()[:2]
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified:
        return f"127.0.0.1:{port}"
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
