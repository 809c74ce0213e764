from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tunnel_asgi.errors import LocalProtocolError, ProtocolError
from tunnel_asgi.protocol import (
    EOF,
    MAX_LOGGED,
    RESET,
    ClientSide,
    Connected,
    Data,
    Direction,
    Dropped,
    Ended,
    Event,
    Recycled,
    ServerSide,
    printable,
)

IDLE, OPEN, DONE = Direction.IDLE, Direction.OPEN, Direction.DONE

Move = Callable[[], object]
Table = dict[tuple[str, str], str]


# The law, written out. A state is named for the directions that are over: ``eof`` and ``drop`` for the
# visitor's (server to client), ``app`` for the application's (client to server). A cell is the next state;
# ``ignored``: no event and no change; ``peer!``: ProtocolError; ``ours!``: LocalProtocolError, both without change.

CLIENT_LAW = """
            get CONNECT  get DROP  get data  get EOF  get text  send data  send EOF  send RESET
waiting     open         ignored   peer!     peer!    ignored   ours!      ours!     ours!
open        peer!        drop      open      eof      ignored   open       app       ours!
eof         peer!        drop      peer!     peer!    ignored   eof        app+eof   ours!
drop        peer!        drop      peer!     peer!    ignored   drop       app+drop  ours!
app         peer!        app+drop  app       app+eof  ignored   ours!      ours!     ours!
app+eof     peer!        app+drop  peer!     peer!    ignored   ours!      ours!     waiting
app+drop    peer!        app+drop  peer!     peer!    ignored   ours!      ours!     waiting
"""

SERVER_LAW = """
            get data  get EOF   get RESET  get text  send CONNECT  send data  send EOF  send DROP
waiting     peer!     peer!     peer!      ignored   open          ours!      ours!     ours!
open        open      app       peer!      ignored   ours!         open       eof       drop
eof         eof       app+eof   peer!      ignored   ours!         ours!      ours!     drop
drop        drop      app+drop  peer!      ignored   ours!         ours!      ours!     ours!
app         peer!     peer!     peer!      ignored   ours!         app        app+eof   app+drop
app+eof     peer!     peer!     waiting    ignored   ours!         ours!      ours!     app+drop
app+drop    peer!     peer!     waiting    ignored   ours!         ours!      ours!     ours!
"""

# state -> (the visitor's direction, the application's direction)
DIRECTIONS = {
    "waiting": (IDLE, IDLE),
    "open": (OPEN, OPEN),
    "eof": (DONE, OPEN),
    "drop": (DONE, OPEN),
    "app": (OPEN, DONE),
    "app+eof": (DONE, DONE),
    "app+drop": (DONE, DONE),
}

CLIENT_ROUTES: dict[str, tuple[str, ...]] = {
    "waiting": (),
    "open": ("get CONNECT",),
    "eof": ("get CONNECT", "get EOF"),
    "drop": ("get CONNECT", "get DROP"),
    "app": ("get CONNECT", "send EOF"),
    "app+eof": ("get CONNECT", "send EOF", "get EOF"),
    "app+drop": ("get CONNECT", "send EOF", "get DROP"),
}

SERVER_ROUTES: dict[str, tuple[str, ...]] = {
    "waiting": (),
    "open": ("send CONNECT",),
    "eof": ("send CONNECT", "send EOF"),
    "drop": ("send CONNECT", "send DROP"),
    "app": ("send CONNECT", "get EOF"),
    "app+eof": ("send CONNECT", "get EOF", "send EOF"),
    "app+drop": ("send CONNECT", "get EOF", "send DROP"),
}

# What a legal move gives: the event of what was received, the message of what is to be sent.
RESULTS: dict[str, object] = {
    "get CONNECT": Connected("192.0.2.1"),
    "get DROP": Dropped("gone"),
    "get data": Data(b"bytes"),
    "get EOF": Ended(),
    "get RESET": Recycled(),
    "send CONNECT": "CONNECT: 192.0.2.1",
    "send DROP": "DROP: gone",
    "send data": None,
    "send EOF": b"",
    "send RESET": "RESET",
}

IGNORED_TEXTS = ["", "RDSD", "HELLO: world", "connect: 192.0.2.1", "CONNECT", "CONNECTED: 192.0.2.1", "DROP", "drop: x"]
IGNORED_TEXTS += [" RESET", "RESET ", "reset", "RESET: now", "\x00", "CONNECT 192.0.2.1", " CONNECT: 192.0.2.1"]


def read_law(law: str) -> Table:
    header, *rows = law.strip("\n").splitlines()
    moves = [move.strip() for move in header.split("  ") if move.strip()]
    table: Table = {}
    for row in rows:
        state, *cells = row.split()
        table |= {(state, move): cell for move, cell in zip(moves, cells, strict=True)}
    return table


def client_moves(side: ClientSide) -> dict[str, Move]:
    return {
        "get CONNECT": lambda: side.receive_text("CONNECT: 192.0.2.1"),
        "get DROP": lambda: side.receive_text("DROP: gone"),
        "get data": lambda: side.receive_binary(b"bytes"),
        "get EOF": lambda: side.receive_binary(b""),
        "get text": lambda: side.receive_text("HELLO"),
        "send data": side.send_data,
        "send EOF": side.send_eof,
        "send RESET": side.send_reset,
    }


def server_moves(side: ServerSide) -> dict[str, Move]:
    return {
        "get data": lambda: side.receive_binary(b"bytes"),
        "get EOF": lambda: side.receive_binary(b""),
        "get RESET": lambda: side.receive_text("RESET"),
        "get text": lambda: side.receive_text("HELLO"),
        "send CONNECT": lambda: side.send_connect("192.0.2.1"),
        "send data": side.send_data,
        "send EOF": side.send_eof,
        "send DROP": lambda: side.send_drop("gone"),
    }


def client_in(state: str) -> ClientSide:
    side = ClientSide()
    for move in CLIENT_ROUTES[state]:
        client_moves(side)[move]()
    return side


def server_in(state: str) -> ServerSide:
    side = ServerSide()
    for move in SERVER_ROUTES[state]:
        server_moves(side)[move]()
    return side


def assert_in(side: ClientSide | ServerSide, state: str) -> None:
    visitors, apps = DIRECTIONS[state]
    incoming, outgoing = (visitors, apps) if isinstance(side, ClientSide) else (apps, visitors)
    assert (side.incoming, side.outgoing) == (incoming, outgoing)
    assert side.waiting is (state == "waiting")
    assert side.ended is (state in ("app+eof", "app+drop"))


def assert_move(side: ClientSide | ServerSide, make: Move, *, state: str, move: str, cell: str) -> None:
    if cell in ("peer!", "ours!"):
        with pytest.raises(ProtocolError if cell == "peer!" else LocalProtocolError):
            make()
        assert_in(side, state)
    elif cell == "ignored":
        assert make() is None
        assert_in(side, state)
    else:
        assert make() == RESULTS[move]
        assert_in(side, cell)


CLIENT_TABLE = read_law(CLIENT_LAW)
SERVER_TABLE = read_law(SERVER_LAW)


def test_the_tables_have_a_cell_for_every_state_and_move() -> None:
    assert set(CLIENT_TABLE) == {(state, move) for state in DIRECTIONS for move in client_moves(ClientSide())}
    assert set(SERVER_TABLE) == {(state, move) for state in DIRECTIONS for move in server_moves(ServerSide())}


@pytest.mark.parametrize("state", DIRECTIONS)
def test_every_state_is_reached_by_legal_moves(state: str) -> None:
    assert_in(client_in(state), state)
    assert_in(server_in(state), state)


@pytest.mark.parametrize(("state", "move"), CLIENT_TABLE)
def test_the_client_obeys_the_table(state: str, move: str) -> None:
    side = client_in(state)
    assert_move(side, client_moves(side)[move], state=state, move=move, cell=CLIENT_TABLE[state, move])


@pytest.mark.parametrize(("state", "move"), SERVER_TABLE)
def test_the_server_obeys_the_table(state: str, move: str) -> None:
    side = server_in(state)
    assert_move(side, server_moves(side)[move], state=state, move=move, cell=SERVER_TABLE[state, move])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(sorted(client_moves(ClientSide()))), max_size=40))
def test_any_walk_of_the_client_follows_the_table(walk: list[str]) -> None:
    side, state = ClientSide(), "waiting"
    for move in walk:
        cell = CLIENT_TABLE[state, move]
        assert_move(side, client_moves(side)[move], state=state, move=move, cell=cell)
        state = cell if cell in DIRECTIONS else state


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(sorted(server_moves(ServerSide()))), max_size=40))
def test_any_walk_of_the_server_follows_the_table(walk: list[str]) -> None:
    side, state = ServerSide(), "waiting"
    for move in walk:
        cell = SERVER_TABLE[state, move]
        assert_move(side, server_moves(side)[move], state=state, move=move, cell=cell)
        state = cell if cell in DIRECTIONS else state


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ClientSide().receive_binary(b"x"), "received data while the direction is idle"),
        (lambda: client_in("eof").receive_binary(b""), "received EOF while the direction is done"),
        (lambda: client_in("open").receive_text("CONNECT: x"), "received CONNECT while the direction is open"),
        (lambda: server_in("open").receive_text("RESET"), "received RESET before both directions were done"),
        (lambda: client_in("app").send_data(), "cannot send data while the direction is done"),
        (lambda: ClientSide().send_eof(), "cannot send EOF while the direction is idle"),
        (lambda: client_in("eof").send_reset(), "RESET needs both directions done"),
        (lambda: server_in("open").send_connect("x"), "cannot send CONNECT while the direction is open"),
        (lambda: server_in("drop").send_drop("x"), "the visitor was dropped already"),
    ],
)
def test_an_illegal_move_is_named_with_the_state_it_is_illegal_in(make: Move, sentence: str) -> None:
    with pytest.raises((ProtocolError, LocalProtocolError)) as caught:
        make()
    assert str(caught.value) == sentence


# Messages.


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CONNECT: 192.0.2.1", Connected("192.0.2.1")),
        ("CONNECT:192.0.2.1", Connected("192.0.2.1")),
        ("CONNECT:   192.0.2.1  ", Connected("192.0.2.1")),
        ("CONNECT: 2001:db8::1", Connected("2001:db8::1")),
        ("CONNECT: 2001:0DB8:0:0::1", Connected("2001:db8::1")),
        # The connection id is optional.
        ("CONNECT: 192.0.2.1, abc-123", Connected("192.0.2.1", "abc-123")),
        ("CONNECT: 192.0.2.1,abc-123", Connected("192.0.2.1", "abc-123")),
        ("CONNECT: 192.0.2.1,  abc 123  ", Connected("192.0.2.1", "abc 123")),
        ("CONNECT: 192.0.2.1,", Connected("192.0.2.1")),
        ("CONNECT: 192.0.2.1,  ", Connected("192.0.2.1")),
        # More fields may follow.
        ("CONNECT: 192.0.2.1, abc-123, tls1.3", Connected("192.0.2.1", "abc-123")),
        ("CONNECT: 192.0.2.1, abc-123, tls1.3, , CONNECT: 192.0.2.2", Connected("192.0.2.1", "abc-123")),
        ("CONNECT: 192.0.2.1, , tls1.3", Connected("192.0.2.1")),
        # The ip may fail to parse.
        ("CONNECT:", Connected(None)),
        ("CONNECT: ", Connected(None)),
        ("CONNECT: unknown", Connected(None)),
        ("CONNECT: unknown, abc-123", Connected(None, "abc-123")),
        ("CONNECT: , abc-123", Connected(None, "abc-123")),
        ("CONNECT: 192.0.2.256", Connected(None)),
        ("CONNECT: 192.0.2.1:443", Connected(None)),
        ("CONNECT: [2001:db8::1]", Connected(None)),
        ("CONNECT: 192.0.2.0/24", Connected(None)),
        ("CONNECT: 3221225985", Connected(None)),
        ("CONNECT: 192.0.2.1 abc-123", Connected(None)),
        ("CONNECT: %", Connected(None)),
        # A zone is the server's own business.
        ("CONNECT: fe80::1%eth0", Connected("fe80::1")),
        ("CONNECT: fe80::1%\r\nForged: log line, abc", Connected("fe80::1", "abc")),
    ],
)
def test_a_connect_is_read_for_what_can_be_known(message: str, expected: Connected) -> None:
    side = ClientSide()
    assert side.receive_text(message) == expected
    assert_in(side, "open")


TOKEN = "eyJhbGciOiJIUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJjdXN0b21lciIsInN1YiI6ImFjbWUifQ.Zm9y_Z2Vk-c2ln"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("7f3a", "7f3a"),
        ("  two words\t", "two words"),
        ("a\r\nb\x00c\x1b[31md\u2028e\u202ef", "abc[31mdef"),
        ("x" * 1000, "x" * MAX_LOGGED),
        (TOKEN, "***"),
        (f"Bearer {TOKEN}, {TOKEN}!", "Bearer ***, ***!"),
        (f"key{TOKEN}", "key***"),
        (TOKEN[:20], "***"),
        (TOKEN.replace(".", ".\n"), "***"),
        ("a" * (MAX_LOGGED - 10) + TOKEN, "a" * (MAX_LOGGED - 10) + "***"),
        ("key", "key"),
    ],
)
def test_what_the_peer_says_is_logged_as_one_short_line_without_the_token(said: str, shown: str) -> None:
    assert printable(said) == shown
    assert ClientSide().receive_text(f"CONNECT: 203.0.113.7, {said}") in (
        Connected("203.0.113.7", shown),
        Connected("203.0.113.7", printable(said.partition(",")[0])),
    )
    assert client_in("open").receive_text(f"DROP: {said}") == Dropped(shown)


@given(st.text(), st.text())
def test_no_part_of_a_token_is_ever_shown_by_what_stands_around_it(before: str, after: str) -> None:
    shown = printable(f"{before}{TOKEN}{after}")
    assert not any(part in shown for part in TOKEN.split("."))
    assert len(shown) <= MAX_LOGGED
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("DROP: reset by peer", "reset by peer"),
        ("DROP:reset by peer", "reset by peer"),
        ("DROP:   timed out \n", "timed out"),
        ("DROP: DROP: x", "DROP: x"),
        ("DROP:", ""),
    ],
)
def test_a_drop_is_read_with_its_reason(message: str, reason: str) -> None:
    assert client_in("open").receive_text(message) == Dropped(reason)


@pytest.mark.parametrize("message", [*IGNORED_TEXTS, "RESET"])
@pytest.mark.parametrize("state", DIRECTIONS)
def test_the_client_ignores_a_text_it_does_not_know(state: str, message: str) -> None:
    side = client_in(state)
    assert side.receive_text(message) is None
    assert_in(side, state)


@pytest.mark.parametrize("message", [*IGNORED_TEXTS, "CONNECT: 192.0.2.1", "DROP: x"])
@pytest.mark.parametrize("state", DIRECTIONS)
def test_the_server_ignores_rdsd_and_a_text_it_does_not_know(state: str, message: str) -> None:
    side = server_in(state)
    assert side.receive_text(message) is None
    assert_in(side, state)


def test_the_messages_are_the_published_ones() -> None:
    server = ServerSide()
    assert server.send_connect("192.0.2.1", "abc-123") == "CONNECT: 192.0.2.1, abc-123"
    assert server.send_drop("timed out") == "DROP: timed out"
    client = client_in("app+eof")
    assert client.send_reset() == RESET == "RESET"
    assert client_in("open").send_eof() == server_in("open").send_eof() == EOF == b""


@pytest.mark.parametrize("ip", ["192.0.2.1", "2001:db8::1"])
@pytest.mark.parametrize("connection_id", [None, "abc-123"])
def test_what_the_server_says_of_a_visitor_the_client_reads(ip: str, connection_id: str | None) -> None:
    message = ServerSide().send_connect(ip, connection_id)
    assert ClientSide().receive_text(message) == Connected(ip, connection_id)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_data_is_handed_on_without_a_copy(kind: type[bytes] | type[bytearray]) -> None:
    sent = kind(b"x" * 100)
    for event in (client_in("open").receive_binary(sent), server_in("open").receive_binary(sent)):
        assert isinstance(event, Data)
        assert event.data is sent


@pytest.mark.parametrize("empty", [b"", bytearray()])
def test_an_empty_binary_message_is_eof_whatever_its_type(empty: bytes | bytearray) -> None:
    assert client_in("open").receive_binary(empty) == Ended()
    assert server_in("open").receive_binary(empty) == Ended()


# A pair on a wire.


class Pair:
    """Both roles, and a queue for each direction between them. Each message carries its visitor's number."""

    def __init__(self) -> None:
        self.client = ClientSide()
        self.server = ServerSide()
        self.to_client: deque[tuple[int, str | bytes]] = deque()
        self.to_server: deque[tuple[int, str | bytes]] = deque()
        self.client_events: list[Event] = []
        self.server_events: list[Event] = []
        self.visitor = 0  # the one the server has or had last
        self.clients_visitor = 0  # the same as the client knows it

    # The server's moves.

    def connect(self) -> None:
        message = self.server.send_connect(ip_of(self.visitor + 1))
        self.visitor += 1
        self.to_client.append((self.visitor, message))

    def server_data(self, data: bytes) -> None:
        self.server.send_data()
        self.to_client.append((self.visitor, data))

    def server_eof(self) -> None:
        self.to_client.append((self.visitor, self.server.send_eof()))

    def drop(self) -> None:
        self.to_client.append((self.visitor, self.server.send_drop(f"visitor {self.visitor}")))

    # The client's moves.

    def client_data(self, data: bytes) -> None:
        self.client.send_data()
        self.to_server.append((self.clients_visitor, data))

    def client_eof(self) -> None:
        self.to_server.append((self.clients_visitor, self.client.send_eof()))

    def reset(self) -> None:
        self.to_server.append((self.clients_visitor, self.client.send_reset()))

    # The wire's moves.

    def deliver_to_client(self) -> tuple[int, Event | None]:
        visitor, message = self.to_client.popleft()
        event = receive(self.client, message)
        if isinstance(event, Connected):
            self.clients_visitor += 1
        if event is not None:
            self.client_events.append(event)
        return visitor, event

    def deliver_to_server(self) -> tuple[int, Event | None]:
        visitor, message = self.to_server.popleft()
        event = receive(self.server, message)
        if event is not None:
            self.server_events.append(event)
        return visitor, event

    def settle(self) -> None:
        """Deliver everything that is on the wire."""
        while self.to_client:
            self.deliver_to_client()
        while self.to_server:
            self.deliver_to_server()


def ip_of(visitor: int) -> str:
    return str(ipaddress.ip_address("10.0.0.0") + visitor)


def receive(side: ClientSide | ServerSide, message: str | bytes) -> Event | None:
    return side.receive_text(message) if isinstance(message, str) else side.receive_binary(message)


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def connected() -> Pair:
    pair = Pair()
    pair.connect()
    pair.settle()
    pair.client_events.clear()
    return pair


def test_a_visitor_asks_and_is_answered_and_the_websocket_waits_again(pair: Pair) -> None:
    pair.connect()
    pair.server_data(b"GET / ")
    pair.server_data(b"HTTP/1.1\r\n\r\n")
    pair.settle()
    assert pair.client_events == [Connected("10.0.0.1"), Data(b"GET / "), Data(b"HTTP/1.1\r\n\r\n")]

    pair.client_data(b"HTTP/1.1 200 OK\r\n\r\n")
    pair.client_eof()
    pair.settle()
    pair.server_eof()
    pair.settle()
    pair.reset()
    pair.settle()
    assert pair.client_events[3:] == [Ended()]
    assert pair.server_events == [Data(b"HTTP/1.1 200 OK\r\n\r\n"), Ended(), Recycled()]
    assert pair.client.waiting
    assert pair.server.waiting


def test_a_visitor_that_half_closes_first_still_gets_its_answer(connected: Pair) -> None:
    connected.server_data(b"question")
    connected.server_eof()
    connected.settle()
    assert connected.client_events == [Data(b"question"), Ended()]
    connected.client_data(b"answer")
    connected.client_eof()
    connected.reset()
    connected.settle()
    assert connected.server_events == [Data(b"answer"), Ended(), Recycled()]


def test_an_app_that_half_closes_first_still_hears_its_visitor(connected: Pair) -> None:
    connected.client_eof()
    connected.settle()
    connected.server_data(b"late ")
    connected.server_data(b"words")
    connected.server_eof()
    connected.settle()
    assert connected.client_events == [Data(b"late "), Data(b"words"), Ended()]
    connected.reset()
    connected.settle()
    assert connected.server_events == [Ended(), Recycled()]


def test_half_closes_that_cross_on_the_wire_end_the_visitor(connected: Pair) -> None:
    connected.server_eof()
    connected.client_eof()
    connected.settle()
    connected.reset()
    connected.settle()
    assert connected.client_events == [Ended()]
    assert connected.server_events == [Ended(), Recycled()]


def test_after_a_drop_the_client_still_owes_its_eof(connected: Pair) -> None:
    connected.drop()
    connected.settle()
    assert connected.client_events == [Dropped("visitor 1")]
    with pytest.raises(LocalProtocolError):
        connected.reset()
    connected.client_data(b"to nobody")
    connected.client_eof()
    connected.reset()
    connected.settle()
    assert connected.server_events == [Data(b"to nobody"), Ended(), Recycled()]


def test_a_reset_before_our_eof_is_refused_by_the_server(connected: Pair) -> None:
    connected.drop()
    connected.settle()
    connected.to_server.append((1, RESET))
    with pytest.raises(ProtocolError):
        connected.settle()


def test_a_drop_after_the_clients_eof_ends_the_visitor(connected: Pair) -> None:
    connected.client_eof()
    connected.settle()
    connected.drop()
    connected.settle()
    connected.reset()
    connected.settle()
    assert connected.client_events == [Dropped("visitor 1")]
    assert connected.server_events == [Ended(), Recycled()]


def test_a_visitor_that_half_closed_may_still_fail(connected: Pair) -> None:
    connected.server_eof()
    connected.drop()
    connected.settle()
    assert connected.client_events == [Ended(), Dropped("visitor 1")]
    connected.client_eof()
    connected.reset()
    connected.settle()
    assert connected.server.waiting


def test_a_late_drop_never_reaches_the_next_visitor(connected: Pair) -> None:
    connected.server_eof()
    connected.settle()
    connected.client_eof()
    connected.reset()
    connected.drop()  # the server has not read the RESET yet
    connected.settle()
    assert connected.client_events == [Ended()]

    connected.connect()
    connected.settle()
    assert connected.client_events == [Ended(), Connected("10.0.0.2")]
    assert connected.client.incoming is OPEN


def test_a_visitor_may_be_dropped_on_a_websocket_that_had_one_dropped_before(connected: Pair) -> None:
    for visitor in range(1, 4):
        connected.drop()
        connected.settle()
        assert connected.client_events[-1] == Dropped(f"visitor {visitor}")
        connected.client_eof()
        connected.reset()
        connected.settle()
        connected.connect()
        connected.settle()


def test_bytes_before_the_next_connect_are_a_protocol_error(connected: Pair) -> None:
    connected.server_eof()
    connected.settle()
    connected.client_eof()
    connected.reset()
    connected.settle()
    for stale in (b"stale", b""):
        with pytest.raises(ProtocolError):
            connected.client.receive_binary(stale)


def test_a_websocket_is_recycled_any_number_of_times(pair: Pair) -> None:
    endings: Sequence[Sequence[Callable[[], None]]] = [
        (pair.server_eof, pair.client_eof),
        (pair.client_eof, pair.server_eof),
        (pair.drop, pair.client_eof),
        (pair.client_eof, pair.drop),
        (pair.server_eof, pair.drop, pair.client_eof),
        (pair.server_eof, pair.client_eof, pair.drop),
    ]
    for visitor in range(1, 301):
        pair.connect()
        pair.settle()
        pair.server_data(b"in %d" % visitor)
        pair.client_data(b"out %d" % visitor)
        for end in endings[visitor % len(endings)]:
            end()
        pair.settle()
        pair.reset()
        pair.settle()
        assert pair.client.waiting
        assert pair.server.waiting
        assert pair.client_events[:2] == [Connected(ip_of(visitor)), Data(b"in %d" % visitor)]
        assert pair.server_events == [Data(b"out %d" % visitor), Ended(), Recycled()]
        pair.client_events.clear()
        pair.server_events.clear()


class Visit:
    """What happened to one visitor: what was sent and what arrived, from the visitor (in) and to it (out)."""

    def __init__(self) -> None:
        self.sent_in = self.got_in = self.sent_out = self.got_out = b""
        self.ends_in = self.ends_out = self.drops = 0


chunks = st.binary(min_size=1, max_size=4)
chatter = st.sampled_from(["HELLO: world", "", "RDSD", "PING"])


class TheWire(RuleBasedStateMachine):
    """Two sides that only do what they may, a third hand that tries what they may not, and a wire that takes its time.

    What each side may do is kept here as plain facts, apart from the module's own states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.visits = [Visit()]  # number 0 never was
        self.server_has = self.client_has = False  # a visitor
        self.server_open = self.client_open = False  # may still send
        self.server_dropped = False
        self.client_reading = False  # has not been told of the end
        self.server_reading = False

    @property
    def visit(self) -> Visit:
        return self.visits[self.pair.visitor]

    @property
    def clients_visit(self) -> Visit:
        return self.visits[self.pair.clients_visitor]

    # What the server may do.

    @precondition(lambda self: not self.server_has)
    @rule()
    def a_visitor_connects(self) -> None:
        self.pair.connect()
        self.visits.append(Visit())
        self.server_has = self.server_open = self.server_reading = True
        self.server_dropped = False

    @precondition(lambda self: self.server_open)
    @rule(data=chunks)
    def the_visitor_sends(self, data: bytes) -> None:
        self.pair.server_data(data)
        self.visit.sent_in += data

    @precondition(lambda self: self.server_open)
    @rule()
    def the_visitor_half_closes(self) -> None:
        self.pair.server_eof()
        self.server_open = False

    @precondition(lambda self: self.server_has and not self.server_dropped)
    @rule()
    def the_visitor_fails(self) -> None:
        self.pair.drop()
        self.server_open = False
        self.server_dropped = True

    @rule(text=chatter)
    def the_server_chatters(self, text: str) -> None:
        self.pair.to_client.append((self.pair.visitor, text))

    # What the client may do.

    @precondition(lambda self: self.client_open)
    @rule(data=chunks)
    def the_app_sends(self, data: bytes) -> None:
        self.pair.client_data(data)
        self.clients_visit.sent_out += data

    @precondition(lambda self: self.client_open)
    @rule()
    def the_app_half_closes(self) -> None:
        self.pair.client_eof()
        self.client_open = False

    @precondition(lambda self: self.client_has and not self.client_open and not self.client_reading)
    @rule()
    def the_client_recycles(self) -> None:
        self.pair.reset()
        self.client_has = False
        assert self.clients_visit.got_in == self.clients_visit.sent_in

    @rule(text=chatter)
    def the_client_chatters(self, text: str) -> None:
        self.pair.to_server.append((self.pair.clients_visitor, text))

    # What the wire does.

    @precondition(lambda self: self.pair.to_client)
    @rule()
    def a_message_reaches_the_client(self) -> None:
        visitor, event = self.pair.deliver_to_client()
        if event is None:
            return
        assert visitor == self.pair.clients_visitor, "an event of one visitor was seen as another's"
        if isinstance(event, Connected):
            assert event == Connected(ip_of(visitor))
            self.client_has = self.client_open = self.client_reading = True
            return
        assert self.client_has, "an event was seen after RESET"
        visit = self.visits[visitor]
        match event:
            case Data(data):
                visit.got_in += data
            case Ended():
                visit.ends_in += 1
                self.client_reading = False
            case Dropped(reason):
                assert reason == f"visitor {visitor}"
                visit.drops += 1
                self.client_reading = False
            case _:
                raise AssertionError(event)

    @precondition(lambda self: self.pair.to_server)
    @rule()
    def a_message_reaches_the_server(self) -> None:
        visitor, event = self.pair.deliver_to_server()
        if event is None:
            return
        assert visitor == self.pair.visitor, "an event of one visitor was seen as another's"
        assert self.server_has, "an event was seen after RESET"
        visit = self.visits[visitor]
        match event:
            case Data(data):
                assert self.server_reading
                visit.got_out += data
            case Ended():
                visit.ends_out += 1
                self.server_reading = False
            case Recycled():
                assert not self.server_open
                assert not self.server_reading
                assert visit.ends_out == 1
                assert visit.got_out == visit.sent_out
                self.server_has = False
            case _:
                raise AssertionError(event)

    # What neither side may do.

    @rule()
    def the_server_errs(self) -> None:
        server = self.pair.server
        self.must_fail(self.server_has, lambda: server.send_connect("192.0.2.1"))
        self.must_fail(not self.server_open, server.send_data)
        self.must_fail(not self.server_open, server.send_eof)
        self.must_fail(not self.server_has or self.server_dropped, lambda: server.send_drop("x"))

    @rule()
    def the_client_errs(self) -> None:
        client = self.pair.client
        self.must_fail(not self.client_open, client.send_data)
        self.must_fail(not self.client_open, client.send_eof)
        may_recycle = self.client_has and not self.client_open and not self.client_reading
        self.must_fail(not may_recycle, client.send_reset)

    @rule(data=chunks)
    def the_peer_of_the_server_errs(self, data: bytes) -> None:
        server = self.pair.server
        self.must_be_refused(not self.server_reading, lambda: server.receive_binary(data))
        self.must_be_refused(not self.server_reading, lambda: server.receive_binary(EOF))
        may_recycle = self.server_has and not self.server_open and not self.server_reading
        self.must_be_refused(not may_recycle, lambda: server.receive_text(RESET))

    @rule(data=chunks)
    def the_peer_of_the_client_errs(self, data: bytes) -> None:
        client = self.pair.client
        self.must_be_refused(not self.client_reading, lambda: client.receive_binary(data))
        self.must_be_refused(not self.client_reading, lambda: client.receive_binary(EOF))
        self.must_be_refused(self.client_has, lambda: client.receive_text("CONNECT: 192.0.2.1"))

    def must_fail(self, illegal: bool, move: Move) -> None:
        if illegal:
            with pytest.raises(LocalProtocolError):
                move()

    def must_be_refused(self, illegal: bool, move: Move) -> None:
        if illegal:
            with pytest.raises(ProtocolError):
                move()

    # What always holds.

    @invariant()
    def bytes_arrive_in_order_and_ends_arrive_once(self) -> None:
        for visit in self.visits:
            assert visit.sent_in.startswith(visit.got_in)
            assert visit.sent_out.startswith(visit.got_out)
            assert max(visit.ends_in, visit.ends_out, visit.drops) <= 1

    @invariant()
    def each_side_knows_whether_it_has_a_visitor(self) -> None:
        assert self.pair.client.waiting is not self.client_has
        assert self.pair.server.waiting is not self.server_has
        assert self.pair.client.ended is (self.client_has and not self.client_open and not self.client_reading)
        assert self.pair.server.ended is (self.server_has and not self.server_open and not self.server_reading)

    @invariant()
    def the_client_is_never_ahead_of_the_server(self) -> None:
        assert self.pair.visitor - 1 <= self.pair.clients_visitor <= self.pair.visitor

    def teardown(self) -> None:
        """Whatever was done, all that is on the wire is welcome."""
        while self.pair.to_client:
            self.a_message_reaches_the_client()
        while self.pair.to_server:
            self.a_message_reaches_the_server()
        self.bytes_arrive_in_order_and_ends_arrive_once()
        for visit in self.visits:
            assert (visit.got_in, visit.got_out) == (visit.sent_in, visit.sent_out)


TestTheWire = TheWire.TestCase
TestTheWire.settings = settings(
    deadline=None, max_examples=150, stateful_step_count=60, suppress_health_check=[HealthCheck.too_slow]
)


# Anything at all.

known_texts = st.sampled_from(["CONNECT:", "CONNECT: ", "CONNECT: 192.0.2.1", "DROP:", "DROP: ", RESET, "RDSD"])
messages = st.one_of(
    st.binary(max_size=8),
    st.text(max_size=20),
    known_texts,
    st.tuples(known_texts, st.text(max_size=20)).map("".join),
    st.tuples(known_texts, st.text(":,.% 0123456789abcdef\r\n", max_size=20)).map("".join),
)


@pytest.mark.parametrize("state", DIRECTIONS)
@settings(deadline=None)
@given(received=st.lists(messages, max_size=10))
def test_whatever_a_client_receives_gives_events_or_a_protocol_error(state: str, received: list[str | bytes]) -> None:
    side = client_in(state)
    for message in received:
        before = (side.incoming, side.outgoing)
        try:
            event = receive(side, message)
        except ProtocolError:
            assert (side.incoming, side.outgoing) == before
            continue
        assert event is None or isinstance(event, Connected | Data | Ended | Dropped)
        if event is None:
            assert (side.incoming, side.outgoing) == before
        if isinstance(event, Connected) and event.ip is not None:
            assert str(ipaddress.ip_address(event.ip)) == event.ip
            assert event.ip.isprintable()
        if isinstance(event, Data):
            assert event.data == message != b""


@pytest.mark.parametrize("state", DIRECTIONS)
@settings(deadline=None)
@given(received=st.lists(messages, max_size=10))
def test_whatever_a_server_receives_gives_events_or_a_protocol_error(state: str, received: list[str | bytes]) -> None:
    side = server_in(state)
    for message in received:
        before = (side.incoming, side.outgoing)
        was_ended = side.ended
        try:
            event = receive(side, message)
        except ProtocolError:
            assert (side.incoming, side.outgoing) == before
            continue
        assert event is None or isinstance(event, Data | Ended | Recycled)
        if event is None:
            assert (side.incoming, side.outgoing) == before
        if isinstance(event, Recycled):
            assert was_ended
            assert message == RESET
        if isinstance(event, Data):
            assert event.data == message != b""
