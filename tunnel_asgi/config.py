"""What a tunnel needs to know: where each value may come from, every limit and every timeout."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import InvalidURI
from websockets.uri import WebSocketURI, parse_uri

from tunnel_asgi.auth import AccessKey
from tunnel_asgi.domain import DEFAULT_SUFFIX, TunnelDomain
from tunnel_asgi.errors import ConfigError, InvalidKey, InvalidServerURL

__all__ = ["DEFAULT_SERVER_URL", "PublicURL", "TunnelConfig", "read_key_file"]

DEFAULT_SERVER_URL = "wss://api.smallware.io/tunnels"

ENV_NAMES = {
    "domain": "SMALLWARE_DOMAIN",
    "key": "SMALLWARE_KEY",
    "key_id": "SMALLWARE_KEY_ID",
    "server_url": "SMALLWARE_SERVER",
    "trust_ca": "SMALLWARE_TRUST_CA",
}


@dataclass(frozen=True)
class TunnelConfig:
    """One tunnel, checked on construction; change it with ``dataclasses.replace``.

    All times are seconds, all sizes bytes. ``repr`` hides the key.

    Raises:
        InvalidDomain, InvalidKey, InvalidServerURL: the value has the wrong form.
        ConfigError: a limit or timeout is out of range.
    """

    domain: str
    """``<service>-<name>-<customer>.<shard>.smallware.io``; any suffix with another server."""
    key: str = field(kw_only=True, repr=False, default="")
    """The access key in any published spelling, see ``AccessKey.parse``."""
    key_id: str | None = field(kw_only=True, default=None)
    """Makes the whole of ``key`` the secret of this id."""
    server_url: str = field(kw_only=True, default=DEFAULT_SERVER_URL)
    """The WebSockets are opened at ``{server_url}/{domain}``."""
    trust_ca: str | os.PathLike[str] | None = field(kw_only=True, default=None)
    """A PEM file trusted in addition to the system's certificates."""
    allow_insecure_server: bool = field(kw_only=True, default=False)
    """Allow ``ws://`` to a machine other than this one. The token then travels in clear."""

    open_timeout: float = field(kw_only=True, default=10.0)
    """TCP, TLS, proxy and upgrade of one dial, together."""
    ping_interval: float = field(kw_only=True, default=20.0)
    """Silence before the server is pinged (the published client waits 60 s)."""
    ping_timeout: float = field(kw_only=True, default=20.0)
    """Further silence before it is taken for dead: 40 s in all."""
    write_timeout: float = field(kw_only=True, default=60.0)
    """A send without progress for this long ends the WebSocket: mostly its visitor reads nothing [S]. 0: never."""
    drain_timeout: float = field(kw_only=True, default=30.0)
    """From our EOF to the visitor's; past it the WebSocket is closed instead of recycled."""
    drain_limit: int = field(kw_only=True, default=1024 * 1024)
    """Bytes discarded between our EOF and the visitor's, with the same end."""
    max_message_size: int = field(kw_only=True, default=16 * 1024 * 1024)
    """One WebSocket frame; a larger one closes the WebSocket with 1009."""
    max_connections: int = field(kw_only=True, default=1000)
    """WebSockets in all; beyond it visitors wait at the tunnel server, or idle ones make room."""

    tunnel_domain: TunnelDomain = field(init=False, repr=False, compare=False)
    access_key: AccessKey = field(init=False, repr=False, compare=False)
    server_uri: WebSocketURI = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        server_uri = _parse_server_url(self.server_url, self.allow_insecure_server)
        suffix = DEFAULT_SUFFIX if self.server_url.rstrip("/") == DEFAULT_SERVER_URL else None
        if not self.domain:
            raise ConfigError(
                "no domain: use --domain <service>-<name>-<customer>.<shard>.smallware.io, "
                "or --local to try it without an account"
            )
        domain = TunnelDomain.parse(self.domain, suffix=suffix)
        if not self.key:
            raise InvalidKey("no access key: set SMALLWARE_KEY or use --key-file (in Python: key=...)")
        key = AccessKey.parse(self.key, key_id=self.key_id, customer_id=domain.customer_id)
        for name in ("open_timeout", "ping_interval", "ping_timeout", "drain_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0 seconds")
        for name, least in (("write_timeout", 0), ("drain_limit", 0), ("max_message_size", 1), ("max_connections", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}")
        # The dataclass is frozen; this is its documented way to set derived fields.
        object.__setattr__(self, "tunnel_domain", domain)
        object.__setattr__(self, "access_key", key)
        object.__setattr__(self, "server_uri", server_uri)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> TunnelConfig:
        """Read SMALLWARE_DOMAIN, _KEY, _KEY_ID, _SERVER and _TRUST_CA; ``overrides`` win.

        Raises:
            ConfigError: as the constructor.
        """
        environ = os.environ if environ is None else environ
        found = {name: environ[variable] for name, variable in ENV_NAMES.items() if environ.get(variable)}
        return cls(**({"domain": ""} | found | overrides))

    @property
    def dial_url(self) -> str:
        """Where the WebSockets are opened (PROTOCOL.md 3)."""
        return f"{self.server_url.rstrip('/')}/{self.tunnel_domain}"

    @property
    def server_is_local(self) -> bool:
        """Whether the tunnel server runs on this machine; then no proxy is used."""
        return _is_loopback(self.server_uri.host)

    def make_ssl_context(self) -> ssl.SSLContext | None:
        """The client context for ``wss``, None for ``ws``.

        Raises:
            ConfigError: ``trust_ca`` cannot be read or holds no certificate.
        """
        if not self.server_uri.secure:
            return None
        context = ssl.create_default_context()
        if self.trust_ca is not None:
            try:
                context.load_verify_locations(cafile=os.fspath(self.trust_ca))
            except ssl.SSLError as error:
                raise ConfigError(f"{self.trust_ca} holds no PEM certificate (--trust-ca)") from error
            except OSError as error:
                raise ConfigError(f"cannot read {self.trust_ca}: {error.strerror} (--trust-ca)") from error
        return context


@dataclass(frozen=True, slots=True)
class PublicURL:
    """What visitors open. It decides the ``scheme`` and ``server`` an app sees."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> PublicURL:
        """Read ``http[s]://host[:port]``.

        Raises:
            ConfigError: the text has another form.
        """
        if "@" in text:
            raise ConfigError("the public URL must not hold a user name or password (--public-url)")
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ConfigError(f"{text!r} is not a public URL: expected http[s]://host[:port] (--public-url)")
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ConfigError(f"the public URL {text!r} must end after the host; a path belongs to --root-path")
        return cls(parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme])

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


_DEFAULT_PORTS = {"http": 80, "https": 443}


def read_key_file(path: str | os.PathLike[str]) -> str:
    """The access key in a file, without white space around it.

    Raises:
        InvalidKey: the file cannot be read or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidKey(f"cannot read the key file {os.fspath(path)}: {reason}") from error
    if not text:
        raise InvalidKey(f"the key file {os.fspath(path)} is empty")
    return text


def _parse_server_url(url: str, allow_insecure: bool) -> WebSocketURI:
    if "@" in url:
        # Wherever it stands: a password may hold a slash, and would then parse as a port and a path.
        raise InvalidServerURL(f"***@{url.rpartition('@')[2]}", "it must not hold a user name or password")
    try:
        uri = parse_uri(url)
    except (InvalidURI, ValueError):
        raise InvalidServerURL(url, "expected ws:// or wss:// and a host") from None
    if "?" in url or "#" in url:
        raise InvalidServerURL(url, "it must not hold a query or fragment: the domain is appended to it")
    if " " in url or not url.isprintable():
        raise InvalidServerURL(url, "it must not hold white space")
    if not uri.secure and not allow_insecure and not _is_loopback(uri.host):
        raise InvalidServerURL(
            url, "ws:// would send the token in clear; use wss://, or --allow-insecure-server if you mean it"
        )
    return uri


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
