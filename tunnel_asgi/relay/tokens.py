"""The token check before the upgrade (PROTOCOL.md 3 and 6)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from jwt import PyJWS
from jwt.algorithms import HMACAlgorithm
from jwt.exceptions import InvalidTokenError

from tunnel_asgi.relay.head import Refused

__all__ = ["TokenChecker"]

LEEWAY = 30.0  # seconds the client's clock may be off

Claims = dict[str, Any]


class TokenChecker:
    """Knows the customers' secrets: ``{customer id: {key id: secret}}``. Shows none of them."""

    def __init__(self, keys: Mapping[str, Mapping[str, str]], clock: Callable[[], float]) -> None:
        self._keys = keys
        self._clock = clock

    def check(self, authorization: Sequence[str], customer_id: str) -> None:
        """Judge the values of the Authorization header for a dial to one of this customer's domains.

        Raises:
            Refused: 401 if there is no good token, 403 if it is a good one of another customer.
        """
        claims = self._verified_claims(_bearer_token(authorization))
        self._check_times(claims)
        if claims.get("iss") != "customer":
            raise Refused(401, "the token was not issued by a customer")
        roles = claims.get("roles")
        if not isinstance(roles, list) or "tunnel" not in roles:
            raise Refused(401, "the token lacks the role tunnel")
        if claims["sub"] != customer_id:
            raise Refused(403, "the token is another customer's")

    def _verified_claims(self, token: str) -> Claims:
        """The claims, signed with HS256 by a key of the customer they name."""
        try:
            unverified = _jws.decode_complete(token, options={"verify_signature": False})
            secret = self._find_secret(unverified["header"].get("kid"), _parse_claims(unverified["payload"]).get("sub"))
            return _parse_claims(_jws.decode(token, secret, algorithms=["HS256"]))
        except (InvalidTokenError, ValueError):
            # Not chained, and one answer for all: it must not help to guess ids.
            raise Refused(401, "the token is not a valid one") from None

    def _find_secret(self, key_id: object, customer_id: object) -> str:
        if not isinstance(key_id, str) or not isinstance(customer_id, str):
            raise ValueError("the key id and the customer id must be text")
        try:
            return self._keys[customer_id][key_id]
        except KeyError:
            raise ValueError("the key is unknown") from None

    def _check_times(self, claims: Claims) -> None:
        issued, expires = claims.get("iat"), claims.get("exp")
        if not _is_time(issued) or not _is_time(expires):
            raise Refused(401, "the token must say when it was issued and when it expires")
        now = self._clock()
        if issued > now + LEEWAY:
            raise Refused(401, "the token is not valid yet")
        if expires <= now - LEEWAY:
            raise Refused(401, "the token has expired")


def _bearer_token(authorization: Sequence[str]) -> str:
    if len(authorization) != 1:
        raise Refused(401, "exactly one Authorization header is needed")
    scheme, _, token = authorization[0].partition(" ")
    if scheme.lower() != "bearer":
        raise Refused(401, "a bearer token is needed")
    return token.strip()


def _parse_claims(payload: bytes) -> Claims:
    claims = json.loads(payload)
    if not isinstance(claims, dict):
        raise ValueError("the claims are not an object")
    return claims


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _AnyLengthHMAC(HMACAlgorithm):
    def check_key_length(self, key: bytes) -> str | None:
        """No opinion: whoever configured the relay chose the secret."""
        return None


_jws = PyJWS(algorithms=["HS256"])
_jws.unregister_algorithm("HS256")
_jws.register_algorithm("HS256", _AnyLengthHMAC(HMACAlgorithm.SHA256))
