"""Every exception of the package.

    TunnelError
    ├── ConfigError                 what the user gave cannot work; nothing was dialled   (ValueError)
    │   ├── InvalidDomain
    │   ├── InvalidKey
    │   ├── InvalidServerURL
    │   └── AppLoadFailed           the module, attribute or factory is not an ASGI app
    ├── LifespanFailed              the app refused to start
    ├── RelayFailed                 the embedded relay could not open its port
    ├── ConnectionFailed            the tunnel server cannot be reached                   (retryable)
    ├── UpgradeRefused              it answered the upgrade with an HTTP status
    │   ├── AuthenticationFailed    401, 403
    │   ├── NoCredits               402
    │   ├── BadRequest              any other 3xx or 4xx
    │   └── ServerError             429, 5xx                                              (retryable)
    ├── WebSocketError              an open WebSocket failed                              (retryable)
    │   └── ProtocolError           the peer broke the tunnel protocol
    ├── LocalProtocolError          our own side would have broken it: a bug
    ├── IoError                     the local service a visitor is forwarded to failed
    └── ListenerClosed              the listener or pool is closed

Whether dialling again can help is a property of the class: ``retryable`` (PROTOCOL.md 3).
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AppLoadFailed",
    "AuthenticationFailed",
    "BadRequest",
    "ConfigError",
    "ConnectionFailed",
    "InvalidDomain",
    "InvalidKey",
    "InvalidServerURL",
    "IoError",
    "LifespanFailed",
    "ListenerClosed",
    "LocalProtocolError",
    "NoCredits",
    "ProtocolError",
    "RelayFailed",
    "ServerError",
    "TunnelError",
    "UpgradeRefused",
    "WebSocketError",
]


class TunnelError(Exception):
    """The base of every error of this package."""

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later without any change by the user."""


class ConfigError(TunnelError, ValueError):
    """What the user gave cannot work. Raised before anything is dialled."""


class InvalidDomain(ConfigError):
    """The text is not a tunnel domain (PROTOCOL.md 2)."""

    def __init__(self, domain: str, reason: str, suffix: str | None = "smallware.io") -> None:
        super().__init__(domain, reason, suffix)
        self.domain = domain
        self.reason = reason
        self.suffix = suffix
        """What must follow the shard, None if any host name may."""

    def __str__(self) -> str:
        suffix = self.suffix or "<host name>"
        return (
            f"{self.domain!r} is not a tunnel domain: {self.reason}; "
            f"expected <service>-<name>-<customer>.<shard>.{suffix}"
        )


class InvalidKey(ConfigError):
    """The access key is missing, unreadable or has an empty part. Never quotes the key."""


class InvalidServerURL(ConfigError):
    """The tunnel server's URL cannot be dialled, or would send the token in clear."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot use the tunnel server URL {self.url!r}: {self.reason}"


class AppLoadFailed(ConfigError):
    """The app could not be imported, or it is not an ASGI app."""


class LifespanFailed(TunnelError):
    """The app's lifespan startup failed; nothing was offered to visitors."""

    def __str__(self) -> str:
        return "the application failed to start (its own message stands above)"


class RelayFailed(TunnelError):
    """The embedded relay could not open its port."""


class ConnectionFailed(TunnelError):
    """The tunnel server could not be reached: DNS, TCP, TLS, a proxy or a timeout."""

    retryable = True

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot reach the tunnel server {self.url}: {self.reason}"


class UpgradeRefused(TunnelError):
    """The tunnel server answered the WebSocket upgrade with an HTTP status."""

    def __init__(
        self,
        status: int,
        *,
        domain: str,
        key_id: str,
        retry_after: float | None = None,
        clock_skew: float | None = None,
    ) -> None:
        super().__init__(status)
        self.status = status
        self.domain = domain
        self.key_id = key_id
        self.retry_after = retry_after
        """Seconds the server asked us to wait, or None."""
        self.clock_skew = clock_skew
        """Seconds our clock is ahead of the server's (negative: behind), or None if it did not say."""

    def __str__(self) -> str:
        return f"the tunnel server refused {self.domain} with HTTP status {self.status}"


class AuthenticationFailed(UpgradeRefused):
    """401 or 403: the key is unknown, revoked, or not this customer's."""

    TOLERATED_SKEW = 120.0
    """Seconds. Below this a wrong clock is not the likely cause: the token lives 30 minutes."""

    def __str__(self) -> str:
        message = (
            f"the tunnel server does not accept key {self.key_id!r} for {self.domain} "
            f"(HTTP status {self.status}): check the key, its id and the domain's customer"
        )
        if self.clock_skew is not None and abs(self.clock_skew) > self.TOLERATED_SKEW:
            direction = "ahead of" if self.clock_skew > 0 else "behind"
            message += f"; this machine's clock is {abs(self.clock_skew):.0f} s {direction} the server's"
        return message


class NoCredits(UpgradeRefused):
    """402: the account's prepaid credit is used up."""

    def __str__(self) -> str:
        return f"no credit left for {self.domain} (HTTP status {self.status}): top up the account"


class BadRequest(UpgradeRefused):
    """Any other 3xx or 4xx: the server does not serve this domain, path or protocol version."""

    def __str__(self) -> str:
        return f"{super().__str__()}: check the domain and the server URL"


class ServerError(UpgradeRefused):
    """429 or 5xx: too many requests, or trouble on the server's side."""

    retryable = True


class WebSocketError(TunnelError):
    """An open WebSocket failed: closed by the server, lost, silent or stuck."""

    retryable = True


class ProtocolError(WebSocketError):
    """The peer sent something PROTOCOL.md does not allow in that state."""


class LocalProtocolError(TunnelError):
    """Our own side asked for something PROTOCOL.md does not allow in that state."""


class IoError(TunnelError):
    """The local service a visitor is forwarded to cannot be reached, or failed."""

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(target, reason)
        self.target = target
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot forward to {self.target}: {self.reason}"


class ListenerClosed(TunnelError):
    """The listener or pool is closed and accepts no more visitors."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "the tunnel listener is closed"
