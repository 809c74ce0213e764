"""The rules without a loop: bytes in, events or a refusal out. ``test_guard`` has the long tables, for both parsers."""

from __future__ import annotations

from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel_asgi.strict import FRAMING_LIMIT, HEAD_LIMIT, BadRequest, StrictConnection, check_head, declared_length

BODY = b"hello, world"
CHUNKED = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def events(connection: StrictConnection, data: bytes) -> list[Any]:
    """What is read when these bytes come."""
    connection.receive_data(data)
    read = []
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        read.append(event)
    return read


def refusal(data: bytes, *, body_limit: int = 0) -> int:
    """The status with which they are refused."""
    connection = StrictConnection(HEAD_LIMIT, body_limit)
    with pytest.raises(h11.RemoteProtocolError):
        events(connection, data)
    return connection.refusal.value


def body_of(read: list[Any]) -> bytes:
    return b"".join(event.data for event in read if type(event) is h11.Data)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/a?b", b"/a?b"),
        (b"http://x/a", b"/a"),
        (b"HTTPS://X?b", b"/?b"),
        (b"https://x", b"/"),
    ],
)
def test_a_url_of_the_host_becomes_a_path(target: bytes, path: bytes) -> None:
    assert check_head(b"GET", target, b"1.1", [(b"host", b"x"), (b"accept", b"*/*")]) == path
    [request, _] = events(StrictConnection(HEAD_LIMIT, 0), b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nX: y\r\n\r\n")
    assert request.target == path
    assert list(request.headers) == [(b"host", b"x"), (b"x", b"y")]


@pytest.mark.parametrize(
    ("start", "headers", "reason"),
    [
        ((b"GET", b"/", b"1.2"), {b"host": b"x"}, "the only versions"),
        ((b"GET", b"/", b"1.1"), {}, "exactly one Host"),
        ((b"GET", b"/", b"1.1"), {b"host": b"x/y"}, "not a host"),
        ((b"GET", b"/", b"1.1"), {b"host": b"x", b"content-length": b"+1"}, "not one number"),
        ((b"GET", b"/", b"1.1"), {b"host": b"x", b"transfer-encoding": b"gzip"}, "chunked"),
        (
            (b"GET", b"/", b"1.1"),
            {b"host": b"x", b"content-length": b"1", b"transfer-encoding": b"chunked"},
            "exclude each other",
        ),
        ((b"CONNECT", b"x:443", b"1.1"), {b"host": b"x"}, "no proxy"),
        ((b"GET", b"http://y/", b"1.1"), {b"host": b"x"}, "neither a path nor a URL of the Host"),
    ],
)
def test_a_refusal_says_why(start: tuple[bytes, bytes, bytes], headers: dict[bytes, bytes], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        check_head(*start, headers.items())


def test_the_declared_length_is_that_of_the_head_or_0() -> None:
    assert declared_length([(b"host", b"x"), (b"content-length", b" 012 ")]) == 12
    assert declared_length([(b"host", b"x")]) == 0


def test_lengths_that_agree_are_two_all_the_same_though_h11_makes_one_of_them() -> None:
    doubled = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na"
    lenient = h11.Connection(h11.SERVER)
    lenient.receive_data(doubled)
    assert type(lenient.next_event()) is h11.Request
    assert refusal(doubled) == 400


@given(st.lists(st.integers(0, 200), max_size=8), st.booleans())
def test_any_pieces_give_the_same_request(cuts: list[int], chunked: bool) -> None:
    sized = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    data = CHUNKED + b"5\r\nhello\r\n7;a=b\r\n, world\r\n0\r\nX: y\r\n\r\n" if chunked else sized
    connection = StrictConnection(HEAD_LIMIT, len(BODY))
    ends = [*sorted(cut for cut in cuts if cut < len(data)), len(data)]
    read: list[Any] = []
    for start, end in zip([0, *ends], ends, strict=False):
        if start < end:  # no bytes would be the end of the stream
            read += events(connection, data[start:end])
    assert (read[0].method, read[0].target) == (b"POST", b"/a")
    assert body_of(read) == BODY
    assert type(read[-1]) is h11.EndOfMessage
    assert not connection.has_unparsed


@pytest.mark.parametrize("step", [1, 7, 1000, HEAD_LIMIT])
def test_a_head_is_refused_as_soon_as_it_is_too_large_or_malformed(step: int) -> None:
    connection = StrictConnection(HEAD_LIMIT, 0)
    endless = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * HEAD_LIMIT
    fitting = HEAD_LIMIT // step * step
    for start in range(0, fitting, step):
        assert not events(connection, endless[start : start + step])
    with pytest.raises(BadRequest):
        events(connection, endless[fitting : fitting + step])
    assert connection.refusal == 431
    assert refusal(b"GET / HTTP/1.1\n") == 400, "the rest of a head is not waited for"


def test_a_body_above_the_limit_is_refused_by_its_head_or_by_the_piece_that_is_too_much() -> None:
    limit = len(BODY) - 1
    assert refusal(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY), body_limit=limit) == 413
    connection = StrictConnection(HEAD_LIMIT, limit)
    assert body_of(events(connection, CHUNKED + b"5\r\nhello\r\n")) == b"hello"
    with pytest.raises(BadRequest):
        events(connection, b"7\r\n, world\r\n")
    assert connection.refusal == 413


def test_the_next_request_of_a_connection_has_a_limit_of_its_own() -> None:
    connection = StrictConnection(HEAD_LIMIT, 5)
    for _ in range(3):
        assert body_of(events(connection, CHUNKED + b"5\r\nhello\r\n0\r\n\r\n")) == b"hello"
        connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()


@pytest.mark.parametrize(
    "framing",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"5;\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n",
        b"5;" + b"e" * FRAMING_LIMIT + b"\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["bare LF", "space", "empty extension", "folded trailer", "huge extension"],
)
def test_what_surrounds_chunks_is_judged(framing: bytes) -> None:
    assert refusal(CHUNKED + framing) == 400
