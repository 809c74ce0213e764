"""Counts the tunnel streams of the test that runs now."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Streams", "current"]


@dataclass
class Streams:
    """What one test did with tunnels."""

    relay: int = 0
    """Visitors that a relay handed to our server: CONNECT messages sent over a WebSocket."""
    memory: int = 0
    """Visitors on a transport without a socket."""
    violations: list[str] = field(default_factory=list)
    """Breaches of the wire protocol, as the relays saw them."""

    def reset(self) -> None:
        self.relay = self.memory = 0
        self.violations = []


current = Streams()
