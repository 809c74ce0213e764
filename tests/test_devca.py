"""The development CA: its files, its limits, and what OpenSSL makes of its certificates."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tunnel_asgi import devca
from tunnel_asgi.devca import DevelopmentCA
from tunnel_asgi.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing here may touch the real home directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def shake_hands(ca: DevelopmentCA, names: list[str], host: str) -> None:
    """A TLS handshake in memory with a client that trusts the CA's file and nothing else; raises what it would."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.load_verify_locations(ca.certificate_path)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    server = ca.server_context(names).wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)


def advance(monkeypatch: pytest.MonkeyPatch, **distance: float) -> None:
    now = devca._now() + datetime.timedelta(**distance)
    monkeypatch.setattr(devca, "_now", lambda: now)


@pytest.mark.parametrize("host", ["localhost", "app.localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_client_that_trusts_the_ca_accepts_this_machine(host: str) -> None:
    shake_hands(DevelopmentCA.load_or_create(), [host], host)


@pytest.mark.parametrize("host", ["example.com", "localhost.example.com", "notlocalhost", "192.0.2.1", "::2"])
def test_a_certificate_the_ca_signs_for_another_host_is_refused(host: str) -> None:
    ca = DevelopmentCA.load_or_create()
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        shake_hands(ca, [host], host)


def test_one_forbidden_name_spoils_a_certificate_that_is_good_otherwise() -> None:
    ca = DevelopmentCA.load_or_create()
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        shake_hands(ca, ["localhost", "example.com"], "localhost")


def test_a_certificate_is_good_for_its_own_names_only() -> None:
    ca = DevelopmentCA.load_or_create()
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(ca, ["localhost"], "127.0.0.1")


def test_the_ca_can_sign_leaves_of_this_machine_only() -> None:
    certificate = DevelopmentCA.load_or_create().certificate
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    constraints = certificate.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    permitted = constraints.value.permitted_subtrees or []
    assert {name.value for name in permitted} == {
        "localhost",
        ipaddress.ip_network("127.0.0.0/8"),
        ipaddress.ip_network("::1/128"),
    }


def test_the_private_key_is_readable_by_its_owner_only(home: Path) -> None:
    ca = DevelopmentCA.load_or_create()
    directory = home / "data" / "tunnel-asgi"
    assert ca.certificate_path == directory / "ca.pem"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {"ca.pem": 0o644, "ca-key.pem": 0o600}


def test_an_open_umask_does_not_open_the_key() -> None:
    previous = os.umask(0)
    try:
        ca = DevelopmentCA.load_or_create()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(ca.certificate_path.with_name("ca-key.pem").stat().st_mode) == 0o600


def test_the_next_run_uses_the_same_ca() -> None:
    first, second = DevelopmentCA.load_or_create(), DevelopmentCA.load_or_create()
    assert first.certificate == second.certificate
    shake_hands(second, ["localhost"], "localhost")


def test_without_xdg_data_home_the_ca_lives_in_the_home_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    ca = DevelopmentCA.load_or_create()
    assert ca.certificate_path == home / "home" / ".local" / "share" / "tunnel-asgi" / "ca.pem"


@pytest.mark.parametrize(("days", "renewed"), [(334, False), (336, True), (400, True)])
def test_the_certificate_is_renewed_30_days_before_its_end(
    days: int, renewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DevelopmentCA.load_or_create()
    advance(monkeypatch, days=days)
    second = DevelopmentCA.load_or_create()
    assert (second.certificate != first.certificate) is renewed
    assert second.certificate.not_valid_after_utc - devca._now() >= devca.RENEW_BEFORE


def test_a_leaf_never_outlives_its_ca() -> None:
    assert devca.LEAF_LIFETIME <= devca.RENEW_BEFORE


def test_a_client_that_trusts_the_renewed_certificate_accepts_a_server_started_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as earlier:
        advance(earlier, days=-336)
        first = DevelopmentCA.load_or_create()
    second = DevelopmentCA.load_or_create()
    assert second.certificate != first.certificate
    shake_hands(first, ["localhost"], "localhost")


def rsa_key() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def locked_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ca.pem", b""),
        ("ca.pem", b"\xff not PEM"),
        ("ca-key.pem", b""),
        ("ca-key.pem", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
        ("ca-key.pem", rsa_key()),
        ("ca-key.pem", locked_key()),
    ],
)
def test_a_broken_file_is_replaced(name: str, content: bytes, home: Path) -> None:
    before = DevelopmentCA.load_or_create()
    broken = before.certificate_path.with_name(name)
    broken.write_bytes(content)
    after = DevelopmentCA.load_or_create()
    assert after.certificate != before.certificate
    assert DevelopmentCA.load_or_create().certificate == after.certificate
    assert stat.S_IMODE(before.certificate_path.with_name("ca-key.pem").stat().st_mode) == 0o600
    shake_hands(after, ["localhost"], "localhost")
    assert sorted(path.name for path in broken.parent.iterdir()) == ["ca-key.pem", "ca.pem"]


def test_a_key_and_a_certificate_that_do_not_belong_together_are_not_used(home: Path) -> None:
    mine, other = DevelopmentCA.load_or_create(home / "mine"), DevelopmentCA.load_or_create(home / "other")
    mine.certificate_path.write_bytes(other.certificate_path.read_bytes())
    shake_hands(DevelopmentCA.load_or_create(home / "mine"), ["localhost"], "localhost")


def test_processes_that_make_the_ca_at_once_agree_on_it(home: Path) -> None:
    together = threading.Barrier(8)
    found: list[DevelopmentCA] = []

    def make() -> None:
        together.wait()
        found.append(DevelopmentCA.load_or_create(home / "shared"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for ca in found:
        shake_hands(ca, ["localhost"], "localhost")


@pytest.mark.parametrize("blocked", [".", "ca.pem", "ca-key.pem"])
def test_a_directory_that_cannot_be_written_is_named_in_one_line(blocked: str, home: Path) -> None:
    directory = home / "data" / "tunnel-asgi"
    if blocked == ".":
        directory.parent.mkdir()
        directory.write_text("a file in its place")
    else:
        (directory / blocked).mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot keep the development CA in") as raised:
        DevelopmentCA.load_or_create()
    assert str(directory) in str(raised.value)
    assert "\n" not in str(raised.value)
