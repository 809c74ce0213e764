"""Forward a visitor to another stream, such as a local TCP port."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from tunnel_asgi.errors import IoError

__all__ = ["ForwardStats", "forward_tunnel", "forward_tunnel_tcp"]

CHUNK = 64 * 1024  # bytes read at once
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
    """Connect to ``host:port`` and forward the visitor to it; otherwise as ``forward_tunnel``.

    Raises:
        IoError: the target cannot be reached, or failed. The visitor's connection has been closed.
        ConnectionResetError: the visitor's connection failed.
    """
    try:
        local = await asyncio.open_connection(host, port)
    except OSError as error:
        writer.close()
        raise IoError(f"{host}:{port}", error.strerror or str(error)) from error
    except BaseException:
        writer.close()
        raise
    return await forward_tunnel(reader, writer, *local, half_open_timeout=half_open_timeout)


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
    direction has ended, ``half_open_timeout`` seconds without a byte end the other one too. A connection that
    fails takes the other one with it. Never holds more than a few hundred KiB, whatever the body size.

    Raises:
        IoError: the local side failed.
        ConnectionResetError: the visitor's side failed.
    """
    visitor = _End(reader, writer)
    local = _End(local_reader, local_writer)
    finished = False
    try:
        async with asyncio.TaskGroup() as group:
            down = group.create_task(_copy(visitor, local))
            up = group.create_task(_copy(local, visitor))
            await asyncio.wait({down, up}, return_when=asyncio.FIRST_COMPLETED)
            await _until_silent(up, local, half_open_timeout)
            await _until_silent(down, visitor, half_open_timeout)
        finished = True
    except* _EndFailed as failures:
        raise _translate(failures, local) from failures
    finally:
        for end in (local, visitor):
            await end.close(flush=finished)
    return ForwardStats(bytes_downloaded=visitor.received, bytes_uploaded=local.received)


class _EndFailed(Exception):
    """One end of the forwarded connection failed; which, and how."""

    def __init__(self, end: _End, error: OSError) -> None:
        super().__init__(end, error)
        self.end = end
        self.error = error


class _End:
    """A connection as both a source and a sink, that tells who failed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received = 0
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        try:
            data = await self._reader.read(CHUNK)
        except OSError as error:
            raise _EndFailed(self, error) from error
        self.received += len(data)
        return data

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise _EndFailed(self, error) from error

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):  # gone already: whoever reads it will tell
            self._writer.write_eof()

    async def close(self, *, flush: bool) -> None:
        if flush:
            self._writer.close()
        else:
            self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def __str__(self) -> str:
        peer = self._writer.get_extra_info("peername")
        return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else str(peer or "the local service")


async def _copy(source: _End, sink: _End) -> None:
    while data := await source.read():
        await sink.write(data)
    sink.write_eof()


async def _until_silent(copying: asyncio.Task[None], source: _End, timeout: float) -> None:
    while not copying.done():
        before = source.received
        await asyncio.wait({copying}, timeout=timeout)
        if source.received == before:
            copying.cancel()
            return


def _translate(failures: ExceptionGroup[_EndFailed], local: _End) -> Exception:
    failure = failures.exceptions[0]
    assert isinstance(failure, _EndFailed)  # one TaskGroup, no groups within it
    reason = failure.error.strerror or str(failure.error)
    return IoError(str(local), reason) if failure.end is local else ConnectionResetError(reason)
