from __future__ import annotations

import re
from itertools import takewhile

import pytest

from tunnel_asgi import errors
from tunnel_asgi.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    InvalidDomain,
    InvalidKey,
    InvalidServerURL,
    LifespanFailed,
    ListenerClosed,
    NoCredits,
    ServerError,
    TunnelError,
    UpgradeRefused,
)

DOMAIN = "www-shop-acme.e0.smallware.io"

RETRYABLE = {"ConnectionFailed", "ServerError", "WebSocketError", "ProtocolError"}

CLASSES: list[type[TunnelError]] = [getattr(errors, name) for name in errors.__all__]


def tree_in_the_docstring() -> dict[str, str]:
    """Class name -> name of its parent, read from the drawing at the top of the module."""
    assert errors.__doc__ is not None
    parents: dict[str, str] = {}
    path: list[str] = []
    lines = errors.__doc__.splitlines()[2:]
    for line in takewhile(str.strip, lines):
        found = re.match(r"[\s│├└─]*(\w+)", line)
        assert found is not None
        depth = found.start(1) // 4 - 1
        del path[depth:]
        if path:
            parents[found[1]] = path[-1]
        path.append(found[1])
    return parents


def refused(cls: type[UpgradeRefused], status: int, *, clock_skew: float | None = None) -> UpgradeRefused:
    return cls(status, domain=DOMAIN, key_id="k1", clock_skew=clock_skew)


def test_the_tree_at_the_top_of_the_module_is_the_class_tree() -> None:
    actual = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not TunnelError}
    assert tree_in_the_docstring() == actual


def test_every_exception_of_the_module_is_public() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_whether_dialling_again_can_help_is_a_property_of_the_class(cls: type[TunnelError]) -> None:
    assert cls.retryable is (cls.__name__ in RETRYABLE)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_only_what_the_user_gave_is_a_value_error(cls: type[TunnelError]) -> None:
    assert issubclass(cls, ValueError) is issubclass(cls, ConfigError)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            InvalidDomain("www.example", "it has no shard"),
            "'www.example' is not a tunnel domain: it has no shard; "
            "expected <service>-<name>-<customer>.<shard>.smallware.io",
        ),
        (
            InvalidDomain("www.example", "it has no shard", suffix="example.com"),
            "'www.example' is not a tunnel domain: it has no shard; "
            "expected <service>-<name>-<customer>.<shard>.example.com",
        ),
        (
            InvalidDomain("www.example", "it has no shard", suffix=None),
            "'www.example' is not a tunnel domain: it has no shard; "
            "expected <service>-<name>-<customer>.<shard>.<host name>",
        ),
        (InvalidKey("the key file k is empty"), "the key file k is empty"),
        (InvalidServerURL("ftp://x", "no"), "cannot use the tunnel server URL 'ftp://x': no"),
        (
            ConnectionFailed("wss://api.smallware.io", "timed out"),
            "cannot reach the tunnel server wss://api.smallware.io: timed out",
        ),
        (
            refused(AuthenticationFailed, 401),
            f"the tunnel server does not accept key 'k1' for {DOMAIN} (HTTP status 401): "
            "check the key, its id and the domain's customer",
        ),
        (refused(NoCredits, 402), f"no credit left for {DOMAIN} (HTTP status 402): top up the account"),
        (
            refused(BadRequest, 404),
            f"the tunnel server refused {DOMAIN} with HTTP status 404: check the domain and the server URL",
        ),
        (refused(ServerError, 503), f"the tunnel server refused {DOMAIN} with HTTP status 503"),
        (LifespanFailed(), "the application failed to start (its own message stands above)"),
        (ListenerClosed(), "the tunnel listener is closed"),
        (ListenerClosed("the pool is closed"), "the pool is closed"),
    ],
)
def test_an_error_is_one_sentence_that_names_the_guilty(error: TunnelError, sentence: str) -> None:
    assert str(error) == sentence


def test_the_facts_of_an_error_are_attributes() -> None:
    domain = InvalidDomain("www.example", "it has no shard")
    url = InvalidServerURL("ftp://x", "no")
    lost = ConnectionFailed("wss://x", "timed out")
    assert (domain.domain, domain.reason, domain.suffix) == ("www.example", "it has no shard", "smallware.io")
    assert (url.url, url.reason) == ("ftp://x", "no")
    assert (lost.url, lost.reason) == ("wss://x", "timed out")

    busy = ServerError(429, domain=DOMAIN, key_id="k1", retry_after=2.5, clock_skew=-1.0)
    assert (busy.status, busy.domain, busy.key_id) == (429, DOMAIN, "k1")
    assert (busy.retry_after, busy.clock_skew) == (2.5, -1.0)


def test_what_the_server_did_not_say_is_none() -> None:
    silent = ServerError(500, domain=DOMAIN, key_id="k1")
    assert silent.retry_after is None
    assert silent.clock_skew is None


@pytest.mark.parametrize(
    ("skew", "ending"),
    [
        (120.1, "; this machine's clock is 120 s ahead of the server's"),
        (3600.0, "; this machine's clock is 3600 s ahead of the server's"),
        (-120.1, "; this machine's clock is 120 s behind the server's"),
        (-86400.0, "; this machine's clock is 86400 s behind the server's"),
    ],
)
def test_a_wrong_clock_is_named_when_a_token_is_refused(skew: float, ending: str) -> None:
    assert str(refused(AuthenticationFailed, 401, clock_skew=skew)).endswith(ending)


@pytest.mark.parametrize("skew", [None, 0.0, 1.0, 120.0, -120.0])
def test_a_clock_within_tolerance_is_not_blamed(skew: float | None) -> None:
    assert "clock" not in str(refused(AuthenticationFailed, 403, clock_skew=skew))
