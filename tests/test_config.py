from __future__ import annotations

import dataclasses
import datetime
import math
import os
import pickle
import ssl
import traceback
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from tunnel_asgi.auth import AccessKey
from tunnel_asgi.config import DEFAULT_SERVER_URL, PublicURL, TunnelConfig, read_key_file
from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.errors import ConfigError, InvalidDomain, InvalidKey, InvalidServerURL, TunnelError

DOMAIN = "www-shop-acme.e0.smallware.io"
KEY = "k1.sesame"


def make_config(**changes: Any) -> TunnelConfig:
    return TunnelConfig(**({"domain": DOMAIN, "key": KEY} | changes))


class Authority:
    """A throwaway certificate authority."""

    def __init__(self, name: str) -> None:
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = self.key.public_key()
        self.certificate = (
            self._builder(self.name, public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(self, subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .issuer_name(self.name)
            .subject_name(subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )

    def write(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def server_context(self, path: Path, host: str) -> ssl.SSLContext:
        """The server side for ``host``; ``path`` is where the chain may be written."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(x509.Name([]), key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def shake_hands(client_context: ssl.SSLContext, server_context: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory; raises what the client would."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    assert not waiting


# What a configuration says.


def test_a_domain_and_a_key_are_enough() -> None:
    config = TunnelConfig(DOMAIN, key=KEY)
    assert config.tunnel_domain == TunnelDomain.parse(DOMAIN)
    assert config.access_key == AccessKey("k1", "sesame")
    assert config.server_url == DEFAULT_SERVER_URL
    assert (config.server_uri.host, config.server_uri.port, config.server_uri.secure) == ("api.smallware.io", 443, True)


def test_only_the_domain_is_positional() -> None:
    with pytest.raises(TypeError):
        TunnelConfig(DOMAIN, KEY)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"key": "sesame"}, AccessKey("default", "sesame")),
        ({"key": "k.1.sesame"}, AccessKey("k.1", "sesame")),
        ({"key": "acme.k1.sesame"}, AccessKey("k1", "sesame")),  # acme is the domain's customer
        ({"key": "other.k1.sesame"}, AccessKey("other.k1", "sesame")),
        ({"key": "acme.k1.sesame", "key_id": "k2"}, AccessKey("k2", "acme.k1.sesame")),
    ],
)
def test_the_key_is_resolved_with_the_customer_of_the_domain(changes: dict[str, Any], expected: AccessKey) -> None:
    assert make_config(**changes).access_key == expected


@pytest.mark.parametrize(
    ("server_url", "domain", "expected"),
    [
        (DEFAULT_SERVER_URL, DOMAIN, f"wss://api.smallware.io/tunnels/{DOMAIN}"),
        (DEFAULT_SERVER_URL, DOMAIN.upper(), f"wss://api.smallware.io/tunnels/{DOMAIN}"),
        (DEFAULT_SERVER_URL + "/", DOMAIN, f"wss://api.smallware.io/tunnels/{DOMAIN}"),
        ("wss://relay.example", DOMAIN, f"wss://relay.example/{DOMAIN}"),
        ("wss://relay.example:8443/", DOMAIN, f"wss://relay.example:8443/{DOMAIN}"),
        ("wss://relay.example/a/b//", DOMAIN, f"wss://relay.example/a/b/{DOMAIN}"),
        ("ws://[::1]:8000", "www-a-b.t00.localhost", "ws://[::1]:8000/www-a-b.t00.localhost"),
    ],
)
def test_the_websockets_are_opened_at_the_server_url_and_the_domain(
    server_url: str, domain: str, expected: str
) -> None:
    assert make_config(server_url=server_url, domain=domain).dial_url == expected


@pytest.mark.parametrize("server_url", [DEFAULT_SERVER_URL, DEFAULT_SERVER_URL + "/"])
def test_the_public_server_serves_its_own_suffix_only(server_url: str) -> None:
    with pytest.raises(InvalidDomain, match=r"must end in smallware\.io, unless another tunnel server is given"):
        make_config(server_url=server_url, domain="www-shop-acme.e0.example.com")


def test_another_server_may_have_any_suffix() -> None:
    config = make_config(server_url="wss://relay.example", domain="www-shop-acme.e0.tunnels.example")
    assert config.tunnel_domain.suffix == "tunnels.example"


# What cannot work.


@pytest.mark.parametrize(
    ("changes", "cls", "named"),
    [
        ({"domain": ""}, ConfigError, "or --local to try it without an account"),
        ({"domain": "www.example"}, InvalidDomain, "expected <service>-<name>-<customer>.<shard>.smallware.io"),
        ({"key": ""}, InvalidKey, "set SMALLWARE_KEY or use --key-file (in Python: key=...)"),
        ({"key": "  "}, InvalidKey, "set SMALLWARE_KEY or use --key-file"),
        ({"key": ".sesame"}, InvalidKey, "expected SECRET or <keyid>.<secret>"),
        ({"key_id": ""}, InvalidKey, "an empty key id"),
        ({"server_url": ""}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "relay.example"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "https://relay.example"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss://"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss:///tunnels"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss://relay.example:x"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss://relay.example:65536"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss://[::1"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss://relay.example#x"}, InvalidServerURL, "expected ws:// or wss:// and a host"),
        ({"server_url": "wss://relay.example#"}, InvalidServerURL, "must not hold a query or fragment"),
        ({"server_url": "wss://relay.example?x=1"}, InvalidServerURL, "must not hold a query or fragment"),
        ({"server_url": "wss://relay.example?"}, InvalidServerURL, "must not hold a query or fragment"),
        ({"server_url": "wss://relay.example "}, InvalidServerURL, "must not hold white space"),
        ({"server_url": " wss://relay.example"}, InvalidServerURL, "must not hold white space"),
        ({"server_url": "wss://relay.example/\r\nX-Header: 1"}, InvalidServerURL, "must not hold white space"),
        ({"server_url": "wss://relay\x00.example"}, InvalidServerURL, "must not hold white space"),
        ({"server_url": "ws://relay.example"}, InvalidServerURL, "use wss://, or --allow-insecure-server"),
        ({"open_timeout": 0}, ConfigError, "open_timeout must be more than 0 seconds"),
        ({"ping_interval": 0}, ConfigError, "ping_interval must be more than 0 seconds"),
        ({"ping_timeout": -1.0}, ConfigError, "ping_timeout must be more than 0 seconds"),
        ({"write_timeout": -math.inf}, ConfigError, "write_timeout must be at least 0"),
        ({"drain_timeout": math.nan}, ConfigError, "drain_timeout must be more than 0 seconds"),
        ({"drain_limit": -1}, ConfigError, "drain_limit must be at least 0"),
        ({"max_message_size": 0}, ConfigError, "max_message_size must be at least 1"),
        ({"max_connections": 0}, ConfigError, "max_connections must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_that_names_the_remedy(
    changes: dict[str, Any], cls: type[ConfigError], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**changes)
    assert type(caught.value) is cls
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"open_timeout": math.inf}, {"ping_interval": 0.001}, {"drain_limit": 0}, {"max_connections": 1}]
)
def test_the_least_and_the_greatest_limits_are_allowed(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


# ws:// sends the token in clear.


@pytest.mark.parametrize(
    "server_url",
    [
        "ws://localhost",
        "ws://LOCALHOST:8000/tunnels",
        "ws://127.0.0.1:8000",
        "ws://127.8.9.10",
        "ws://[::1]",
        "ws://[::1]:8000/tunnels",
        "ws://[0:0:0:0:0:0:0:1]:8000",
        "WS://127.0.0.1",
    ],
)
def test_an_insecure_url_may_lead_to_this_machine(server_url: str) -> None:
    config = make_config(server_url=server_url)
    assert not config.server_uri.secure
    assert config.server_is_local


@pytest.mark.parametrize(
    "server_url",
    [
        "ws://relay.example",
        "ws://api.smallware.io/tunnels",
        "ws://localhost.example.com",
        "ws://127.0.0.1.example.com",
        "ws://127.0.0.1.",
        "ws://0.0.0.0",
        "ws://10.0.0.1",
        "ws://192.168.1.2:8000",
        "ws://[::]",
        "ws://[::2]",
        "ws://[fe80::1]",
    ],
)
def test_an_insecure_url_to_another_machine_must_be_asked_for(server_url: str) -> None:
    with pytest.raises(InvalidServerURL, match="would send the token in clear"):
        make_config(server_url=server_url)
    config = make_config(server_url=server_url, allow_insecure_server=True)
    assert config.server_url == server_url
    assert not config.server_is_local


# No password in a URL is ever shown.

PASSWORDS = ["hunter2", "hunter2:x", "12/hunter2", "hunter2@x", "x://hunter2", "1?hunter2", "1#hunter2", "%hunter2 "]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "pattern",
    [
        "wss://me:{}@relay.example",
        "wss://{}@relay.example",
        "wss://:{}@relay.example",
        "ws://me:{}@relay.example/tunnels",
        "ws://me:{}@localhost",
        "wss://me:{}@relay.example:x",
        "wss://me:{}@relay.example?x=1",
        "wss://me:{}@relay.example#x",
        "wss://me:{}@",
        "wss://me:{}@[::1",
        "https://me:{}@relay.example",
        "me:{}@relay.example",
        "{}@relay.example",
        "wss:/me:{}@relay.example",
    ],
)
def test_a_password_in_the_server_url_is_refused_and_shown_nowhere(pattern: str, password: str) -> None:
    with pytest.raises(InvalidServerURL, match="must not hold a user name or password") as caught:
        make_config(server_url=pattern.format(password), allow_insecure_server=True)
    error = caught.value
    for shown in (str(error), repr(error), error.url, "".join(traceback.format_exception(error))):
        assert "hunter2" not in shown


def test_a_refused_url_still_names_its_host() -> None:
    with pytest.raises(InvalidServerURL, match=r"'\*\*\*@relay\.example/tunnels'"):
        make_config(server_url="wss://me:hunter2@relay.example/tunnels")


@settings(deadline=None, max_examples=500)
@given(st.text(max_size=30) | st.text("ws:/@?#[]%.1a ", max_size=30).map("wss://".__add__))
def test_any_server_url_is_usable_or_refused_and_nothing_else(server_url: str) -> None:
    try:
        config = make_config(server_url=server_url)
    except (InvalidServerURL, InvalidDomain):
        return
    assert config.server_uri.host
    assert config.dial_url.endswith(f"/{DOMAIN}")


# The public URL.


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("https://shop.example", PublicURL("https", "shop.example", 443), "https://shop.example"),
        ("http://shop.example", PublicURL("http", "shop.example", 80), "http://shop.example"),
        ("https://shop.example/", PublicURL("https", "shop.example", 443), "https://shop.example"),
        ("HTTPS://Shop.Example:443", PublicURL("https", "shop.example", 443), "https://shop.example"),
        ("https://shop.example:80", PublicURL("https", "shop.example", 80), "https://shop.example:80"),
        ("http://127.0.0.1:8000", PublicURL("http", "127.0.0.1", 8000), "http://127.0.0.1:8000"),
        ("http://[::1]:8000", PublicURL("http", "::1", 8000), "http://[::1]:8000"),
        ("http://[::1]", PublicURL("http", "::1", 80), "http://[::1]"),
    ],
)
def test_a_public_url_is_a_scheme_a_host_and_a_port(text: str, expected: PublicURL, shown: str) -> None:
    assert PublicURL.parse(text) == expected
    assert str(expected) == shown
    assert PublicURL.parse(shown) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "expected http[s]://host[:port] (--public-url)"),
        ("shop.example", "expected http[s]://host[:port] (--public-url)"),
        ("wss://shop.example", "expected http[s]://host[:port] (--public-url)"),
        ("https://", "expected http[s]://host[:port] (--public-url)"),
        ("https://:443", "expected http[s]://host[:port] (--public-url)"),
        ("https://shop.example:x", "expected http[s]://host[:port] (--public-url)"),
        ("https://shop.example:65536", "expected http[s]://host[:port] (--public-url)"),
        ("https://[::1", "expected http[s]://host[:port] (--public-url)"),
        ("https://shop.example/path", "a path belongs to --root-path"),
        ("https://shop.example?query=1", "must end after the host"),
        ("https://shop.example#fragment", "must end after the host"),
        ("https://me:hunter2@shop.example", "must not hold a user name or password (--public-url)"),
        ("https://me:12/hunter2@shop.example", "must not hold a user name or password (--public-url)"),
        ("me:hunter2@shop.example", "must not hold a user name or password (--public-url)"),
    ],
)
def test_a_public_url_of_another_form_is_refused_in_one_line(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PublicURL.parse(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@settings(deadline=None)
@given(st.text(max_size=30) | st.text("ab.:/@?#[]%1 \n", max_size=20).map("https://".__add__))
def test_any_text_is_a_public_url_or_refused_and_nothing_else(text: str) -> None:
    try:
        url = PublicURL.parse(text)
    except ConfigError:
        return
    assert PublicURL.parse(str(url)) == url


# Secrets, copies and pickles.


def test_repr_and_str_hide_the_key() -> None:
    config = make_config(key="acme.k1.sesame")
    for shown in (repr(config), str(config)):
        assert DOMAIN in shown
        assert "sesame" not in shown


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().domain = "www-b-b.e0.smallware.io"  # type: ignore[misc]


def test_a_replaced_value_is_checked_and_what_follows_from_it_renewed() -> None:
    config = make_config(key="acme.k1.sesame")
    moved = dataclasses.replace(config, domain="www-shop-other.w0.smallware.io", server_url="wss://relay.example/x")
    assert moved.tunnel_domain.customer_id == "other"
    assert moved.access_key == AccessKey("acme.k1", "sesame")  # acme is no longer the customer
    assert moved.dial_url == "wss://relay.example/x/www-shop-other.w0.smallware.io"
    assert config.access_key == AccessKey("k1", "sesame")


@pytest.mark.parametrize(
    ("changes", "cls"),
    [
        ({"domain": "www.example"}, InvalidDomain),
        ({"key": ""}, InvalidKey),
        ({"server_url": "ws://relay.example"}, InvalidServerURL),
        ({"open_timeout": 0.0}, ConfigError),
        ({"max_connections": 0}, ConfigError),
    ],
)
def test_a_replaced_value_that_cannot_work_is_refused(changes: dict[str, Any], cls: type[ConfigError]) -> None:
    with pytest.raises(cls):
        dataclasses.replace(make_config(), **changes)


def test_equal_values_make_equal_configs() -> None:
    assert make_config() == make_config()
    assert make_config() != make_config(open_timeout=1.0)
    assert len({make_config(), make_config()}) == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_config_travels_to_a_worker_process(protocol: int) -> None:
    config = make_config(key="acme.k1.sesame", server_url="ws://localhost:8000", trust_ca=Path("ca.pem"))
    copy = pickle.loads(pickle.dumps(config, protocol))
    assert copy == config
    assert copy.tunnel_domain == config.tunnel_domain
    assert copy.access_key == config.access_key
    assert copy.server_uri == config.server_uri


# The environment.

ENVIRONMENT = {
    "SMALLWARE_DOMAIN": DOMAIN,
    "SMALLWARE_KEY": "sesame",
    "SMALLWARE_KEY_ID": "k9",
    "SMALLWARE_SERVER": "wss://relay.example",
    "SMALLWARE_TRUST_CA": "/etc/ca.pem",
}


def test_every_value_is_found_in_the_environment() -> None:
    config = TunnelConfig.from_env(ENVIRONMENT)
    assert config == TunnelConfig(
        DOMAIN, key="sesame", key_id="k9", server_url="wss://relay.example", trust_ca="/etc/ca.pem"
    )


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"domain": "www-b-b.e0.smallware.io"}, "domain"),
        ({"key": "other"}, "key"),
        ({"key_id": None}, "key_id"),
        ({"server_url": "wss://other.example"}, "server_url"),
        ({"trust_ca": None}, "trust_ca"),
        ({"open_timeout": 3.0}, "open_timeout"),
    ],
)
def test_what_is_given_wins_over_the_environment(overrides: dict[str, Any], field: str) -> None:
    config = TunnelConfig.from_env(ENVIRONMENT, **overrides)
    assert config == dataclasses.replace(TunnelConfig.from_env(ENVIRONMENT), **overrides)
    assert getattr(config, field) == overrides[field]


def test_an_empty_variable_counts_as_absent() -> None:
    empty = dict.fromkeys(ENVIRONMENT, "")
    config = TunnelConfig.from_env(empty | {"SMALLWARE_DOMAIN": DOMAIN, "SMALLWARE_KEY": KEY})
    assert config == TunnelConfig(DOMAIN, key=KEY)


def test_an_empty_environment_asks_for_the_domain_first() -> None:
    with pytest.raises(ConfigError, match="no domain: use --domain"):
        TunnelConfig.from_env({})
    with pytest.raises(InvalidKey, match="set SMALLWARE_KEY"):
        TunnelConfig.from_env({"SMALLWARE_DOMAIN": DOMAIN})


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    assert TunnelConfig.from_env() == TunnelConfig.from_env(ENVIRONMENT)


# Key files.


@pytest.mark.parametrize("content", [b"k1.sesame", b"k1.sesame\n", b" \r\n k1.sesame \r\n\r\n"])
def test_a_key_file_is_read_without_the_white_space_around_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    assert read_key_file(path) == "k1.sesame"
    assert read_key_file(os.fspath(path)) == "k1.sesame"


@pytest.mark.parametrize("content", [b"", b"\n", b" \t\r\n"])
def test_an_empty_key_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(InvalidKey) as caught:
        read_key_file(path)
    assert str(caught.value) == f"the key file {path} is empty"


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(InvalidKey) as caught:
        read_key_file(path)
    assert str(caught.value) == f"cannot read the key file {path}: No such file or directory"
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_directory_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidKey, match="cannot read the key file"):
        read_key_file(tmp_path)


def test_a_key_file_that_is_not_text_is_named_and_never_quoted(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"sesame\xff")
    with pytest.raises(InvalidKey) as caught:
        read_key_file(path)
    assert str(caught.value) == f"cannot read the key file {path}: it is not text"
    assert "sesame" not in "".join(traceback.format_exception(caught.value))


# The TLS context.


@pytest.fixture
def system_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The only authority that this machine trusts, as far as OpenSSL is told."""
    authority = Authority("system")
    monkeypatch.setenv("SSL_CERT_FILE", os.fspath(authority.write(tmp_path / "system.pem")))
    monkeypatch.setenv("SSL_CERT_DIR", os.fspath(tmp_path / "none"))
    return authority


def test_an_insecure_url_needs_no_tls_context() -> None:
    assert make_config(server_url="ws://localhost:8000", trust_ca="/nowhere").make_ssl_context() is None


@pytest.mark.parametrize("extra", [False, True])
def test_the_tls_context_verifies_the_server_and_its_name(tmp_path: Path, extra: bool) -> None:
    trust_ca = Authority("extra").write(tmp_path / "extra.pem") if extra else None
    context = make_config(trust_ca=trust_ca).make_ssl_context()
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_without_trust_ca_only_the_certificates_of_the_system_are_trusted(
    tmp_path: Path, system_authority: Authority
) -> None:
    context = make_config().make_ssl_context()
    assert context is not None
    shake_hands(context, system_authority.server_context(tmp_path / "a", "relay.example"), "relay.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, Authority("extra").server_context(tmp_path / "b", "relay.example"), "relay.example")


@pytest.mark.parametrize("kind", [Path, str])
def test_trust_ca_adds_to_the_certificates_of_the_system(
    tmp_path: Path, system_authority: Authority, kind: type[str] | type[Path]
) -> None:
    extra = Authority("extra")
    context = make_config(trust_ca=kind(extra.write(tmp_path / "extra.pem"))).make_ssl_context()
    assert context is not None
    for authority in (system_authority, extra):
        shake_hands(context, authority.server_context(tmp_path / "chain", "relay.example"), "relay.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, Authority("third").server_context(tmp_path / "c", "relay.example"), "relay.example")


def test_a_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    extra = Authority("extra")
    context = make_config(trust_ca=extra.write(tmp_path / "extra.pem")).make_ssl_context()
    assert context is not None
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(context, extra.server_context(tmp_path / "chain", "other.example"), "relay.example")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a certificate",
        b"\x00\xff" * 100,
        b"-----BEGIN CERTIFICATE-----\nnot base64!\n-----END CERTIFICATE-----\n",
    ],
)
def test_a_trust_ca_without_a_certificate_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make_config(trust_ca=path).make_ssl_context()
    assert str(caught.value) == f"{path} holds no PEM certificate (--trust-ca)"
    assert isinstance(caught.value.__cause__, ssl.SSLError)


def test_a_missing_trust_ca_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    with pytest.raises(ConfigError) as caught:
        make_config(trust_ca=path).make_ssl_context()
    assert str(caught.value) == f"cannot read {path}: No such file or directory (--trust-ca)"
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_config_error_is_a_tunnel_error_and_a_value_error() -> None:
    for base in (TunnelError, ValueError):
        with pytest.raises(base):
            make_config(domain="")
