"""Access keys, and the short-lived tokens made from them (PROTOCOL.md 3)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jwt import InvalidKeyError, PyJWS
from jwt.algorithms import HMACAlgorithm

from tunnel_asgi.errors import InvalidKey

__all__ = ["DEFAULT_KEY_ID", "AccessKey", "JwtManager"]

DEFAULT_KEY_ID = "default"

TOKEN_LIFETIME = 30 * 60  # seconds from iat to exp [S]
REFRESH_MARGIN = 15 * 60  # seconds left below which a cached token is replaced [R]


@dataclass(frozen=True, slots=True)
class AccessKey:
    """A key id and its secret. The secret never shows in ``repr``."""

    key_id: str
    secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str, *, key_id: str | None = None, customer_id: str | None = None) -> AccessKey:
        """Read any of the three published spellings (PROTOCOL.md 3).

        With ``key_id`` the whole text is the secret. Otherwise ``SECRET`` has the id ``default``,
        ``<keyid>.<secret>`` is split at the last dot, and ``<customer>.<keyid>.<secret>`` at the first and
        last one if the first part is ``customer_id`` (white space anywhere in it is then removed).
        White space around the text is always ignored.

        Raises:
            InvalidKey: the text, the key id or the secret is empty, or the secret cannot sign.
        """
        text = text.strip()
        if key_id is not None:
            return cls._checked(key_id, text)

        compact = "".join(text.split())
        customer, _, rest = compact.partition(".")
        if "." in rest and customer.lower() == customer_id:
            text = rest

        if "." not in text:
            return cls._checked(DEFAULT_KEY_ID, text)
        found_id, _, secret = text.rpartition(".")
        return cls._checked(found_id, secret)

    @classmethod
    def _checked(cls, key_id: str, secret: str) -> AccessKey:
        if not secret:
            raise InvalidKey("the access key is empty: set SMALLWARE_KEY or use --key-file")
        if not key_id:
            raise InvalidKey("the access key has an empty key id: expected SECRET or <keyid>.<secret>")
        try:
            _hmac.prepare_key(secret)
        except (InvalidKeyError, UnicodeEncodeError):
            # Not chained: the cause may hold the key.
            raise InvalidKey("the access key is a certificate, a private key or not text: check --key-file") from None
        return cls(key_id, secret)


class JwtManager:
    """Makes and caches the HS256 token that opens a WebSocket. Thread-safe; usable alone.

    A token lives 30 minutes and is replaced when less than 15 minutes remain. ``clock`` returns
    seconds since the epoch.
    """

    def __init__(self, key: AccessKey, customer_id: str, *, clock: Callable[[], float] = time.time) -> None:
        self.key = key
        self.customer_id = customer_id
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._expires = 0

    def __repr__(self) -> str:
        return f"JwtManager(key_id={self.key.key_id!r}, customer_id={self.customer_id!r})"

    def get_token(self) -> str:
        """The cached token, or a new one if less than 15 minutes of it remain."""
        with self._lock:
            now = self._clock()
            # A clock set back would keep a token that is not valid yet, for as long as it was set back.
            still_good = REFRESH_MARGIN <= self._expires - now <= TOKEN_LIFETIME
            return self._token if still_good else self._renew(now)

    def refresh_token(self) -> str:
        """A new token, whatever is left of the old one: for after a 401."""
        with self._lock:
            return self._renew(self._clock())

    def _renew(self, now: float) -> str:
        issued = int(now)
        self._expires = issued + TOKEN_LIFETIME
        claims = {
            "iss": "customer",
            "sub": self.customer_id,
            "iat": issued,
            "exp": self._expires,
            "roles": ["tunnel"],
        }
        self._token = _jws.encode(
            json.dumps(claims, separators=(",", ":")).encode(),
            self.key.secret,
            algorithm="HS256",
            headers={"kid": self.key.key_id},
        )
        return self._token


class _ServiceHMAC(HMACAlgorithm):
    def check_key_length(self, key: bytes) -> str | None:
        """No opinion: the service issued the secret, so its user cannot act on a warning."""
        return None


_hmac = _ServiceHMAC(HMACAlgorithm.SHA256)
_jws = PyJWS(algorithms=["HS256"])
_jws.unregister_algorithm("HS256")
_jws.register_algorithm("HS256", _hmac)
