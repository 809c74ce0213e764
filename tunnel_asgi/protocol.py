"""The wire protocol as data: messages in, events out, for both roles (PROTOCOL.md 4 and 5).

No I/O, no clock, no task. A *direction* is one half of a visitor connection; each side keeps two of them,
moves each by one table, and may recycle the WebSocket when both are done. A move that has no row is illegal:
``ProtocolError`` if the peer asked for it, ``LocalProtocolError`` if we did.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import re
from dataclasses import dataclass

from tunnel_asgi.errors import LocalProtocolError, ProtocolError

__all__ = [
    "EOF",
    "RESET",
    "ClientSide",
    "Connected",
    "Data",
    "Direction",
    "Dropped",
    "Ended",
    "Event",
    "Recycled",
    "ServerSide",
    "printable",
    "without_token",
]

EOF = b""
"""The binary message that ends one direction."""

RESET = "RESET"
"""The text message that offers a WebSocket to the next visitor."""

_READ_SIDE_DONE = "RDSD"
_CONNECT = "CONNECT:"
_DROP = "DROP:"

_TOKEN = re.compile(r"eyJ[\w-]*(?:\.[\w-]*)*")  # JSON in base64 begins like this: '{"'

MAX_LOGGED = 64  # characters of a reason or connection id
MAX_TEXT = 8 * 1024  # bytes; CONNECT and DROP are one line, more is an attack on memory


@dataclass(frozen=True, slots=True)
class Connected:
    """A visitor connected. ``ip`` is None if the server sent none that parses."""

    ip: str | None
    connection_id: str | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """The next bytes of the incoming direction, never empty."""

    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Ended:
    """The incoming direction ended in good order; the other one goes on."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The visitor connection failed; the incoming direction is over, the WebSocket still good."""

    reason: str


@dataclass(frozen=True, slots=True)
class Recycled:
    """The client is ready for the next visitor."""


Event = Connected | Data | Ended | Dropped | Recycled


class Direction(enum.Enum):
    """The state of one half of a visitor connection."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and slow

    IDLE = "idle"  # no visitor
    OPEN = "open"
    DONE = "done"


class _Move(enum.Enum):
    __hash__ = object.__hash__

    CONNECT = "CONNECT"
    DATA = "data"
    EOF = "EOF"
    DROP = "DROP"
    RESET = "RESET"


_Table = dict[tuple[Direction, _Move], Direction]

# Both tables name the directions as PROTOCOL.md does; each side sends on one and receives on the other.
_SERVER_TO_CLIENT: _Table = {
    (Direction.IDLE, _Move.CONNECT): Direction.OPEN,
    (Direction.OPEN, _Move.DATA): Direction.OPEN,
    (Direction.OPEN, _Move.EOF): Direction.DONE,
    (Direction.OPEN, _Move.DROP): Direction.DONE,
    (Direction.DONE, _Move.DROP): Direction.DONE,  # the visitor half-closed first and failed later
    (Direction.DONE, _Move.RESET): Direction.IDLE,
}
_CLIENT_TO_SERVER: _Table = {
    (Direction.IDLE, _Move.CONNECT): Direction.OPEN,
    (Direction.OPEN, _Move.DATA): Direction.OPEN,
    (Direction.OPEN, _Move.EOF): Direction.DONE,
    (Direction.DONE, _Move.RESET): Direction.IDLE,
}


class _Side:
    """What both roles share: two directions and the moves between their states."""

    def __init__(self) -> None:
        self.incoming: Direction = Direction.IDLE
        self.outgoing: Direction = Direction.IDLE

    @property
    def waiting(self) -> bool:
        """No visitor is connected."""
        return self.incoming is Direction.IDLE and self.outgoing is Direction.IDLE

    @property
    def ended(self) -> bool:
        """Both directions are over: only now may the WebSocket be recycled (PROTOCOL.md 4)."""
        return self.incoming is Direction.DONE and self.outgoing is Direction.DONE

    def _receive(self, table: _Table, move: _Move) -> None:
        try:
            self.incoming = table[self.incoming, move]
        except KeyError:
            raise ProtocolError(f"received {move.value} while the direction is {self.incoming.value}") from None

    def _send(self, table: _Table, move: _Move) -> None:
        try:
            self.outgoing = table[self.outgoing, move]
        except KeyError:
            raise LocalProtocolError(f"cannot send {move.value} while the direction is {self.outgoing.value}") from None


class ClientSide(_Side):
    """The customer's process: it receives CONNECT, DROP and bytes; it sends bytes, EOF and RESET."""

    def receive_text(self, message: str) -> Event | None:
        """Read a text message; None for one that must be ignored (PROTOCOL.md 4.4 and 4.6).

        Raises:
            ProtocolError: CONNECT while a visitor is connected.
        """
        if message.startswith(_CONNECT):
            self._receive(_SERVER_TO_CLIENT, _Move.CONNECT)
            self._send(_CLIENT_TO_SERVER, _Move.CONNECT)
            return _parse_connect(message)
        if message.startswith(_DROP) and not self.waiting:
            self._receive(_SERVER_TO_CLIENT, _Move.DROP)
            return Dropped(printable(message.removeprefix(_DROP)))
        return None

    def receive_binary(self, data: bytes | bytearray) -> Data | Ended:
        """Read a binary message.

        Raises:
            ProtocolError: no visitor is connected, or the direction has ended.
        """
        if data:
            self.receive_data()
            return Data(data)
        self._receive(_SERVER_TO_CLIENT, _Move.EOF)
        return Ended()

    def receive_data(self) -> None:
        """Note that visitor bytes came. Nearly every message is of this kind, and this is its row of the table.

        Raises:
            ProtocolError: as ``receive_binary``.
        """
        if self.incoming is not Direction.OPEN:
            self._receive(_SERVER_TO_CLIENT, _Move.DATA)

    def send_data(self) -> None:
        """Note that bytes are sent (an empty message is EOF and must go through ``send_eof``)."""
        if self.outgoing is not Direction.OPEN:
            self._send(_CLIENT_TO_SERVER, _Move.DATA)

    def send_eof(self) -> bytes:
        """End the outgoing direction; returns the binary message to send."""
        self._send(_CLIENT_TO_SERVER, _Move.EOF)
        return EOF

    def send_reset(self) -> str:
        """Offer the WebSocket to the next visitor; returns the text message to send."""
        if not self.ended:
            raise LocalProtocolError("RESET needs both directions done")
        self._receive(_SERVER_TO_CLIENT, _Move.RESET)
        self._send(_CLIENT_TO_SERVER, _Move.RESET)
        return RESET


class ServerSide(_Side):
    """The tunnel server: it sends CONNECT, DROP and bytes; it receives bytes, EOF and RESET."""

    def __init__(self) -> None:
        super().__init__()
        self._dropped = False

    def receive_text(self, message: str) -> Recycled | None:
        """Read a text message; None for RDSD and unknown ones, which are ignored.

        Raises:
            ProtocolError: RESET before both directions are done, or with no visitor.
        """
        if message != RESET:
            return None
        if not self.ended:
            raise ProtocolError("received RESET before both directions were done")
        self._receive(_CLIENT_TO_SERVER, _Move.RESET)
        self._send(_SERVER_TO_CLIENT, _Move.RESET)
        self._dropped = False
        return Recycled()

    def receive_binary(self, data: bytes | bytearray) -> Data | Ended:
        """Read a binary message.

        Raises:
            ProtocolError: no visitor is connected, or the direction has ended.
        """
        if data:
            self._receive(_CLIENT_TO_SERVER, _Move.DATA)
            return Data(data)
        self._receive(_CLIENT_TO_SERVER, _Move.EOF)
        return Ended()

    def send_connect(self, ip: str, connection_id: str | None = None) -> str:
        """Hand over a visitor; returns the text message to send."""
        self._send(_SERVER_TO_CLIENT, _Move.CONNECT)
        self._receive(_CLIENT_TO_SERVER, _Move.CONNECT)
        return f"{_CONNECT} {ip}" if connection_id is None else f"{_CONNECT} {ip}, {connection_id}"

    def send_data(self) -> None:
        """Note that visitor bytes are sent."""
        self._send(_SERVER_TO_CLIENT, _Move.DATA)

    def send_eof(self) -> bytes:
        """The visitor ended its direction; returns the binary message to send."""
        self._send(_SERVER_TO_CLIENT, _Move.EOF)
        return EOF

    def send_drop(self, reason: str) -> str:
        """The visitor connection failed; returns the text message to send."""
        if self._dropped:
            raise LocalProtocolError("the visitor was dropped already")
        self._send(_SERVER_TO_CLIENT, _Move.DROP)
        self._dropped = True
        return f"{_DROP} {reason}"


def _parse_connect(message: str) -> Connected:
    ip, _, rest = message.removeprefix(_CONNECT).partition(",")
    return Connected(_parse_ip(ip.strip()), printable(rest.partition(",")[0]) or None)


def printable(text: str) -> str:
    """What the peer says, for logs: one line, of a length one can read, without the token it may quote."""
    line = text.strip()
    if not line.isprintable():
        line = "".join(character for character in line if character.isprintable())
    return without_token(line)[:MAX_LOGGED]


def without_token(text: str) -> str:
    """The text with ``***`` for each JSON Web Token, also for one that was cut off."""
    return _TOKEN.sub("***", text)


@functools.lru_cache  # visitors come back, and this is slow
def _parse_ip(text: str) -> str | None:
    address = text.partition("%")[0]  # a zone id means nothing outside the server, and may hold any text
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
