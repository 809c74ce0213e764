"""The name visitors use: ``<service>-<name>-<customer>.<shard>.smallware.io``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunnel_asgi.errors import InvalidDomain

__all__ = ["DEFAULT_SUFFIX", "TunnelDomain"]

DEFAULT_SUFFIX = "smallware.io"

MAX_NAME = 253  # characters in a host name, RFC 1035 section 2.3.4
MAX_LABEL = 63  # characters in a label, the same section

_PART = re.compile(r"[a-z0-9]+")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class TunnelDomain:
    """A checked tunnel domain (PROTOCOL.md 2). ``str()`` gives the host name back, in lower case."""

    service: str
    name: str
    customer_id: str
    shard: str
    suffix: str

    @classmethod
    def parse(cls, text: str, *, suffix: str | None = DEFAULT_SUFFIX) -> TunnelDomain:
        """Read a domain. Host names ignore case, so upper case is folded.

        ``suffix`` is what must follow the shard; None allows any host name (self-hosted relays).

        Raises:
            InvalidDomain: the text has another form. The message says which part is wrong.
        """

        def wrong(reason: str) -> InvalidDomain:
            return InvalidDomain(text, reason, suffix)

        folded = text.lower() if text.isascii() else text  # lower() makes a k of the Kelvin sign
        if "://" in folded:
            raise wrong("it is a URL; give the host name only")
        labels = folded.split(".")
        if len(labels) < 3 or (suffix is not None and len(labels) != 2 + len(suffix.split("."))):
            raise wrong("it has the wrong number of dot-separated labels")
        if len(folded) > MAX_NAME or any(len(label) > MAX_LABEL for label in labels):
            raise wrong(f"a label may have {MAX_LABEL} characters, the whole {MAX_NAME}")

        parts = labels[0].split("-")
        if len(parts) != 3:
            raise wrong("the first label must have three dash-separated parts, so no part may hold a dash")
        if not all(_PART.fullmatch(part) for part in (*parts, labels[1])):
            raise wrong("each part must be letters a-z and digits, and none may be empty")

        given = ".".join(labels[2:])
        if suffix is not None and given != suffix:
            raise wrong(f"it must end in {suffix}, unless another tunnel server is given")
        if not all(_LABEL.fullmatch(label) for label in labels[2:]):
            raise wrong(f"{given!r} is not a host name")

        service, name, customer_id = parts
        return cls(service, name, customer_id, labels[1], given)

    def __str__(self) -> str:
        return f"{self.service}-{self.name}-{self.customer_id}.{self.shard}.{self.suffix}"
