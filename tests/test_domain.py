from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunnel_asgi.domain import DEFAULT_SUFFIX, TunnelDomain
from tunnel_asgi.errors import InvalidDomain

LABEL_OF_63 = "a" * 63

parts = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=15)
host_labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
suffixes = st.lists(host_labels, min_size=1, max_size=4).map(".".join)
domain_texts = st.tuples(parts, parts, parts, parts, suffixes).map(lambda p: f"{p[0]}-{p[1]}-{p[2]}.{p[3]}.{p[4]}")

# Text that comes close to a domain: arbitrary text alone never gets past the first check.
near_misses = st.text("az09AZ-._ /:\n\x00\u212a\u00e9", max_size=12)
nearly_domains = st.lists(st.one_of(near_misses, parts), max_size=6).flatmap(
    lambda pieces: st.sampled_from([".", "-"]).map(lambda glue: glue.join(pieces))
)
nearly_first_labels = st.lists(st.one_of(near_misses, parts), min_size=2, max_size=4).map("-".join)
nearly_right = st.tuples(nearly_first_labels, st.one_of(near_misses, parts)).map(
    lambda pair: f"{pair[0]}.{pair[1]}.smallware.io"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("www-shop-acme.e0.smallware.io", TunnelDomain("www", "shop", "acme", "e0", "smallware.io")),
        ("WWW-Shop-ACME.E0.Smallware.IO", TunnelDomain("www", "shop", "acme", "e0", "smallware.io")),
        ("1-2-3.4.smallware.io", TunnelDomain("1", "2", "3", "4", "smallware.io")),
        (
            f"{'a' * 20}-{'b' * 20}-{'c' * 21}.{LABEL_OF_63}.smallware.io",
            TunnelDomain("a" * 20, "b" * 20, "c" * 21, LABEL_OF_63, "smallware.io"),
        ),
    ],
)
def test_a_good_domain_is_read_into_its_parts(text: str, expected: TunnelDomain) -> None:
    assert TunnelDomain.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "number of dot-separated labels"),
        ("www-shop-acme", "number of dot-separated labels"),
        ("www-shop-acme.e0", "number of dot-separated labels"),
        ("www-shop-acme.e0.smallware", "number of dot-separated labels"),
        ("www-shop-acme.smallware.io", "number of dot-separated labels"),
        ("www.shop-acme.e0.smallware.io", "number of dot-separated labels"),
        ("www-shop-acme.e0.smallware.io.", "number of dot-separated labels"),
        (".www-shop-acme.e0.smallware.io", "number of dot-separated labels"),
        ("www-shop-acme.e0.eu.smallware.io", "number of dot-separated labels"),
        (f"www-shop-{'a' * 55}.e0.smallware.io", "a label may have 63"),
        (f"www-shop-acme.{'a' * 64}.smallware.io", "a label may have 63"),
        ("https://www-shop-acme.e0.smallware.io", "give the host name only"),
        ("www.e0.smallware.io", "three dash-separated parts"),
        ("www-shop.e0.smallware.io", "three dash-separated parts"),
        ("www-my-shop-acme.e0.smallware.io", "three dash-separated parts"),
        ("www--shop-acme.e0.smallware.io", "three dash-separated parts"),
        ("-shop-acme.e0.smallware.io", "none may be empty"),
        ("www--acme.e0.smallware.io", "none may be empty"),
        ("www-shop-.e0.smallware.io", "none may be empty"),
        ("www-shop-acme..smallware.io", "none may be empty"),
        ("www-my_shop-acme.e0.smallware.io", "letters a-z and digits"),
        ("www-caf\u00e9-acme.e0.smallware.io", "letters a-z and digits"),
        ("www-\u212ais-acme.e0.smallware.io", "letters a-z and digits"),  # the Kelvin sign folds to k
        ("www-\u0661-acme.e0.smallware.io", "letters a-z and digits"),  # an Arabic digit
        ("www-shop-acme.e-0.smallware.io", "letters a-z and digits"),
        ("www-shop-acme.e0\n.smallware.io", "letters a-z and digits"),
        (" www-shop-acme.e0.smallware.io", "letters a-z and digits"),
        ("www-shop-acme.e0.example.com", "must end in smallware.io"),
        ("www-shop-acme.e0.smallware.io\n", "must end in smallware.io"),
        ("www-shop-acme.e0.smallware.io:443", "must end in smallware.io"),
        ("www-shop-acme.e0.smallware.io/", "must end in smallware.io"),
    ],
)
def test_the_message_names_the_part_that_is_wrong(text: str, named: str) -> None:
    with pytest.raises(InvalidDomain) as caught:
        TunnelDomain.parse(text)
    assert named in caught.value.reason
    assert caught.value.domain == text
    assert str(caught.value).startswith(f"{text!r} is not a tunnel domain: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("www-shop-acme.e0.smallware.io", "smallware.io"),
        ("www-shop-acme.e0.example.com", "example.com"),
        ("www-shop-acme.e0.localhost", "localhost"),
        ("www-shop-acme.e0.tunnels.my-company.co.uk", "tunnels.my-company.co.uk"),
        ("www-shop-acme.e0.Example.COM", "example.com"),
    ],
)
def test_without_a_suffix_any_host_name_may_follow_the_shard(text: str, suffix: str) -> None:
    assert TunnelDomain.parse(text, suffix=None).suffix == suffix


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("www-shop-acme.e0", "number of dot-separated labels"),
        ("www-shop.e0.localhost", "three dash-separated parts"),
        ("www-shop-acme.e_0.localhost", "letters a-z and digits"),
        ("www-shop-acme.e0.", "'' is not a host name"),
        ("www-shop-acme.e0.example.com.", "'example.com.' is not a host name"),
        ("www-shop-acme.e0.-example.com", "'-example.com' is not a host name"),
        ("www-shop-acme.e0.example-.com", "'example-.com' is not a host name"),
        ("www-shop-acme.e0.exam_ple.com", "'exam_ple.com' is not a host name"),
        ("www-shop-acme.e0.localhost:8000", "'localhost:8000' is not a host name"),
        ("www-shop-acme.e0.example.com\n", "is not a host name"),
        ("www-shop-acme.e0.ex\u00e4mple.com", "is not a host name"),
        (f"www-shop-acme.e0.{'a' * 64}", "a label may have 63"),
        (f"www-shop-acme.e0.{'.'.join([LABEL_OF_63] * 4)}", "the whole 253"),
    ],
)
def test_without_a_suffix_the_rest_must_still_be_a_host_name(text: str, named: str) -> None:
    with pytest.raises(InvalidDomain) as caught:
        TunnelDomain.parse(text, suffix=None)
    assert named in caught.value.reason
    assert "smallware.io" not in str(caught.value)


def test_a_name_of_253_characters_is_the_longest() -> None:
    start = "www-shop-acme.e0."
    rest = f"{LABEL_OF_63}.{LABEL_OF_63}.{LABEL_OF_63}."
    longest = start + rest + "a" * (253 - len(start) - len(rest))
    assert str(TunnelDomain.parse(longest, suffix=None)) == longest
    with pytest.raises(InvalidDomain):
        TunnelDomain.parse(longest + "a", suffix=None)


def test_a_given_suffix_is_the_only_one_allowed() -> None:
    text = "www-shop-acme.e0.tunnels.example.com"
    assert TunnelDomain.parse(text, suffix="tunnels.example.com").suffix == "tunnels.example.com"
    with pytest.raises(InvalidDomain, match="must end in other\\.example\\.com") as caught:
        TunnelDomain.parse(text, suffix="other.example.com")
    assert str(caught.value).endswith("<shard>.other.example.com")


def test_the_default_suffix_is_the_public_service() -> None:
    assert DEFAULT_SUFFIX == "smallware.io"
    with pytest.raises(InvalidDomain):
        TunnelDomain.parse("www-shop-acme.e0.example.com")


def test_a_domain_is_a_value() -> None:
    one, other = (TunnelDomain.parse(text) for text in ("www-a-b.e0.smallware.io", "WWW-A-B.E0.smallware.io"))
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.shard = "w0"  # type: ignore[misc]


@settings(deadline=None)
@given(domain_texts, st.booleans())
def test_a_parsed_domain_prints_as_it_was_written_in_lower_case(text: str, shout: bool) -> None:
    parsed = TunnelDomain.parse(text.upper() if shout else text, suffix=None)
    assert str(parsed) == text
    assert TunnelDomain.parse(str(parsed), suffix=None) == parsed


@settings(deadline=None, max_examples=500)
@given(st.one_of(st.text(), nearly_domains, nearly_right, domain_texts), st.sampled_from([None, DEFAULT_SUFFIX]))
def test_any_text_is_a_domain_or_invalid_and_nothing_else(text: str, suffix: str | None) -> None:
    try:
        parsed = TunnelDomain.parse(text, suffix=suffix)
    except InvalidDomain:
        return
    assert text.isascii()
    assert str(parsed) == text.lower()
    assert suffix is None or parsed.suffix == suffix
