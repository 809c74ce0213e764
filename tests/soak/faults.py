"""Faults, injected all along, and the note on every connection that one of them will break.

A fault is due each time so many requests are over, so that a slow machine gets as many as a fast one. Which one it
is, and whom it hits, follows from the seed and from who is connected at that moment.

What a fault may break, and what not:

* ``cut``, ``close``, ``breach`` end one WebSocket. They excuse the visitor it carries then, and one that the relay
  hands to it before it is gone; nobody else.
* ``drop`` excuses the visitor that is dropped.
* ``restart`` excuses every connection that is open, or being opened, when the relay goes down.
* ``stall``, ``refuse`` and ``hang`` excuse nobody: they are shorter than any deadline, so visitors only wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import cast

from websockets.exceptions import ConnectionClosed

from tests.soak.visitors import Book, Door
from tests.support import DOMAIN, KEYS
from tunnel_asgi.errors import LocalProtocolError
from tunnel_asgi.relay import Relay, Tunnel
from tunnel_asgi.relay.visitor import Visitor

__all__ = ["Faults", "Ground"]

HOLD_TIMEOUT = 120.0  # seconds the relay lets visitors wait; longer than any outage made here and the backoff after it
STALL = (0.05, 2.0)  # seconds of silence, from and to
REFUSAL = (0.05, 1.0)  # seconds in which no dial succeeds, from and to
DOWN = (0.0, 0.5)  # seconds between the end of one relay and the start of the next, from and to
SEND_TIMEOUT = 10.0  # seconds for a message to a client who may be slow


class Ground:
    """The relay of the moment, on ports that stay the same, and what all of them held against the client."""

    def __init__(self) -> None:
        self.relay: Relay
        self.door: Door
        self._port = 0
        self._tunnel_port = 0
        self._violations: list[list[str]] = []

    async def begin(self) -> None:
        """Open for the first time."""
        await self.open()
        self._port = self.relay.port
        self._tunnel_port = int(self.relay.server_url.rpartition(":")[2].partition("/")[0])
        self.door = Door(self.relay.port)

    async def open(self) -> None:
        self.relay = Relay(
            keys=KEYS, domain=DOMAIN, port=self._port, tunnel_port=self._tunnel_port, hold_timeout=HOLD_TIMEOUT
        )
        await self.relay.start()
        self._violations.append(self.relay.violations)

    async def close(self) -> None:
        await self.relay.aclose()

    @property
    def violations(self) -> list[str]:
        """Each breach of the protocol by our client."""
        return [violation for violations in self._violations for violation in violations]


class Faults:
    """Injects faults until it is cancelled."""

    def __init__(self, ground: Ground, book: Book, *, every: int, restart_every: int, seed: int) -> None:
        self.injected: Counter[str] = Counter()
        self._ground = ground
        self._book = book
        self._every = every
        self._restart_every = restart_every
        self._random = Random(f"faults {seed}")
        self._tasks: asyncio.TaskGroup
        self._silent: set[Tunnel] = set()
        self._common: dict[Callable[[], Awaitable[None]], int] = {
            self._cut: 8,
            self._drop: 6,
            self._stall: 6,
            self._close: 2,
            self._breach: 2,
            self._refuse: 2,
            self._hang: 1,
        }

    async def run(self) -> None:
        due, restart_due = self._every, self._restart_every
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                await self._book.wait_done(due)
                due += self._every
                if self._book.done >= restart_due:
                    restart_due += self._restart_every
                    await self._restart()
                else:
                    [fault] = self._random.choices(list(self._common), list(self._common.values()))
                    await fault()

    # Those that end a WebSocket

    async def _cut(self) -> None:
        if tunnel := self._choose(lambda tunnel: tunnel.state != "closed"):
            self._doom(tunnel, "cut")
            tunnel.cut()

    async def _close(self) -> None:
        if tunnel := self._choose(self._can_be_told):
            self._doom(tunnel, "close")
            self._tasks.create_task(self._bounded(tunnel.close(1011, "a fault")))

    async def _breach(self) -> None:
        """The tunnel server itself breaks the protocol."""
        if tunnel := self._choose(self._can_be_told):
            self._doom(tunnel, "breach")
            message = "x" * 10_000 if tunnel.state == "waiting" else "CONNECT: 192.0.2.1"
            self._tasks.create_task(self._bounded(tunnel.send_raw(message)))

    async def _drop(self) -> None:
        if tunnel := self._choose(self._can_be_dropped):
            self._tasks.create_task(self._bounded(self._drop_visitor(tunnel, cast(Visitor, tunnel.visitor))))

    async def _drop_visitor(self, tunnel: Tunnel, visitor: Visitor) -> None:
        if tunnel.visitor is not visitor:
            return
        try:
            self._mark(tunnel, "drop")
            await tunnel.drop("a fault")
            self._count("drop")
        except LocalProtocolError:  # the client has not been told of the visitor yet
            self._ground.door.connections.unmark(_port(visitor), "drop")

    def _doom(self, tunnel: Tunnel, fault: str) -> None:
        """Whoever is on this WebSocket from now until it is gone has an excuse."""
        self._count(fault)
        self._mark(tunnel, fault)
        self._tasks.create_task(self._mark_until_gone(self._ground.relay, tunnel, fault))

    async def _mark_until_gone(self, relay: Relay, tunnel: Tunnel, fault: str) -> None:
        def gone(relay: Relay) -> bool:
            self._mark(tunnel, fault)
            return tunnel not in relay.tunnels

        await relay.wait_until(gone)

    # Those that only delay

    async def _stall(self) -> None:
        if tunnel := self._choose(lambda tunnel: tunnel.state != "closed" and tunnel not in self._silent):
            self._count("stall")
            self._tasks.create_task(self._be_silent(tunnel, self._random.uniform(*STALL)))

    async def _be_silent(self, tunnel: Tunnel, seconds: float) -> None:
        self._silent.add(tunnel)
        tunnel.stall()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._silent.discard(tunnel)
            tunnel.unstall()

    async def _refuse(self) -> None:
        self._count("refuse")
        self._ground.relay.refuse(503)
        await self._accept_later()

    async def _hang(self) -> None:
        self._count("hang")
        self._ground.relay.hang()
        await self._accept_later()

    async def _accept_later(self) -> None:
        try:
            await asyncio.sleep(self._random.uniform(*REFUSAL))
        finally:
            self._ground.relay.accept()

    # The one that hits all

    async def _restart(self) -> None:
        self._count("restart")
        door = self._ground.door
        door.open.clear()
        door.connections.mark_all("restart")
        await self._ground.close()
        await asyncio.sleep(self._random.uniform(*DOWN))
        await self._ground.open()
        door.open.set()

    # Shared

    def _count(self, fault: str) -> None:
        self.injected[fault] += 1

    def _mark(self, tunnel: Tunnel, fault: str) -> None:
        if tunnel.visitor is not None:
            self._ground.door.connections.mark(_port(tunnel.visitor), fault)

    def _choose(self, fit: Callable[[Tunnel], bool]) -> Tunnel | None:
        found = [tunnel for tunnel in self._ground.relay.tunnels if fit(tunnel)]
        return self._random.choice(found) if found else None

    def _can_be_told(self, tunnel: Tunnel) -> bool:
        return tunnel.state in ("waiting", "open") and tunnel not in self._silent

    def _can_be_dropped(self, tunnel: Tunnel) -> bool:
        visitor = tunnel.visitor
        return visitor is not None and not visitor.dropped and tunnel.state == "open" and self._can_be_told(tunnel)

    async def _bounded(self, sending: Awaitable[None]) -> None:
        with suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(SEND_TIMEOUT):
                await sending


def _port(visitor: Visitor) -> int:
    port: int = visitor.transport.get_extra_info("peername")[1]
    return port
