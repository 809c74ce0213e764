"""A certificate authority for this machine's own experiments, so that ``--local --tls`` can serve https.

Its certificate may sign names of this machine only (RFC 5280 section 4.2.1.10), so trusting it in a browser
puts no other site at risk should its key be stolen.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tunnel_asgi.errors import ConfigError

__all__ = ["DevelopmentCA"]

CA_LIFETIME = datetime.timedelta(days=365)
LEAF_LIFETIME = datetime.timedelta(days=30)
RENEW_BEFORE = datetime.timedelta(days=30)
CLOCK_SLACK = datetime.timedelta(minutes=5)  # certificates begin a little in the past


def default_directory() -> Path:
    """``$XDG_DATA_HOME/tunnel-asgi``, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "tunnel-asgi"


@dataclass(frozen=True)
class DevelopmentCA:
    """A CA in a directory: ``ca.pem`` for everyone, ``ca-key.pem`` for its owner only."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    certificate_path: Path

    @classmethod
    def load_or_create(cls, directory: Path | None = None) -> DevelopmentCA:
        """The CA of this user; made on the spot if there is none. Its certificate is renewed 30 days before it ends.

        Processes that come here at once all get the same key, so a certificate any of them writes fits them all.

        Raises:
            ConfigError: the directory cannot be written.
        """
        directory = directory or default_directory()
        path = directory / "ca.pem"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            key = _load_key(directory / "ca-key.pem") or _create_key(directory / "ca-key.pem")
            certificate = _load_certificate(path, key) or _create_certificate(path, key)
        except OSError as error:
            raise ConfigError(f"cannot keep the development CA in {directory}: {error.strerror}") from error
        return cls(certificate, key, path)

    def server_context(self, names: Iterable[str]) -> ssl.SSLContext:
        """A TLS server context with a fresh certificate for these host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        # Nothing that looks like a host: OpenSSL would hold it against the name constraints.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tunnel-asgi on this machine")])
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            _builder(subject, self.certificate.subject, key.public_key(), LEAF_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(issuer_id, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # The ssl module reads key and certificate from a file only; 0700 is tempfile's own mode.
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "leaf.pem")
            path.write_bytes(_private_pem(key) + certificate.public_bytes(Encoding.PEM))
            context.load_cert_chain(path)
        return context


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (FileNotFoundError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    with _new_file(path, _private_pem(key), 0o600) as new:
        try:
            path.hardlink_to(new)
        except FileExistsError:
            found = _load_key(path)
            if found is not None:  # another process was faster: its key is ours
                return found
            new.replace(path)
    return key


def _load_certificate(path: Path, key: ec.EllipticCurvePrivateKey) -> x509.Certificate | None:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        fits = certificate.public_key() == key.public_key()
    except (FileNotFoundError, ValueError, UnsupportedAlgorithm):
        return None
    return certificate if fits and certificate.not_valid_after_utc - _now() >= RENEW_BEFORE else None


def _create_certificate(path: Path, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tunnel-asgi development CA")])
    certificate = (
        _builder(name, name, key.public_key(), CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.NameConstraints(_this_machine(), None), critical=True)
        .sign(key, hashes.SHA256())
    )
    with _new_file(path, certificate.public_bytes(Encoding.PEM), 0o644) as new:
        new.replace(path)
    return certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - CLOCK_SLACK)
        .not_valid_after(_now() + lifetime)
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _this_machine() -> list[x509.GeneralName]:
    return [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_network("127.0.0.0/8")),
        x509.IPAddress(ipaddress.ip_network("::1/128")),
    ]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@contextlib.contextmanager
def _new_file(path: Path, content: bytes, mode: int) -> Generator[Path]:
    """A complete file beside ``path``, to take its place in one step. It never had a wider mode."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).chmod(mode)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
