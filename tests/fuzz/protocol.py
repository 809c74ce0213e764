"""Target: the protocol core, each side against a peer that sends anything, and both against each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tests.fuzz.tape import Tape
from tunnel_asgi.errors import LocalProtocolError, ProtocolError
from tunnel_asgi.protocol import (
    MAX_LOGGED,
    RESET,
    ClientSide,
    Connected,
    Data,
    Direction,
    Dropped,
    Ended,
    Recycled,
    ServerSide,
)

__all__ = ["check"]

Side = ClientSide | ServerSide
TEXTS = ["CONNECT: 192.0.2.1", "CONNECT: ::1%eth0, id, more", "CONNECT:", "DROP: gone", "DROP:", RESET, "RDSD", ""]
CLIENT_MOVES: list[Callable[[ClientSide], object]] = [
    ClientSide.send_data,
    ClientSide.send_eof,
    ClientSide.send_reset,
]
SERVER_MOVES: list[Callable[[ServerSide], object]] = [
    lambda side: side.send_connect("192.0.2.1", "id"),
    ServerSide.send_data,
    ServerSide.send_eof,
    lambda side: side.send_drop("gone"),
]


def check(data: bytes) -> None:
    """The first byte says which of the three."""
    tape = Tape(data)
    tape.choose([_client_alone, _server_alone, _both])(tape)


def _client_alone(tape: Tape) -> None:
    _drive(ClientSide(), CLIENT_MOVES, tape)


def _server_alone(tape: Tape) -> None:
    _drive(ServerSide(), SERVER_MOVES, tape)


def _drive(side: Side, moves: list[Callable[..., object]], tape: Tape) -> None:
    ended = 0
    while tape:
        before = _state(side)
        try:
            event = _step(side, moves, tape)
        except (ProtocolError, LocalProtocolError):
            assert _state(side) == before, "an illegal move changed the state"
            continue
        _check_event(event)
        ended = 0 if isinstance(event, Connected | Recycled) else ended + isinstance(event, Ended)
        assert ended <= 1, "a direction ended twice"


def _step(side: Side, moves: list[Callable[..., object]], tape: Tape) -> object:
    action = tape.byte() % 4
    if action == 0:
        return side.receive_text(tape.choose(TEXTS))
    if action == 1:
        return side.receive_text(tape.chunk().decode(errors="replace"))
    if action == 2:
        return side.receive_binary(tape.chunk())
    tape.choose(moves)(side)
    return None


def _state(side: Side) -> tuple[Direction, Direction, bool, bool]:
    assert side.waiting == (side.incoming is Direction.IDLE and side.outgoing is Direction.IDLE)
    # A visitor comes and goes in both directions at once.
    assert (side.incoming is Direction.IDLE) == (side.outgoing is Direction.IDLE)
    return side.incoming, side.outgoing, side.waiting, side.ended


def _check_event(event: object) -> None:
    if isinstance(event, Data):
        assert event.data
    elif isinstance(event, Connected):
        assert event.connection_id is None or _fit_for_logs(event.connection_id)
        assert event.ip is None or _fit_for_logs(event.ip)
    elif isinstance(event, Dropped):
        assert _fit_for_logs(event.reason)


def _fit_for_logs(text: str) -> bool:
    return len(text) <= MAX_LOGGED and (text.isprintable() or not text)


def _both(tape: Tape) -> None:
    """Two sides that keep the rules, whatever is still on its way between them, never complain."""
    client, server = ClientSide(), ServerSide()
    to_client: deque[str | bytes] = deque()
    to_server: deque[str | bytes] = deque()
    while tape:
        action = tape.byte() % 4
        if action == 0 and to_client:
            _receive(client, to_client.popleft())
        elif action == 1 and to_server:
            _receive(server, to_server.popleft())
        elif action == 2:
            _send(client, to_server, tape.choose(CLIENT_SENDS))
        else:
            _send(server, to_client, tape.choose(SERVER_SENDS))
    while to_client or to_server:
        if to_client:
            _receive(client, to_client.popleft())
        if to_server:
            _receive(server, to_server.popleft())
    assert (client.incoming, client.outgoing) == (server.outgoing, server.incoming)


def _receive(side: Side, message: str | bytes) -> None:
    if isinstance(message, str):
        side.receive_text(message)
    else:
        side.receive_binary(message)


def _send(side: Side, pipe: deque[str | bytes], move: Callable[..., str | bytes]) -> None:
    try:
        pipe.append(move(side))
    except LocalProtocolError:
        return  # not now


def _client_data(side: ClientSide) -> bytes:
    side.send_data()
    return b"answer"


def _server_data(side: ServerSide) -> bytes:
    side.send_data()
    return b"question"


CLIENT_SENDS: list[Callable[[ClientSide], str | bytes]] = [
    _client_data,
    ClientSide.send_eof,
    ClientSide.send_reset,
]
SERVER_SENDS: list[Callable[[ServerSide], str | bytes]] = [
    lambda side: side.send_connect("192.0.2.1"),
    _server_data,
    ServerSide.send_eof,
    lambda side: side.send_drop("gone"),
]
