from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tunnel_asgi.auth import DEFAULT_KEY_ID, AccessKey, JwtManager
from tunnel_asgi.errors import InvalidKey

SECRET = "a-secret-of-more-than-thirty-two-bytes-0123456789"
NOW = 1_700_000_000.0
MINUTE = 60.0


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_manager(clock: Clock, *, secret: str = SECRET) -> JwtManager:
    return JwtManager(AccessKey("k1", secret), "acme", clock=clock)


def claims_of(token: str, *, secret: str = SECRET) -> dict[str, Any]:
    """Checks the signature; not the times, which are the fake clock's."""
    return jwt.decode(token, secret, algorithms=["HS256"], options={"verify_exp": False, "verify_iat": False})


@pytest.mark.parametrize(
    ("text", "key_id", "customer_id", "expected"),
    [
        # No dot: the whole is the secret of the default key.
        ("sesame", None, None, ("default", "sesame")),
        ("sesame", None, "acme", ("default", "sesame")),
        ("acme", None, "acme", ("default", "acme")),
        # An explicit key id: the whole is its secret, whatever it looks like.
        ("sesame", "k1", "acme", ("k1", "sesame")),
        ("other.sesame", "k1", "acme", ("k1", "other.sesame")),
        ("acme.other.sesame", "k1", "acme", ("k1", "acme.other.sesame")),
        (".sesame.", "k1", "acme", ("k1", ".sesame.")),
        ("sesame", "k.1", None, ("k.1", "sesame")),
        ("sesame", "default", None, ("default", "sesame")),
        # <keyid>.<secret>, split at the last dot.
        ("k1.sesame", None, None, ("k1", "sesame")),
        ("k1.sesame", None, "acme", ("k1", "sesame")),
        ("k.1.sesame", None, None, ("k.1", "sesame")),
        ("k.1.sesame", None, "acme", ("k.1", "sesame")),
        ("acme.sesame", None, "acme", ("acme", "sesame")),  # one dot is never the third form
        ("acme.k1.sesame", None, None, ("acme.k1", "sesame")),  # no customer known
        ("acme.k1.sesame", None, "other", ("acme.k1", "sesame")),
        ("acmes.k1.sesame", None, "acme", ("acmes.k1", "sesame")),
        # <customer>.<keyid>.<secret>, split at the first and last dot.
        ("acme.k1.sesame", None, "acme", ("k1", "sesame")),
        ("acme.k.1.sesame", None, "acme", ("k.1", "sesame")),
        ("acme.acme.sesame", None, "acme", ("acme", "sesame")),
        # White space around the text never counts, inside it only in the third form.
        ("  sesame\r\n", None, None, ("default", "sesame")),
        ("  sesame\r\n", "k1", None, ("k1", "sesame")),
        ("\tk1.sesame\n", None, None, ("k1", "sesame")),
        ("open sesame", None, None, ("default", "open sesame")),
        ("open sesame", "k1", None, ("k1", "open sesame")),
        ("k1.open sesame", None, "acme", ("k1", "open sesame")),
        (" acme . k1 .\n ses\tame \n", None, "acme", ("k1", "sesame")),
        ("ac me.k1.sesame", None, "acme", ("k1", "sesame")),
    ],
)
def test_each_published_spelling_of_a_key_is_resolved(
    text: str, key_id: str | None, customer_id: str | None, expected: tuple[str, str]
) -> None:
    key = AccessKey.parse(text, key_id=key_id, customer_id=customer_id)
    assert (key.key_id, key.secret) == expected


@pytest.mark.parametrize(
    ("text", "key_id", "named"),
    [
        ("", None, "the access key is empty"),
        (" \r\n\t", None, "the access key is empty"),
        ("", "k1", "the access key is empty"),
        ("  ", "k1", "the access key is empty"),
        (".", None, "the access key is empty"),
        ("k1.", None, "the access key is empty"),
        ("k1. \n", None, "the access key is empty"),
        ("acme.k1.", None, "the access key is empty"),
        ("acme..", None, "the access key is empty"),
        (".sesame", None, "an empty key id"),
        ("acme..sesame", None, "an empty key id"),
        ("acme. .sesame", None, "an empty key id"),
        ("sesame", "", "an empty key id"),
    ],
)
def test_a_key_with_an_empty_part_is_refused_and_the_part_named(text: str, key_id: str | None, named: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        AccessKey.parse(text, key_id=key_id, customer_id="acme")
    assert named in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN PRIVATE KEY-----\nsesame\n-----END PRIVATE KEY-----\n",
        "-----BEGIN CERTIFICATE-----\nsesame\n-----END CERTIFICATE-----\n",
        "sesame\udcff",  # what os.environ makes of a byte that is not UTF-8
    ],
)
@pytest.mark.parametrize("key_id", [None, "k1"])
def test_a_text_that_could_never_sign_is_refused_at_once(text: str, key_id: str | None) -> None:
    with pytest.raises(InvalidKey) as caught:
        AccessKey.parse(text, key_id=key_id)
    assert "sesame" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


@settings(deadline=None)
@given(st.text(), st.none() | st.text(max_size=5), st.none() | st.text(max_size=5))
def test_any_text_is_a_key_or_invalid_and_nothing_else(text: str, key_id: str | None, customer: str | None) -> None:
    try:
        key = AccessKey.parse(text, key_id=key_id, customer_id=customer)
    except InvalidKey:
        return
    assert key.key_id
    assert key.secret
    assert JwtManager(key, "acme", clock=Clock()).get_token().count(".") == 2


@settings(deadline=None)
@given(st.from_regex(r"[a-z0-9]+(\.[a-z0-9]+)*", fullmatch=True), st.from_regex(r"[!-\-/-~]+", fullmatch=True))
def test_a_key_id_holding_dots_survives_both_dotted_spellings(key_id: str, secret: str) -> None:
    customer = "acme"
    assume(key_id.partition(".")[0] != customer)
    expected = AccessKey(key_id, secret)
    assert AccessKey.parse(f"{key_id}.{secret}", customer_id=customer) == expected
    assert AccessKey.parse(f"{customer}.{key_id}.{secret}", customer_id=customer) == expected
    assert AccessKey.parse(secret, key_id=key_id, customer_id=customer) == expected


def test_the_default_key_id_is_the_published_one() -> None:
    assert DEFAULT_KEY_ID == "default"


def test_neither_repr_nor_str_shows_the_secret() -> None:
    key = AccessKey.parse(f"k1.{SECRET}")
    manager = JwtManager(key, "acme", clock=Clock())
    token = manager.get_token()
    for text in (repr(key), str(key), repr(manager), str(manager)):
        assert "k1" in text
        assert SECRET not in text
        assert token not in text
        assert token.rpartition(".")[2] not in text
    assert repr(manager) == "JwtManager(key_id='k1', customer_id='acme')"


def test_a_token_says_what_the_protocol_demands() -> None:
    token = make_manager(Clock(NOW + 0.75)).get_token()
    assert jwt.get_unverified_header(token) == {"alg": "HS256", "typ": "JWT", "kid": "k1"}
    assert claims_of(token) == {
        "iss": "customer",
        "sub": "acme",
        "iat": int(NOW),
        "exp": int(NOW) + 30 * 60,
        "roles": ["tunnel"],
    }


def test_a_token_made_on_the_real_clock_is_valid_now() -> None:
    token = JwtManager(AccessKey("k1", SECRET), "acme").get_token()
    claims = jwt.decode(token, SECRET, algorithms=["HS256"], issuer="customer", options={"require": ["exp", "iat"]})
    assert claims["exp"] - claims["iat"] == 30 * MINUTE


def test_a_token_is_signed_with_the_secret_and_no_other() -> None:
    token = make_manager(Clock()).get_token()
    with pytest.raises(jwt.InvalidSignatureError):
        claims_of(token, secret=SECRET + "!")


def test_a_short_secret_signs_without_a_warning() -> None:
    token = make_manager(Clock(), secret="short").get_token()  # a warning would be an error here
    assert jwt.get_unverified_header(token)["kid"] == "k1"


def test_a_secret_that_is_not_ascii_signs() -> None:
    secret = "\u043a\u043b\u044e\u0447-" * 8
    assert claims_of(make_manager(Clock(), secret=secret).get_token(), secret=secret)["sub"] == "acme"


@pytest.mark.parametrize(
    ("seconds_later", "kept"),
    [
        (0.0, True),
        (0.5, True),
        (14 * MINUTE, True),
        (15 * MINUTE - 0.001, True),
        (15 * MINUTE, True),  # exactly 15 minutes remain: not less than 15
        (15 * MINUTE + 0.001, False),
        (16 * MINUTE, False),
        (30 * MINUTE, False),
        (24 * 60 * MINUTE, False),
    ],
)
def test_a_token_is_kept_until_less_than_15_minutes_remain(seconds_later: float, kept: bool) -> None:
    clock = Clock()
    manager = make_manager(clock)
    first = manager.get_token()
    clock.now += seconds_later
    second = manager.get_token()
    assert (second == first) is kept
    expected_issue = NOW if kept else clock.now
    assert claims_of(second)["iat"] == int(expected_issue)


def test_a_fraction_of_a_second_does_not_lengthen_a_token() -> None:
    clock = Clock(NOW + 0.9)
    manager = make_manager(clock)
    first = manager.get_token()
    clock.now = NOW + 15 * MINUTE
    assert manager.get_token() == first
    clock.now += 0.1
    assert manager.get_token() != first


@pytest.mark.parametrize(
    ("seconds_back", "kept"),
    [
        (0.9, True),  # still the second it was issued in
        (1.0, False),
        (MINUTE, False),
        (365 * 24 * 60 * MINUTE, False),
    ],
)
def test_a_token_from_the_future_is_replaced_when_the_clock_is_set_back(seconds_back: float, kept: bool) -> None:
    clock = Clock(NOW + 0.9)
    manager = make_manager(clock)
    first = manager.get_token()
    clock.now -= seconds_back
    second = manager.get_token()
    assert (second == first) is kept
    assert claims_of(second)["iat"] <= clock.now


def test_a_refreshed_token_replaces_the_cached_one_whatever_is_left_of_it() -> None:
    clock = Clock()
    manager = make_manager(clock)
    first = manager.get_token()
    clock.now += 1.0
    assert manager.get_token() == first
    fresh = manager.refresh_token()
    assert claims_of(fresh)["iat"] == int(NOW) + 1
    assert manager.get_token() == fresh


def test_the_first_token_may_be_a_refreshed_one() -> None:
    manager = make_manager(Clock())
    assert manager.refresh_token() == manager.get_token()


@settings(deadline=None)
@given(st.lists(st.floats(min_value=-3600, max_value=3600), max_size=30))
def test_a_token_handed_out_is_valid_for_15_to_30_minutes_whatever_the_clock_does(steps: list[float]) -> None:
    clock = Clock()
    manager = make_manager(clock)
    for step in [0.0, *steps]:
        clock.now += step
        claims = claims_of(manager.get_token())
        assert claims["iat"] <= clock.now
        assert 15 * MINUTE <= claims["exp"] - clock.now <= 30 * MINUTE


@pytest.fixture
def eager_thread_switches() -> Iterator[None]:
    """Threads change places after every few instructions, so that a missing lock shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_thread_switches")
def test_many_threads_get_one_token() -> None:
    threads = 16
    ticks = itertools.count(int(NOW))  # each look at the clock is a new second: two renewals give two tokens
    manager = JwtManager(AccessKey("k1", SECRET), "acme", clock=lambda: float(next(ticks)))
    together = threading.Barrier(threads)

    def get_token(_: int) -> str:
        together.wait(timeout=30)
        return manager.get_token()

    with ThreadPoolExecutor(threads) as pool:
        tokens = set(pool.map(get_token, range(threads)))
    assert len(tokens) == 1
