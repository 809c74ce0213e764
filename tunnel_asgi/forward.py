"""Forward a visitor to another stream, such as a local TCP port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from typing import NoReturn

from tunnel_asgi.errors import IoError
from tunnel_asgi.listener import STREAM_LIMIT, TunnelStreamReader

__all__ = ["ForwardStats", "forward_tunnel", "forward_tunnel_tcp"]

CHUNK = 64 * 1024  # bytes read at once
CONNECT_TIMEOUT = 10.0  # seconds for the local service to take a connection
HALF_OPEN_TIMEOUT = 60.0  # seconds without a byte after which the second direction ends, once the first has [S]


@dataclass(frozen=True, slots=True)
class ForwardStats:
    """What one visitor connection moved, in bytes, with the published names."""

    bytes_downloaded: int
    """From the visitor to the local service."""
    bytes_uploaded: int
    """From the local service to the visitor."""


async def forward_tunnel_tcp(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    host: str,
    port: int,
    *,
    half_open_timeout: float = HALF_OPEN_TIMEOUT,
) -> ForwardStats:
    """Connect to ``host:port`` within 10 seconds and forward the visitor to it; otherwise as ``forward_tunnel``.

    Raises:
        IoError: the target cannot be reached, or failed. The visitor's connection has been closed.
        ConnectionResetError: the visitor's connection failed.
    """
    try:
        local = await _connect(host, port)
    except BaseException:
        writer.close()
        raise
    return await forward_tunnel(reader, writer, *local, half_open_timeout=half_open_timeout)


async def _connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = TunnelStreamReader(STREAM_LIMIT, loop)  # asyncio's own would lose what came before a reset
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            transport, _ = await loop.create_connection(lambda: protocol, host, port)
    except (OSError, ValueError) as error:  # ValueError: no host of that name can exist
        raise IoError(address(host, port), _reason(error)) from error
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def forward_tunnel(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    local_reader: asyncio.StreamReader,
    local_writer: asyncio.StreamWriter,
    *,
    half_open_timeout: float = HALF_OPEN_TIMEOUT,
) -> ForwardStats:
    """Copy bytes both ways until both directions have ended; both connections are closed then.

    Each direction ends on its own: EOF from one side reaches the other as EOF while answers still flow. Once one
    direction has ended, ``half_open_timeout`` seconds without progress end the other one too. If the visitor fails,
    or this call is cancelled, the local side is reset at once; if the local side fails, the visitor still gets what
    came from it. Never holds more than a few hundred KiB, whatever the body size.

    Raises:
        IoError: the local side failed.
        ConnectionResetError: the visitor's side failed.
    """
    visitor = _End(reader, writer)
    local = _End(local_reader, local_writer)
    try:
        failed = await _copy_both(visitor, local, half_open_timeout)
        if failed is not visitor:
            await _close_both(visitor, local, half_open_timeout)
    finally:
        local.abort()
        visitor.abort()
        await asyncio.wait({local.closed, visitor.closed})
    if failed is not None:
        _report(failed, local)
    return ForwardStats(bytes_downloaded=local.taken, bytes_uploaded=visitor.taken)


async def _copy_both(visitor: _End, local: _End, half_open_timeout: float) -> _End | None:
    """Copy until both directions have ended; returns the end that failed, if one did."""
    async with asyncio.TaskGroup() as group:
        down = group.create_task(_copy(visitor, local))
        up = group.create_task(_copy(local, visitor))
        running = {down, up}
        timeout = None
        while running and not visitor.closed.done() and not (up.done() and local.failure):
            before = visitor.progress, local.progress
            done, _ = await asyncio.wait(
                {*running, visitor.closed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not done and (visitor.progress, local.progress) == before:
                break
            running -= done
            timeout = half_open_timeout
        for task in running:
            task.cancel()
    if visitor.closed.done():
        return visitor
    return local if local.failure else None


async def _copy(source: _End, sink: _End) -> None:
    """Until the source ends or one of both fails; the failure is kept there."""
    while data := await source.read():
        if not await sink.write(data):
            return
    if source.failure is None:
        sink.write_eof()


async def _close_both(visitor: _End, local: _End, timeout: float) -> None:
    """Close in good order: what is written still goes out, as long as it makes progress."""
    for end in (visitor, local):
        end.close()
    for end in (visitor, local):
        await end.wait_flushed(timeout)


def _report(failed: _End, local: _End) -> NoReturn:
    reason = _reason(failed.failure) if failed.failure else "the connection was closed"
    if failed is local:
        raise IoError(local.name, reason) from failed.failure
    raise ConnectionResetError(reason) from failed.failure


class _End:
    """One of the two connections, as both a source and a sink. Its first failure is kept, not raised."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.failure: OSError | None = None
        self.taken = 0
        """Bytes written to it."""
        self._reader = reader
        self._writer = writer
        # Never cancelled: that would cancel the future behind every wait_closed() of this writer.
        self.closed = asyncio.get_running_loop().create_task(self._wait_closed())
        """Done when the connection is gone."""

    @property
    def name(self) -> str:
        peer = self._writer.get_extra_info("peername")
        return address(*peer[:2]) if isinstance(peer, tuple) else str(peer or "the local service")

    @property
    def progress(self) -> tuple[int, int]:
        """Changes when the other side takes bytes."""
        return self.taken, self._writer.transport.get_write_buffer_size()

    async def read(self) -> bytes:
        """The next bytes; none at the end or if the connection failed."""
        try:
            return await self._reader.read(CHUNK)
        except OSError as error:
            self._fail(error)
            return b""

    async def write(self, data: bytes) -> bool:
        """Write bytes and wait until few enough are left; whether that worked."""
        if self._writer.is_closing():  # lost already, and uvloop would raise; whoever reads it will tell
            return False
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            self._fail(error)
            return False
        self.taken += len(data)
        return True

    def write_eof(self) -> None:
        """End the direction; with TLS, which has no half-close, ``close`` will."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            with contextlib.suppress(OSError):  # gone already: whoever reads it will tell
                self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    async def wait_flushed(self, timeout: float) -> None:
        """After ``close``: until it is done, or has made no progress for this many seconds."""
        progress = None
        while not self.closed.done() and progress != self.progress:
            progress = self.progress
            await asyncio.wait({self.closed}, timeout=timeout)

    def abort(self) -> None:
        """Drop the connection at once, with a TCP reset: a FIN would look like the good end of what was sent."""
        if self.closed.done():
            return
        sock = self._writer.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # the peer may have been quicker
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._writer.transport.abort()

    async def _wait_closed(self) -> None:
        try:
            await self._writer.wait_closed()
        except OSError as error:
            self._fail(error)
        except NotImplementedError:
            pass  # a pipe's protocol may be unable to tell

    def _fail(self, error: OSError) -> None:
        self.failure = self.failure or error


_LINGER_ZERO = struct.pack("ii", 1, 0)


def address(host: str, port: int) -> str:
    """How a target is named to the user."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)  # asyncio's own text is "Connect call failed ('127.0.0.1', 80)"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
