from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jwt
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.frames import OP_TEXT, Frame

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
from tunnel_asgi.relay import Relay, head, server, tunnel, visitor
from tunnel_asgi.relay.head import Refused, find_host

OTHER_NAME = TunnelDomain.parse("www-other-acme.t00.smallware.io")
REQUEST = f"GET / HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode()
NOW = 1_900_000_000
MEBIBYTE = 1024 * 1024


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
        while True:
            await ws.recv()
    return raised.value


async def received(ws: ClientConnection, size: int) -> bytes:
    """The next ``size`` bytes."""
    data = b""
    while len(data) < size:
        message = await ws.recv()
        assert isinstance(message, bytes)
        assert message, "the direction ended early"
        data += message
    return data


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
    async with serving(clients=2) as (relay, ends):
        async with visiting(relay), visiting(relay):
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


@run_async
async def test_a_held_visitor_that_has_just_left_is_passed_over() -> None:
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, visiting(relay) as gone, visiting(relay) as there:
        await relay.wait_until(held(2))
        gone.send_eof()
        await there.send(b"there")
        # Both at once: the end of one visitor and the dial; whoever is woken first, only one is there.
        async with dial(relay) as ws:
            await connected(ws)
            assert await ws.recv() == b"there"


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
            while True:
                await guest.send(b"x" * MEBIBYTE)


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


async def give_visitor(relay: Relay, ws: ClientConnection, **steps: bool) -> None:
    """Bring the one tunnel of the relay into a state: see ``STATES``."""


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
MESSAGES: dict[str, str | bytes] = {"data": b"data", "eof": b"", "reset": "RESET", "rdsd": "RDSD", "other": "HELLO: you"}


@pytest.mark.parametrize(("message", "state"), [(message, state) for message in ILLEGAL for state in ILLEGAL[message]])
@run_async
async def test_an_illegal_message_is_recorded_and_closes_the_websocket_with_1002(message: str, state: str) -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        await reach(state, relay, ws, guest)
        await ws.send(MESSAGES[message])
        close = (await closed(ws)).rcvd
        assert close is not None
        assert close.code == 1002
        assert relay.violations == [close.reason]
        assert ("RESET" if message == "reset" else f"received {message.replace('eof', 'EOF')}") in close.reason
        await relay.wait_until(lambda relay: relay.tunnels == [])


@pytest.mark.parametrize("message", ["rdsd", "other"])
@pytest.mark.parametrize("state", STATES)
@run_async
async def test_unknown_text_is_ignored_in_every_state(message: str, state: str) -> None:
    async with serving() as (relay, [ws]), visiting(relay) as guest:
        await reach(state, relay, ws, guest)
        await ws.send(MESSAGES[message])
        await (await ws.ping())
        assert relay.violations == []
        assert len(relay.tunnels) == 1


async def reach(state: str, relay: Relay, ws: ClientConnection, guest: Any) -> None:
    if state == "waiting":
        # The visitor must not be the one that changes the state.
        relay.tunnels[0]._router.withdraw(relay.tunnels[0])
