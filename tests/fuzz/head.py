"""Target: how the relay reads where a request head leads, compared with how h11 reads it."""

from __future__ import annotations

import re

import h11

from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.errors import InvalidDomain
from tunnel_asgi.relay.head import END_OF_HEAD, Refused, find_host, plain_answer

__all__ = ["check"]


def check(data: bytes) -> None:
    """Any bytes up to the end of a head."""
    head = data.partition(END_OF_HEAD)[0] + END_OF_HEAD
    try:
        host = find_host(head)
    except Refused as refused:
        _check_answer(refused)
        return
    _check_domain(host)
    hosts = _hosts_of_h11(head)
    assert hosts is None or hosts == [host], f"h11 reads {hosts}, the relay {host!r}"


def _check_answer(refused: Refused) -> None:
    """It is a whole response, and the end of the connection."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(plain_answer(refused))
    response = connection.next_event()
    assert isinstance(response, h11.Response)
    assert response.status_code == refused.status
    assert isinstance(connection.next_event(), h11.Data)
    assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert connection.their_state is h11.MUST_CLOSE


def _check_domain(host: str) -> None:
    try:
        domain = TunnelDomain.parse(host, suffix=None)
    except InvalidDomain as error:
        str(error)
        return
    assert TunnelDomain.parse(str(domain), suffix=None) == domain


def _hosts_of_h11(head: bytes) -> list[str] | None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(request, h11.Request):
        return None
    found = [value.decode("latin-1") for name, value in request.headers if name == b"host"]
    return [re.sub(r":[0-9]*\Z", "", host) for host in found]
