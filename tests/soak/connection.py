"""A visitor's connection: opened where a fault can find it, read with an eye on every byte."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from tunnel_asgi.relay.tcp import reset

__all__ = ["Answer", "Connection", "Connections", "Wrong", "check"]

END_OF_HEAD = b"\r\n\r\n"
SIP = 16 * 1024  # bytes a slow reader takes at once
SIP_PAUSE = 0.005  # seconds between two of them


class Wrong(Exception):
    """An answer that is not the one to this request. No fault excuses it."""


def check(right: bool, message: str) -> None:
    """Raise ``Wrong`` unless the answer is right."""
    if not right:
        raise Wrong(message)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One connection of a visitor. ``faults`` are those that were injected into it, by name."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", 0))  # so that it can be found before it is connected
        self.port: int = self.socket.getsockname()[1]
        self.reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, port: int) -> None:
        """Raises OSError."""
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", port))

    async def open_streams(self) -> None:
        """For HTTP; idempotent. A WebSocket client takes the ``socket`` instead."""
        if self._writer is None:
            self.reader, self._writer = await asyncio.open_connection(sock=self.socket)

    @property
    def writer(self) -> asyncio.StreamWriter:
        assert self._writer is not None
        return self._writer

    async def close(self) -> None:
        """End it in good order, whatever state it is in."""
        if self._writer is None:
            self.socket.close()
            return
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def reset(self) -> None:
        """End it with a TCP reset."""
        reset(cast(asyncio.Transport, self.writer.transport))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_answer(self, *, slowly: bool = False) -> Answer:
        """The next response.

        Raises:
            OSError, EOFError: the connection ended before it was complete.
            Wrong: it is no HTTP.
        """
        status, headers = await self.read_head()
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, await self._read_chunks())
        check("content-length" in headers, f"no length in {headers}")
        size = int(headers["content-length"])
        return Answer(status, headers, await (self._sip(size) if slowly else self.reader.readexactly(size)))

    async def read_head(self) -> tuple[int, dict[str, str]]:
        """The status and headers of the next response; raises as ``read_answer``."""
        head = await self.reader.readuntil(END_OF_HEAD)
        status_line, *lines = head.decode("latin-1").splitlines()
        version, _, rest = status_line.partition(" ")
        check(version == "HTTP/1.1", f"not a status line: {status_line!r}")
        pairs = [line.partition(":") for line in lines if line]
        return int(rest[:3]), {name.lower(): value.strip() for name, _, value in pairs}

    async def _read_chunks(self) -> bytes:
        body = bytearray()
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += await self.reader.readexactly(size)
            check(await self.reader.readexactly(2) == b"\r\n", "a chunk does not end where it should")
        check(await self.reader.readexactly(2) == b"\r\n", "there is more behind the last chunk")
        return bytes(body)

    async def _sip(self, size: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            piece = await self.reader.read(min(SIP, size - len(body)))
            if not piece:
                raise EOFError("the answer is cut off")
            body += piece
            await asyncio.sleep(SIP_PAUSE)
        return bytes(body)


class Connections:
    """Every open connection of the visitors, for those who inject faults."""

    def __init__(self) -> None:
        self._by_port: dict[int, Connection] = {}

    def __len__(self) -> int:
        return len(self._by_port)

    def add(self, connection: Connection) -> None:
        self._by_port[connection.port] = connection

    def remove(self, connection: Connection) -> None:
        if self._by_port.get(connection.port) is connection:
            del self._by_port[connection.port]

    def mark(self, port: int, fault: str) -> None:
        """The connection from this port has got the fault."""
        if port in self._by_port:
            self._by_port[port].faults.append(fault)

    def unmark(self, port: int, fault: str) -> None:
        """It did not come to that."""
        if port in self._by_port:
            self._by_port[port].faults.remove(fault)

    def mark_all(self, fault: str) -> None:
        """All of them have, also those that are only being opened."""
        for connection in self._by_port.values():
            connection.faults.append(fault)
