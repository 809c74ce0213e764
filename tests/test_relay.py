from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import socket
import ssl
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import jwt
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidMessage, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Response

from tests.support import (
    CUSTOMER,
    DOMAIN,
    KEY_ID,
    KEYS,
    SECRET,
    dial,
    make_tls_contexts,
    make_token,
    run_async,
    serving,
    visiting,
)
from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.errors import LocalProtocolError, RelayFailed
from tunnel_asgi.relay import Relay, Tunnel, server, tunnel, visitor
from tunnel_asgi.relay.head import Refused, find_host
from tunnel_asgi.relay.router import Router
from tunnel_asgi.relay.tcp import reset

OTHER_NAME = TunnelDomain.parse("www-other-acme.t00.smallware.io")
REQUEST = f"GET / HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode()
NOW = 1_900_000_000
MEBIBYTE = 1024 * 1024
RESET_BY_VISITOR = "DROP: the visitor's connection was reset"


async def connected(ws: ClientConnection) -> str:
    """Receive CONNECT; the connection id."""
    message = await ws.recv()
    assert isinstance(message, str)
    ip, connection_id = message.removeprefix("CONNECT: ").split(", ")
    assert ip == "127.0.0.1"
    return connection_id


async def closed(ws: ClientConnection) -> ConnectionClosed:
    """Read on until the WebSocket is closed."""
    with pytest.raises(ConnectionClosed) as raised:
        await recv_for_ever(ws)
    return raised.value


async def recv_for_ever(ws: ClientConnection) -> None:
    while True:
        await ws.recv()


async def received(ws: ClientConnection, size: int) -> bytes:
    """The next ``size`` bytes."""
    data = bytearray()
    while len(data) < size:
        message = await ws.recv()
        assert isinstance(message, bytes)
        assert message, "the direction ended early"
        data += message
    return bytes(data)


async def wait_served(relay: Relay, n: int) -> None:
    await relay.wait_until(lambda relay: relay.visitors_served == n)


# Dials (PROTOCOL.md 3 and 6)


def good_claims() -> dict[str, Any]:
    return {"iss": "customer", "sub": CUSTOMER, "iat": NOW, "exp": NOW + 1800, "roles": ["tunnel"]}


def sign(
    claims: object,
    *,
    algorithm: str = "HS256",
    key_id: object = KEY_ID,
    secret: str = SECRET,
) -> str:
    headers = {} if key_id is None else {"kid": key_id}
    signer = jwt.PyJWS()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jwt.warnings.InsecureKeyLengthWarning)
        return signer.encode(json.dumps(claims).encode(), secret, algorithm=algorithm, headers=headers)


def changed(**claims: object) -> str:
    return sign({name: value for name, value in (good_claims() | claims).items() if value is not None})


@pytest.mark.parametrize(
    ("authorization", "status", "reason"),
    [
        ([], 401, "exactly one Authorization header"),
        ([f"Bearer {changed()}", f"Bearer {changed()}"], 401, "exactly one Authorization header"),
        ([f"Basic {changed()}"], 401, "bearer"),
        (["Bearer"], 401, "not a valid one"),
        (["Bearer no.token"], 401, "not a valid one"),
        ([f"Bearer {sign(good_claims(), algorithm='none', secret='')}"], 401, "not a valid one"),
        ([f"Bearer {sign(good_claims(), algorithm='HS512')}"], 401, "not a valid one"),
        ([f"Bearer {sign(good_claims(), secret='guess')}"], 401, "not a valid one"),
        ([f"Bearer {sign(good_claims(), key_id='unknown')}"], 401, "not a valid one"),
        ([f"Bearer {sign(good_claims(), key_id=None)}"], 401, "not a valid one"),
        ([f"Bearer {sign([])}"], 401, "not a valid one"),
        ([f"Bearer {changed(sub='nobody')}"], 401, "not a valid one"),
        ([f"Bearer {changed(sub=7)}"], 401, "not a valid one"),
        ([f"Bearer {changed(sub=None)}"], 401, "not a valid one"),
        ([f"Bearer {changed(iss='service')}"], 401, "not issued by a customer"),
        ([f"Bearer {changed(iss=None)}"], 401, "not issued by a customer"),
        ([f"Bearer {changed(roles=[])}"], 401, "lacks the role"),
        ([f"Bearer {changed(roles='tunnel')}"], 401, "lacks the role"),
        ([f"Bearer {changed(roles=None)}"], 401, "lacks the role"),
        ([f"Bearer {changed(exp=NOW - 30)}"], 401, "has expired"),
        ([f"Bearer {changed(exp=None)}"], 401, "must say when"),
        ([f"Bearer {changed(exp='tomorrow')}"], 401, "must say when"),
        ([f"Bearer {changed(iat=NOW + 31)}"], 401, "not valid yet"),
        ([f"Bearer {changed(iat=None)}"], 401, "must say when"),
        ([f"Bearer {changed(iat=True)}"], 401, "must say when"),
        (
            [f"Bearer {sign(good_claims() | {'sub': 'other'}, key_id='other-key', secret='open')}"],
            403,
            "another customer's",
        ),
    ],
)
@run_async
async def test_a_token_with_one_thing_wrong_is_refused_before_the_upgrade(
    authorization: list[str], status: int, reason: str
) -> None:
    async with Relay(keys=KEYS, clock=lambda: NOW) as relay:
        with pytest.raises(InvalidStatus) as raised:
            await dial(relay, additional_headers=[("Authorization", value) for value in authorization])
        response = raised.value.response
        assert response.status_code == status
        assert reason.encode() in response.body
        assert response.body.count(b"\n") == 1
        assert SECRET.encode() not in response.body
        assert (relay.dials, relay.refused, relay.tunnels) == (1, 1, [])


@pytest.mark.parametrize(
    "token",
    [changed(), changed(exp=NOW - 29), changed(iat=NOW + 30), changed(exp=NOW + 0.5), changed(aud="ignored")],
)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
@run_async
async def test_a_good_token_is_accepted_and_clocks_may_be_30_seconds_apart(token: str, scheme: str) -> None:
    async with (
        Relay(keys=KEYS, clock=lambda: NOW) as relay,
        dial(relay, additional_headers={"Authorization": f"{scheme} {token}"}),
    ):
        await relay.wait_for_waiting()
        assert (relay.dials, relay.refused) == (1, 0)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/tunnels", 404),
        (f"/{DOMAIN}", 404),
        (f"/tunnels/x/{DOMAIN}", 404),
        ("/tunnels/", 400),
        ("/tunnels/www.example.com", 400),
        (f"/tunnels/{DOMAIN}?x", 400),
    ],
)
@run_async
async def test_only_tunnels_and_a_domain_can_be_dialled(path: str, status: int) -> None:
    async with Relay(keys=KEYS) as relay:
        headers = {"Authorization": f"Bearer {make_token()}"}
        with pytest.raises(InvalidStatus) as raised:
            await connect(relay.server_url.removesuffix("/tunnels") + path, additional_headers=headers, proxy=None)
        assert raised.value.response.status_code == status


@run_async
async def test_a_domain_is_dialled_in_any_case() -> None:
    async with Relay(keys=KEYS) as relay:
        headers = {"Authorization": f"Bearer {make_token()}"}
        async with connect(f"{relay.server_url}/{str(DOMAIN).upper()}", additional_headers=headers, proxy=None):
            await relay.wait_for_waiting(domain=DOMAIN)


@run_async
async def test_a_running_websocket_outlives_its_token() -> None:
    now = [float(NOW)]
    async with Relay(keys=KEYS, domain=DOMAIN, clock=lambda: now[0]) as relay, dial(relay, token=changed()) as ws:
        await relay.wait_for_waiting()
        now[0] += 3600
        async with visiting(relay):
            await connected(ws)


@run_async
async def test_no_token_secret_or_byte_of_a_visitor_is_logged_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = make_token()
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        # The client's side logs as it likes.
        quiet = logging.Logger("quiet", level=logging.CRITICAL + 1)
        with pytest.raises(InvalidStatus):
            await dial(relay, token=token + "x", logger=quiet)
        async with dial(relay, token=token, logger=quiet) as ws, visiting(relay) as guest:
            await guest.send(b"visitor-bytes")
            connection_id = await connected(ws)
            await ws.send(b"client-bytes")
            await guest.read(len(b"client-bytes"))
            await ws.send("RESET")
            await closed(ws)
    assert connection_id in caplog.text
    assert "RESET before both directions were done" in caplog.text
    for secret in (token, SECRET, "Bearer", "visitor-bytes", "client-bytes"):
        assert secret not in caplog.text


# Routing


@run_async
async def test_connect_names_the_visitor_and_a_new_id_each_time() -> None:
    async with serving(clients=2) as (relay, ends), visiting(relay), visiting(relay):
        ids = [await connected(ws) for ws in ends]
        assert ids[0] != ids[1]
        carried = [tunnel.visitor for tunnel in relay.tunnels]
        assert [visitor.id for visitor in carried if visitor] == ids
        assert [visitor.ip for visitor in carried if visitor] == ["127.0.0.1"] * 2
        assert [tunnel.address for tunnel in relay.tunnels] == [ws.local_address for ws in ends]
        assert {tunnel.domain for tunnel in relay.tunnels} == {DOMAIN}


async def serve_once(ws: ClientConnection, request: bytes = b"?", answer: bytes = b"!") -> None:
    """Receive one request, answer, end, recycle."""
    await connected(ws)
    assert await received(ws, len(request)) == request
    await ws.send(answer)
    await ws.send(b"")
    assert await ws.recv() == b""
    await ws.send("RESET")


async def visit(relay: Relay, request: bytes = b"?") -> bytes:
    async with visiting(relay) as guest:
        await guest.send(request)
        guest.send_eof()
        return await guest.read_all()


@run_async
async def test_the_websocket_that_has_waited_longest_gets_the_visitor() -> None:
    async with serving(clients=3) as (relay, ends):
        for n, turn in enumerate([0, 1, 2, 0, 1]):
            answer = str(n).encode()
            _, got = await asyncio.gather(serve_once(ends[turn], answer=answer), visit(relay))
            assert got == answer
            await relay.wait_for_waiting(3)
        assert relay.visitors_served == 5
        assert relay.violations == []


@run_async
async def test_a_recycled_websocket_serves_the_next_visitor() -> None:
    async with serving() as (relay, [ws]):
        for _ in range(3):
            _, got = await asyncio.gather(serve_once(ws), visit(relay))
            assert got == b"!"
        await wait_served(relay, 3)


@run_async
async def test_a_held_visitor_gets_the_first_websocket_that_waits() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, visiting(relay) as first:
        await first.send(b"first")
        await relay.wait_until(held(1))
        async with visiting(relay) as second:
            await second.send(b"second")
            await relay.wait_until(held(2))
            async with dial(relay) as ws, dial(relay) as other_ws:
                await connected(ws)
                assert await ws.recv() == b"first"
                await connected(other_ws)
                assert await other_ws.recv() == b"second"


def held(n: int) -> Callable[[Relay], bool]:
    """So many visitors are held."""
    return lambda relay: relay.held == n


def answer_parts(response: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    assert int(headers[b"content-length"]) == len(body)
    return status, headers, body


@run_async
async def test_an_http_visitor_held_too_long_is_told_to_retry() -> None:
    for domain in (DOMAIN, None):
        async with serving(domain=domain, hold_timeout=0.01) as (relay, [ws]), visiting(relay) as first:
            await first.send(REQUEST)
            await connected(ws)
            async with visiting(relay) as second:
                await second.send(REQUEST)
                status, headers, body = answer_parts(await second.read_all())
            assert status == b"HTTP/1.1 503 Service Unavailable"
            assert headers[b"retry-after"] == b"5"
            assert headers[b"connection"] == b"close"
            assert body == f"every tunnel of {DOMAIN} is busy\n".encode()
            assert await ws.recv() == REQUEST
            assert relay.visitors_served == 0


@run_async
async def test_without_any_tunnel_a_single_domain_answers_502_after_the_hold() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN, hold_timeout=0.01) as relay, visiting(relay) as guest:
        await guest.send(REQUEST)
        status, _, body = answer_parts(await guest.read_all())
        assert status == b"HTTP/1.1 502 Bad Gateway"
        assert body == f"no tunnel is connected for {DOMAIN}\n".encode()


@run_async
async def test_a_visitor_that_does_not_speak_http_gets_no_http() -> None:
    domain = TunnelDomain.parse("ssh-app-acme.t00.smallware.io")
    async with Relay(keys=KEYS, domain=domain, hold_timeout=0.01) as relay, visiting(relay) as guest:
        await guest.send(b"SSH-2.0-guest\r\n")
        with pytest.raises(ConnectionResetError):
            await guest.read_all()


@pytest.mark.parametrize("leave", ["reset", "close"])
@run_async
async def test_a_visitor_that_leaves_while_it_is_held_is_forgotten(leave: str) -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        async with visiting(relay) as guest:
            await relay.wait_until(held(1))
            if leave == "reset":
                await guest.send(b"bytes")
                guest.reset()
        await relay.wait_until(held(0))
        async with dial(relay) as ws:
            _, got = await asyncio.gather(serve_once(ws), visit(relay))
            assert got == b"!"
            await wait_served(relay, 1)


class Guest:
    """What the router sees of a visitor."""

    gone = lost = rerouted = False

    def __init__(self) -> None:
        self._woken = asyncio.Event()

    async def event(self) -> None:
        await self._woken.wait()

    def wake(self) -> None:
        self._woken.set()


class End:
    """What the router sees of a tunnel."""

    domain = DOMAIN
    visitor: Guest | None = None

    def assign(self, visitor: Guest) -> None:
        self.visitor = visitor


@run_async
async def test_the_router_passes_over_a_visitor_whose_task_does_not_know_yet_that_it_left() -> None:
    held_now = asyncio.Event()
    router: Any = Router(3600, held_now.set)
    gone, there, end = Guest(), Guest(), End()
    async with asyncio.TaskGroup() as group:
        routed = []
        for guest in (gone, there):
            routed.append(group.create_task(router.route(guest, DOMAIN)))
            await held_now.wait()
            held_now.clear()
        gone.gone = True
        router.offer(end)
        gone.wake()
    assert [task.result() for task in routed] == [None, end]
    assert end.visitor is there
    assert router.held == 0


@run_async
async def test_the_router_spends_no_tunnel_on_a_visitor_lost_on_its_way_back() -> None:
    router: Any = Router(3600, lambda: None)
    lost, there, end = Guest(), Guest(), End()
    lost.lost = True
    router.offer(end)
    assert await router.route(lost, DOMAIN) is None
    assert await router.route(there, DOMAIN) is end


@run_async
async def test_the_router_keeps_a_tunnel_that_comes_as_the_time_is_up() -> None:
    router: Any = Router(3600, lambda: None)
    end = End()

    class Late(Guest):
        async def event(self) -> None:
            router.offer(end)
            raise TimeoutError

    assert await router.route(Late(), DOMAIN) is end


@run_async
async def test_the_host_header_decides_without_a_domain_and_the_head_is_replayed_unchanged() -> None:
    async with Relay(keys=KEYS) as relay, dial(relay) as ws, dial(relay, OTHER_NAME) as other_ws:
        await relay.wait_for_waiting(2)
        for name, end in ((str(DOMAIN), ws), (f"{OTHER_NAME}:8443", other_ws), (str(DOMAIN).upper(), ws)):
            request = f"POST /x HTTP/1.1\r\nA: b\r\nhOsT: \t{name} \r\nX:\r\n\r\nbody\r\n\r\nrest".encode()
            _, got = await asyncio.gather(serve_once(end, request), visit(relay, request))
            assert got == b"!"
        await relay.wait_for_waiting(1, domain=OTHER_NAME)


@run_async
async def test_a_head_may_come_byte_by_byte() -> None:
    async with serving(domain=None) as (relay, [ws]), visiting(relay) as guest:
        for n in range(len(REQUEST)):
            await guest.send(REQUEST[n : n + 1])
        await connected(ws)
        assert await received(ws, len(REQUEST)) == REQUEST


@pytest.mark.parametrize(
    ("request_head", "status", "body"),
    [
        (f"GET / HTTP/1.1\r\nHost: {OTHER_NAME}\r\n\r\n", 404, f"no tunnel is connected for {OTHER_NAME}\n"),
        ("GET / HTTP/1.1\r\nHost: <script>\r\n\r\n", 404, "this name has no tunnel\n"),
        ("GET / HTTP/1.1\r\nHost: \r\n\r\n", 404, "this name has no tunnel\n"),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n", 404, "this name has no tunnel\n"),
        ("GET / HTTP/1.1\r\nA: b\r\n\r\n", 400, "exactly one Host header is needed\n"),
        (f"GET / HTTP/1.1\r\nHost: {DOMAIN}\r\nHost: {DOMAIN}\r\n\r\n", 400, "exactly one Host header is needed\n"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "exactly one Host header is needed\n"),
        ("GET / HTTP/1.1\r\n" + "A: b\r\n" * 4096, 431, "the request head is too large\n"),
    ],
)
@run_async
async def test_a_request_without_a_tunnel_is_answered_and_quotes_nothing_but_a_domain(
    request_head: str, status: int, body: str
) -> None:
    async with serving(domain=None) as (relay, _), visiting(relay) as guest:
        await guest.send(request_head.encode())
        line, headers, got = answer_parts(await guest.read_all())
        assert line.startswith(f"HTTP/1.1 {status} ".encode())
        assert headers[b"content-type"].startswith(b"text/plain")
        assert got.decode() == body


@pytest.mark.parametrize(
    "lines",
    [
        [f"Host : {DOMAIN}"],
        [f" Host: {DOMAIN}"],
        [f"Host: {DOMAIN}", " folded"],
        [f"Host: {DOMAIN}", "no colon"],
        [f"Host: {DOMAIN}", ": no name"],
        [f"Host: {DOMAIN}", f"A: b\nHost: {DOMAIN}"],
        [f"Host: {DOMAIN}", f"A: b\rHost: {DOMAIN}"],
    ],
)
def test_a_head_that_two_parsers_could_read_differently_is_refused(lines: Sequence[str]) -> None:
    with pytest.raises(Refused) as raised:
        find_host("\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode())
    assert raised.value.status == 400


@run_async
async def test_a_request_head_has_a_deadline() -> None:
    async with serving(domain=None, head_timeout=0.01) as (relay, _), visiting(relay) as guest:
        await guest.send(REQUEST[:-1])
        line, _, _ = answer_parts(await guest.read_all())
        assert line == b"HTTP/1.1 408 Request Timeout"


@run_async
async def test_a_visitor_that_leaves_within_its_head_reaches_no_client(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tunnel_asgi.relay")
    async with serving(domain=None) as (relay, [ws]):
        async with visiting(relay) as guest:
            await guest.send(REQUEST[:-1])
            guest.send_eof()
            with pytest.raises(ConnectionResetError):
                await guest.read_all()
        async with visiting(relay) as guest:
            await guest.send(REQUEST)
            assert await connected(ws) in caplog.text
    assert "left before its request was complete" in caplog.text


@run_async
async def test_an_answer_of_the_relay_does_not_wait_for_ever_for_the_visitor_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "DISCARD_TIMEOUT", 0.01)
    async with Relay(keys=KEYS) as relay, visiting(relay) as guest:
        await guest.send(REQUEST + b"unread" * 1000)
        line, _, _ = answer_parts(await guest.read_all())
        assert line == b"HTTP/1.1 404 Not Found"
        with pytest.raises(ConnectionError):  # the guest never ends its side, the relay does
            await flood(guest.send)


# Messages (PROTOCOL.md 4)


@run_async
async def test_the_bytes_of_both_directions_arrive_in_order_and_each_direction_ends_on_its_own() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        await connected(ws)
        await guest.send(b"question")
        guest.send_eof()
        assert await received(ws, 8) == b"question"
        assert await ws.recv() == b""
        await ws.send([b"a fragmented", b" answer"])
        await ws.send(b", one more")
        assert await guest.read(22) == b"a fragmented answer, o"
        assert relay.tunnels[0].state == "open"
        await ws.send(b"")
        await relay.wait_until(lambda relay: relay.tunnels[0].state == "ended")
        assert await guest.read_all() == b"ne more"
        await ws.send("RESET")
        await relay.wait_for_waiting()
        assert relay.violations == []


@run_async
async def test_the_clients_eof_may_come_first() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        await connected(ws)
        await ws.send(b"greeting")
        await ws.send(b"")
        assert await guest.read_all() == b"greeting"
        await guest.send(b"still here")
        assert await received(ws, 10) == b"still here"
        guest.send_eof()
        assert await ws.recv() == b""
        await ws.send("RESET")
        await wait_served(relay, 1)
        await relay.wait_for_waiting()


STATES = {
    "waiting": [],
    "open": ["connect"],
    "open after data": ["connect", "data"],
    "client done": ["connect", "eof"],
    "visitor done": ["connect", "visitor eof"],
    "dropped": ["connect", "drop"],
    "ended": ["connect", "visitor eof", "eof"],
    "ended after drop": ["connect", "drop", "eof"],
    "recycled": ["connect", "visitor eof", "eof", "reset"],
    "recycled after drop": ["connect", "drop", "eof", "reset"],
}
ILLEGAL = {
    "data": ["waiting", "client done", "ended", "ended after drop", "recycled", "recycled after drop"],
    "eof": ["waiting", "client done", "ended", "ended after drop", "recycled", "recycled after drop"],
    "reset": [state for state in STATES if state not in ("ended", "ended after drop")],
}
MESSAGES: dict[str, str | bytes] = {"data": b"data", "eof": b"", "reset": "RESET"}


@asynccontextmanager
async def tunnel_in(state: str) -> AsyncIterator[tuple[Relay, ClientConnection]]:
    """A relay with one raw client, and its one tunnel in that state."""
    async with serving() as (relay, [ws]), AsyncExitStack() as stack:
        for step in STATES[state]:
            if step == "connect":
                guest = await stack.enter_async_context(visiting(relay))
                await connected(ws)
            elif step == "visitor eof":
                guest.send_eof()
                assert await ws.recv() == b""
            elif step == "drop":
                await relay.tunnels[0].drop("on purpose")
                assert await ws.recv() == "DROP: on purpose"
            else:
                await ws.send(MESSAGES[step])
        await (await ws.ping())
        yield relay, ws


@pytest.mark.parametrize(("message", "state"), [(message, state) for message in ILLEGAL for state in ILLEGAL[message]])
@run_async
async def test_an_illegal_message_is_recorded_and_closes_the_websocket_with_1002(message: str, state: str) -> None:
    async with tunnel_in(state) as (relay, ws):
        assert relay.violations == []
        await ws.send(MESSAGES[message])
        close = (await closed(ws)).rcvd
        assert close is not None
        assert close.code == 1002
        assert relay.violations == [close.reason]
        assert f"received {message.replace('eof', 'EOF').replace('reset', 'RESET')} " in close.reason
        await relay.wait_until(lambda relay: relay.tunnels == [])


@pytest.mark.parametrize("state", STATES)
@run_async
async def test_unknown_text_is_ignored_in_every_state(state: str) -> None:
    async with tunnel_in(state) as (relay, ws):
        for message in ("RDSD", "HELLO: you", "reset", " RESET", "CONNECT: 1.2.3.4", ""):
            await ws.send(message)
        await (await ws.ping())
        assert relay.violations == []
        assert len(relay.tunnels) == 1


@run_async
async def test_a_visitor_is_reset_when_its_client_breaks_the_protocol() -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest, visiting(relay) as other_guest:
        await connected(ws)
        await connected(other_ws)
        await ws.send(b"half an answ")
        await guest.read(12)
        await ws.send("RESET")
        with pytest.raises(ConnectionResetError):
            await guest.read_all()
        await other_ws.send(b"unharmed")
        assert await other_guest.read(8) == b"unharmed"


@run_async
async def test_a_client_that_goes_on_after_a_breach_still_reads_why() -> None:
    async with serving() as (relay, [ws]):
        await ws.send("RESET")
        with pytest.raises(ConnectionClosedError) as raised:
            await flood(ws.send)
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.reason == relay.violations[0]


@pytest.mark.parametrize(
    ("frame", "code"),
    [(Frame(Opcode.TEXT, b"\xff"), 1007), (Frame(Opcode.CONT, b"x"), 1002)],
)
@run_async
async def test_a_breach_of_the_websocket_protocol_is_recorded_too(frame: Frame, code: int) -> None:
    async with serving() as (relay, [ws]):
        ws.transport.write(frame.serialize(mask=True))
        close = (await closed(ws)).rcvd
        assert close is not None
        assert close.code == code
        await relay.wait_until(lambda relay: relay.tunnels == [])
        assert relay.violations == [close.reason]


@run_async
async def test_a_client_that_says_1002_is_not_blamed_for_it() -> None:
    async with serving() as (relay, [ws]):
        await ws.close(1002, "you did")
        await relay.wait_until(lambda relay: relay.tunnels == [])
        assert relay.violations == []


# The end of a visitor, and of a WebSocket


@run_async
async def test_a_failed_visitor_is_dropped_once_and_the_clients_bytes_are_swallowed_up_to_its_eof() -> None:
    async with serving() as (relay, [ws]):
        async with visiting(relay) as guest:
            await connected(ws)
            guest.reset()
            assert await ws.recv() == RESET_BY_VISITOR
        for _ in range(20):
            await ws.send(b"x" * MEBIBYTE)
        assert relay.tunnels[0].state == "open"
        await ws.send(b"")
        await ws.send("RESET")
        await relay.wait_for_waiting()
        _, got = await asyncio.gather(serve_once(ws), visit(relay))
        assert got == b"!"
        assert relay.violations == []


@run_async
async def test_a_visitor_that_fails_after_its_eof_is_dropped_when_the_answer_cannot_reach_it() -> None:
    async with serving() as (relay, [ws]):
        async with visiting(relay) as guest:
            await connected(ws)
            guest.send_eof()
            assert await ws.recv() == b""
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(flood(ws.send))
            assert await ws.recv() == RESET_BY_VISITOR
            answering.cancel()
        await ws.send(b"")
        await ws.send("RESET")
        await relay.wait_for_waiting()
        assert relay.violations == []


async def flood(send: Callable[[bytes], Awaitable[None]]) -> None:
    while True:
        await send(b"x" * MEBIBYTE)


@run_async
async def test_a_visitor_that_fails_after_the_clients_eof_is_dropped() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        await connected(ws)
        await ws.send(b"")
        assert await guest.read_all() == b""
        guest.reset()
        assert await ws.recv() == RESET_BY_VISITOR
        await ws.send("RESET")
        await relay.wait_for_waiting()


@run_async
async def test_a_visitor_that_fails_while_its_bytes_are_held_up_is_dropped_behind_them() -> None:
    async with serving() as (relay, [ws]), asyncio.TaskGroup() as group:
        async with visiting(relay) as guest:
            await connected(ws)
            ws.transport.pause_reading()
            flooding = group.create_task(flood(guest.send))
            assert await asyncio.wait([flooding], timeout=0.1) == (set(), {flooding})
            guest.reset()
            flooding.cancel()
        await ws.send(b"")  # while the relay, which cannot read on, knows nothing of the reset
        ws.transport.resume_reading()
        while (message := await ws.recv()) and isinstance(message, bytes):
            assert message.strip(b"x") == b""
        assert message in (RESET_BY_VISITOR, "DROP: the connection was aborted")
        await ws.send("RESET")
        await relay.wait_for_waiting()
        assert relay.violations == []


@run_async
async def test_after_the_close_nothing_comes_from_a_visitor_or_goes_to_it() -> None:
    async with serving() as (relay, [ws]), visiting(relay):
        await connected(ws)
        late = relay.tunnels[0].visitor
        assert late is not None
        late.close()
        late.data_received(b"late")
        late.write(b"late")
        late.write_eof()
        assert await ws.recv() == b""


def test_a_reset_copes_with_a_socket_that_is_gone_or_not_connected_any_more() -> None:
    with socket.socket() as gone:
        gone.close()
        for sock in (None, gone):
            transport = Stub(sock)
            reset(cast(asyncio.Transport, transport))
            assert transport.aborted


class Stub:
    """What ``reset`` sees of a transport."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self.aborted = False

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self._sock

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("how", ["cut", "close well", "close badly", "closed by the relay"])
@run_async
async def test_a_lost_websocket_resets_its_visitor_and_no_other(how: str) -> None:
    async with (
        serving(clients=3) as (relay, [ws, other_ws, _]),
        visiting(relay) as guest,
        visiting(relay) as other_guest,
    ):
        await connected(ws)
        await connected(other_ws)
        await ws.send(b"half an answ")
        await guest.read(12)
        if how == "cut":
            relay.tunnels[0].cut()
        elif how == "closed by the relay":
            await relay.tunnels[0].close(1001, "going away")
        else:
            await ws.close(1000 if how == "close well" else 1011)
        with pytest.raises(ConnectionResetError):
            await guest.read_all()
        await other_ws.send(b"unharmed")
        assert await other_guest.read(8) == b"unharmed"
        await wait_served(relay, 1)
        assert len(relay.tunnels) == 2


@run_async
async def test_a_client_that_closes_after_its_whole_answer_harms_nobody() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        await connected(ws)
        await ws.send(b"x" * MEBIBYTE)
        await ws.send(b"")
        _, got = await asyncio.gather(ws.close(), guest.read_all())
        assert len(got) == MEBIBYTE


@run_async
async def test_a_visitor_who_does_not_read_cannot_keep_a_lost_websocket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitor, "LINGER", 0.01)
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        guest.pause()
        await connected(ws)
        await ws.send(b"x" * 15 * MEBIBYTE)
        await ws.close()
        await relay.wait_until(lambda relay: relay.tunnels == [])
        await wait_served(relay, 1)


# Giving a visitor to another WebSocket


@pytest.mark.parametrize("code", [1000, 1001])
@run_async
async def test_a_visitor_goes_to_another_websocket_if_the_first_closes_well_before_its_first_byte(code: int) -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest:
        await guest.send(b"once ")
        connection_id = await connected(ws)
        assert await received(ws, 5) == b"once "
        await ws.close(code)
        assert await connected(other_ws) == connection_id
        assert await received(other_ws, 5) == b"once "
        await guest.send(b"more")
        assert await received(other_ws, 4) == b"more"
        await other_ws.send(b"answer")
        assert await guest.read(6) == b"answer"
        assert relay.visitors_served == 0


@run_async
async def test_a_visitor_given_back_that_nobody_else_takes_gets_an_http_answer() -> None:
    async with serving(hold_timeout=0.05) as (relay, [ws]), visiting(relay) as guest:
        await guest.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await connected(ws)
        await received(ws, 5)
        await ws.close()
        assert (await guest.read_all()).startswith(b"HTTP/1.1 502 ")


@run_async
async def test_a_visitors_eof_goes_with_it_to_another_websocket() -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest:
        await guest.send(b"all")
        guest.send_eof()
        await connected(ws)
        assert await received(ws, 3) == b"all"
        assert await ws.recv() == b""
        await ws.close()
        await serve_once(other_ws, b"all")
        assert await guest.read_all() == b"!"
        await wait_served(relay, 1)


@run_async
async def test_a_visitor_given_back_is_held_before_those_who_came_later() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as first:
        await first.send(b"first")
        await connected(ws)
        async with visiting(relay) as second:
            await second.send(b"second")
            await relay.wait_until(held(1))
            await ws.close()
            await relay.wait_until(held(2))
            async with dial(relay) as new_ws:
                await connected(new_ws)
                assert await received(new_ws, 5) == b"first"


@pytest.mark.parametrize("obstacle", ["bad close", "too many bytes", "eof", "drop"])
@run_async
async def test_a_visitor_is_not_given_to_another_websocket_after(obstacle: str) -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest:
        await connected(ws)
        if obstacle == "bad close":
            await ws.close(1011)
        elif obstacle == "too many bytes":
            await guest.send(b"x" * (tunnel.RETAIN_LIMIT + 1))
            await received(ws, tunnel.RETAIN_LIMIT + 1)
        elif obstacle == "eof":
            await ws.send(b"")
        else:
            await relay.tunnels[0].drop("on purpose")
        await ws.close()
        if obstacle == "eof":  # a good end, though an early one
            assert await guest.read_all() == b""
        else:
            with pytest.raises(ConnectionResetError):
                await guest.read_all()
        await guest.close()
        await wait_served(relay, 1)
        async with visiting(relay):
            await connected(other_ws)


@run_async
async def test_a_visitor_is_given_on_while_the_closing_handshake_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLOSE_TIMEOUT", 0.05)
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest:
        connection_id = await connected(ws)
        # The client says goodbye but keeps the TCP connection; until the relay has read that, bytes go there.
        ws.transport.pause_reading()
        ws.protocol.send_close(1001)
        ws.send_data()
        sent = 0
        async with asyncio.TaskGroup() as group:
            given_on = group.create_task(connected(other_ws))
            while not given_on.done():
                await guest.send(b"x")
                sent += 1
                await asyncio.sleep(0)
        assert given_on.result() == connection_id
        assert await received(other_ws, sent) == b"x" * sent
        ws.transport.abort()


# Back-pressure


class Pieces:
    """Sends this many bytes in pieces, and counts what it was allowed to send."""

    def __init__(self, send: Callable[[bytes], Awaitable[None]], size: int) -> None:
        self.sent = 0
        self._send = send
        self._size = size

    async def __call__(self) -> None:
        piece = b"x" * 32 * 1024
        while self.sent < self._size:
            await self._send(piece)
            self.sent += len(piece)


# What the kernel and the two ends hold for loopback connections may be some megabytes, but not this many.
PLENTY = 48 * MEBIBYTE


@run_async
async def test_a_client_that_does_not_read_stops_the_visitor_being_read_and_nothing_is_lost() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest, asyncio.TaskGroup() as group:
        await connected(ws)
        relay.tunnels[0].stall()
        pieces = Pieces(guest.send, PLENTY)
        sending = group.create_task(pieces())
        assert await asyncio.wait([sending], timeout=0.2) == (set(), {sending})
        assert pieces.sent < PLENTY / 2
        relay.tunnels[0].unstall()
        assert await received(ws, PLENTY) == b"x" * PLENTY


@run_async
async def test_a_visitor_that_does_not_read_stops_the_client_being_read_and_nothing_is_lost() -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest, asyncio.TaskGroup() as group:
        await connected(ws)
        guest.pause()
        pieces = Pieces(ws.send, PLENTY)
        sending = group.create_task(pieces())
        assert await asyncio.wait([sending], timeout=0.2) == (set(), {sending})
        assert pieces.sent < PLENTY / 2
        guest.resume()
        assert await guest.read(PLENTY) == b"x" * PLENTY


# TLS towards visitors

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    return make_tls_contexts(tmp_path_factory.mktemp("tls"))


@run_async
async def test_a_tls_visitor_is_served_and_closed_after_the_answer_is_flushed(contexts: Contexts) -> None:
    server_context, client_context = contexts
    async with serving(ssl=server_context) as (relay, [ws]):
        assert relay.url == f"https://127.0.0.1:{relay.port}"
        async with visiting(relay, ssl=client_context) as guest, asyncio.TaskGroup() as group:
            group.create_task(guest.send(b"?" * MEBIBYTE))
            await connected(ws)
            assert await received(ws, MEBIBYTE) == b"?" * MEBIBYTE
            group.create_task(Pieces(ws.send, MEBIBYTE)())
            assert await guest.read(MEBIBYTE) == b"x" * MEBIBYTE
            await ws.send(b"last")
            await ws.send(b"")
            assert await guest.read_all() == b"last"
            assert await ws.recv() == b""
        await ws.send("RESET")
        await relay.wait_for_waiting()
        await wait_served(relay, 1)


@run_async
async def test_a_tls_visitor_is_routed_by_its_host_header(contexts: Contexts) -> None:
    server_context, client_context = contexts
    async with serving(domain=None, ssl=server_context) as (relay, [ws]):
        async with visiting(relay, ssl=client_context) as guest:
            await guest.send(REQUEST)
            await connected(ws)
            assert await received(ws, len(REQUEST)) == REQUEST
        async with visiting(relay, ssl=client_context) as guest:
            await guest.send(b"nonsense\r\n\r\n")
            line, _, _ = answer_parts(await guest.read_all())
            assert line == b"HTTP/1.1 400 Bad Request"


@run_async
async def test_a_tls_visitor_that_closes_ends_its_direction_and_is_then_dropped(contexts: Contexts) -> None:
    server_context, client_context = contexts
    async with serving(ssl=server_context) as (relay, [ws]):
        async with visiting(relay, ssl=client_context) as guest:
            await connected(ws)
            await guest.send(b"bye")
            await guest.close()
        assert await received(ws, 3) == b"bye"
        assert await ws.recv() == b""
        assert await ws.recv() == "DROP: the visitor is gone"
        await ws.send(b"too late")
        await ws.send(b"")
        await ws.send("RESET")
        await relay.wait_for_waiting()


@run_async
async def test_a_failed_tls_handshake_reaches_no_client(contexts: Contexts) -> None:
    server_context, client_context = contexts
    async with serving(ssl=server_context) as (relay, [ws]):
        async with visiting(relay) as guest:
            await guest.send(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                await guest.read_all()
        async with visiting(relay, ssl=client_context) as guest:
            await guest.send(b"!")
            await connected(ws)
            assert await ws.recv() == b"!"


@run_async
async def test_aclose_ends_a_tls_handshake_that_never_does(contexts: Contexts) -> None:
    async with serving(ssl=contexts[0]) as (relay, _), visiting(relay) as guest:
        await (await dial(relay)).close()  # meanwhile the relay has seen the guest
        await relay.aclose()
        with suppress(ConnectionResetError):
            assert await guest.read_all() == b""


@run_async
async def test_many_bytes_right_behind_the_tls_handshake_are_not_lost(contexts: Contexts) -> None:
    server_context, client_context = contexts
    async with serving(clients=0, ssl=server_context) as (relay, _), visiting(relay, ssl=client_context) as guest:
        guest.writer.write(b"x" * MEBIBYTE)
        await relay.wait_until(held(1))
        async with dial(relay) as ws:
            await connected(ws)
            assert await received(ws, MEBIBYTE) == b"x" * MEBIBYTE


# The fault verbs


async def refused(relay: Relay) -> Response:
    with pytest.raises(InvalidStatus) as raised:
        await dial(relay)
    return raised.value.response


@run_async
async def test_refuse_answers_dials_with_a_status_and_headers_until_accept() -> None:
    async with Relay(keys=KEYS, clock=lambda: NOW) as relay:
        relay.refuse(503, headers={"Retry-After": "7", "Date": email.utils.formatdate(NOW - 9, usegmt=True)})
        for _ in range(3):
            response = await refused(relay)
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "7"
            assert email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp() == NOW - 9
        relay.refuse(599)
        response = await refused(relay)
        assert (response.status_code, response.reason_phrase) == (599, "Unknown")
        assert email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp() == NOW
        assert (relay.dials, relay.refused) == (4, 4)
        relay.accept()
        assert (await refused(relay)).status_code == 401  # it is judged again: the token is not of that time


@run_async
async def test_refuse_can_be_for_some_dials_only() -> None:
    async with Relay(keys=KEYS) as relay:
        relay.refuse(429, times=2)
        assert [(await refused(relay)).status_code for _ in range(2)] == [429, 429]
        async with dial(relay):
            await relay.wait_for_waiting()
        relay.refuse(402)
        assert [(await refused(relay)).status_code for _ in range(3)] == [402, 402, 402]


@run_async
async def test_delay_holds_every_upgrade_up_and_zero_ends_it() -> None:
    async with Relay(keys=KEYS) as relay:
        relay.delay(0.05)
        begin = time.monotonic()
        async with dial(relay):
            assert time.monotonic() - begin >= 0.05
        relay.delay(3600)
        with pytest.raises(TimeoutError):
            await dial(relay, open_timeout=0.01)
        relay.delay(0)
        async with dial(relay):
            pass


@run_async
async def test_hang_answers_no_upgrade_until_accept() -> None:
    async with Relay(keys=KEYS) as relay:
        relay.hang()
        with pytest.raises(TimeoutError):
            await dial(relay, open_timeout=0.01)
        async with asyncio.TaskGroup() as group:
            hanging = group.create_task(dialled(relay))
            await relay.wait_until(lambda relay: relay.dials == 2)
            assert relay.tunnels == []
            relay.accept()
        await relay.wait_for_waiting()
        await hanging.result().close()


async def dialled(relay: Relay) -> ClientConnection:
    return await dial(relay)


@run_async
async def test_cut_ends_the_tcp_connection_without_a_close_frame() -> None:
    async with serving() as (relay, [ws]):
        [one] = relay.tunnels
        one.cut()
        error = await closed(ws)
        assert error.rcvd is None
        assert isinstance(error.__cause__, ConnectionResetError)
        await relay.wait_until(lambda relay: relay.tunnels == [])
        assert one.state == "closed"
        for verb in (one.cut, one.stall, one.unstall):
            verb()  # too late, and harmless


@run_async
async def test_stall_silences_the_path_both_ways_and_unstall_loses_nothing() -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest:
        await connected(ws)
        relay.tunnels[0].stall()
        await guest.send(b"question")
        pong = await ws.ping()
        await ws.send(b"answer")
        for _ in range(10):  # the relay is alive all the while
            await (await other_ws.ping())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ws.recv()
        assert not asyncio.ensure_future(pong).done()
        relay.tunnels[0].unstall()
        assert await ws.recv() == b"question"
        assert await guest.read(6) == b"answer"
        await pong


@run_async
async def test_a_queue_that_runs_low_does_not_end_the_silence_nor_unstall_the_back_pressure() -> None:
    async with serving() as (relay, _):
        [one] = relay.tunnels
        transport, queue = one._ws.transport, one._ws.recv_messages
        one.stall()
        queue.resume()
        assert not transport.is_reading()
        queue.paused = True
        one.unstall()
        assert not transport.is_reading()
        queue.paused = False
        queue.resume()
        assert transport.is_reading()


@run_async
async def test_a_stalled_tunnel_can_be_cut_and_the_relay_can_close() -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]), visiting(relay) as guest:
        await connected(ws)
        for one in relay.tunnels:
            one.stall()
        await guest.send(b"held back")
        relay.tunnels[0].cut()
        assert (await closed(ws)).rcvd is None
        await relay.wait_until(lambda relay: len(relay.tunnels) == 1)
        await relay.aclose()
        assert (await closed(other_ws)).rcvd is None


@run_async
async def test_drop_fails_the_visitor_and_the_websocket_stays_good() -> None:
    async with serving() as (relay, [ws]):
        [one] = relay.tunnels
        with pytest.raises(LocalProtocolError):
            await one.drop("nobody there")
        async with visiting(relay) as guest:
            await connected(ws)
            await guest.send(b"bytes")
            assert await ws.recv() == b"bytes"
            await one.drop("on purpose")
            with pytest.raises(LocalProtocolError):
                await one.drop("again")
            assert await ws.recv() == "DROP: on purpose"
            with pytest.raises(ConnectionResetError):
                await guest.read_all()
        await ws.send(b"")
        await ws.send("RESET")
        await relay.wait_for_waiting()
        assert relay.violations == []


@run_async
async def test_send_raw_sends_what_no_honest_server_would() -> None:
    async with serving() as (relay, [ws]):
        for message in ("CONNECT: ", b"bytes", b"", "DROP: whom?", "CONNECT: x"):
            await relay.tunnels[0].send_raw(message)
            assert await ws.recv() == message
        assert relay.tunnels[0].state == "waiting"


@run_async
async def test_a_tunnel_closed_by_the_relay_gets_no_visitor_any_more() -> None:
    async with serving(clients=2) as (relay, [ws, other_ws]):
        async with asyncio.TaskGroup() as group:
            group.create_task(relay.tunnels[0].close(4000, "enough"))
            async with visiting(relay):
                await connected(other_ws)
        close = (await closed(ws)).rcvd
        assert close is not None
        assert (close.code, close.reason) == (4000, "enough")


@run_async
async def test_waiting_for_a_state_sees_the_shortest_one_and_hands_on_the_predicates_errors() -> None:
    async with Relay(keys=KEYS) as relay, asyncio.TaskGroup() as group:
        seen = group.create_task(relay.wait_until(lambda relay: relay.dials == 2))
        failed = group.create_task(wait_for_failure(relay))
        given_up = group.create_task(relay.wait_until(lambda relay: False))
        await (await dial(relay)).close()
        await (await dial(relay)).close()
        await relay.wait_until(lambda relay: relay.dials == 2)
        await asyncio.wait([seen, failed])
        given_up.cancel()


async def wait_for_failure(relay: Relay) -> None:
    with pytest.raises(IndexError):
        await relay.wait_until(lambda relay: relay.dials == 1 and relay.tunnels[7].state == "open")


# Life


@run_async
async def test_aclose_ends_everything_in_whatever_state_and_may_be_called_twice() -> None:
    async with AsyncExitStack() as stack:
        relay = Relay(keys=KEYS, domain=DOMAIN)
        await relay.start()
        ws, _ = [await stack.enter_async_context(dial(relay)) for _ in range(2)]
        guests = [await stack.enter_async_context(visiting(relay)) for _ in range(3)]
        await relay.wait_until(held(1))
        relay.hang()
        tunnel_port = int(relay.server_url.removesuffix("/tunnels").rpartition(":")[2])
        mute = await stack.enter_async_context(visiting(relay, port=tunnel_port))
        async with asyncio.TaskGroup() as group:
            hanging = group.create_task(fail_to_dial(relay))
            await relay.wait_until(lambda relay: relay.dials == 3)
            relay.delay(3600)
            group.create_task(fail_to_dial(relay))
            await relay.wait_until(lambda relay: relay.dials == 4)
            await relay.aclose()
            await relay.aclose()
        assert hanging.done()
        close = (await closed(ws)).rcvd
        assert close is not None
        assert (close.code, close.reason) == (1001, "the relay is closing")
        assert await mute.read_all() == b""
        for guest in guests:
            with pytest.raises(ConnectionResetError):
                await guest.read_all()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", relay.port)
        assert (relay.tunnels, relay.held) == ([], 0)


async def fail_to_dial(relay: Relay) -> None:
    with pytest.raises((InvalidStatus, InvalidMessage, OSError)):
        await dial(relay)


@run_async
async def test_a_visitor_accepted_while_the_relay_closes_is_reset() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, visiting(relay) as guest:
        relay._closed = True
        async with visiting(relay) as late:
            with pytest.raises(ConnectionResetError):
                await late.read_all()
        await relay.wait_until(held(1))
        await relay.aclose()
        with pytest.raises(ConnectionResetError):
            await guest.read_all()


@run_async
async def test_a_relay_can_be_closed_before_it_was_started() -> None:
    await Relay(keys=KEYS).aclose()


@pytest.mark.parametrize(("which", "option"), [("port", "--port"), ("tunnel_port", "--tunnel-port")])
@run_async
async def test_a_taken_port_is_named_together_with_the_option_to_change_it(which: str, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RelayFailed) as raised:
            await Relay(keys=KEYS, **{which: port}).start()
        assert (
            str(raised.value) == f"port {port} on 127.0.0.1 is taken: choose another with {option} (0 = any free one)"
        )
        assert isinstance(raised.value.__cause__, OSError)


@run_async
async def test_a_host_of_another_machine_is_refused_with_the_reason() -> None:
    with pytest.raises(RelayFailed, match=r"cannot listen on port 0 of 192\.0\.2\.1: .+"):
        await Relay(keys=KEYS, host="192.0.2.1").start()


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")]
)
@run_async
async def test_the_urls_reach_the_relay_from_this_machine(host: str, url: str) -> None:
    try:
        relay = Relay(keys=KEYS, domain=DOMAIN, host=host)
        await relay.start()
    except RelayFailed:
        pytest.skip(f"this machine has no {host}")
    try:
        assert relay.url == f"{url}{relay.port}"
        async with dial(relay):
            await relay.wait_for_waiting()
    finally:
        await relay.aclose()


@pytest.mark.parametrize("name", ["run", "carry", "_judge_dial"])
@run_async
async def test_a_bug_of_the_relay_itself_is_logged(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: object) -> None:
        raise ZeroDivisionError

    def broken_now(*args: object) -> None:
        raise ZeroDivisionError

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        if name == "_judge_dial":
            monkeypatch.setattr(relay, name, broken_now)
            assert (await refused(relay)).status_code == 500
        else:
            monkeypatch.setattr(Tunnel, name, broken)
            async with dial(relay) as ws, visiting(relay) as guest:
                if name == "run":
                    assert isinstance(await closed(ws), ConnectionClosedError)
                else:
                    with pytest.raises(ConnectionResetError):
                        await guest.read_all()
    assert "ZeroDivisionError" in caplog.text


def test_it_runs_on_uvloop_too() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def visit_and_reset() -> None:
        async with asyncio.timeout(10), serving() as (relay, [ws]):
            _, got = await asyncio.gather(serve_once(ws), visit(relay))
            assert got == b"!"
            await relay.wait_for_waiting()
            async with visiting(relay) as guest:
                await connected(ws)
                relay.tunnels[0].stall()
                relay.tunnels[0].unstall()
                relay.tunnels[0].cut()
                with pytest.raises(ConnectionResetError):
                    await guest.read_all()

    uvloop.run(visit_and_reset())
