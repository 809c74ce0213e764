"""Visitors who come, ask, check and come back, and the book in which each outcome is written down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from random import Random

from websockets.exceptions import WebSocketException

from tests.soak.connection import Connection, Connections, Wrong
from tests.soak.kinds import MEETING, Kind, Request

__all__ = ["OK", "Book", "Visitor"]

REQUEST_TIMEOUT = 240.0  # seconds; twice as long as the relay holds a visitor for whom no WebSocket waits
LEAVE = 0.1  # how likely a visitor closes a connection that could be kept
KEPT = 20  # complaints that are printed

OK = "ok"
WRONG = "WRONG"
HANG = "HANG"
UNEXPLAINED = "UNEXPLAINED"


class Book:
    """Every outcome: of which kind of request, and right or wrong or failed for which fault."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.complaints: list[str] = []
        self.done = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def note(self, kind: Kind, outcome: str) -> None:
        self.outcomes[kind.name, outcome] += kind.requests
        self.done += kind.requests
        for number, reached in self._waiting:
            if self.done >= number and not reached.done():
                reached.set_result(None)

    def complain(self, text: str) -> None:
        if len(self.complaints) < KEPT:
            self.complaints.append(text)

    async def wait_done(self, number: int) -> None:
        """Until this many requests are over."""
        if self.done >= number:
            return
        entry = (number, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await entry[1]
        finally:
            self._waiting.remove(entry)

    def total(self, *outcomes: str) -> int:
        return sum(count for (_, outcome), count in self.outcomes.items() if outcome in outcomes)


class Door:
    """Where visitors come in: shut while the relay is being replaced."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = Connections()
        self.open = asyncio.Event()
        self.open.set()


class Visitor:
    """One of many. What it does follows from the seed and its number alone."""

    def __init__(self, number: str, door: Door, book: Book, kinds: Sequence[Kind], seed: int) -> None:
        self._number = number
        self._door = door
        self._book = book
        self._kinds = kinds
        self._weights = [kind.weight for kind in kinds]
        self._random = Random(f"{seed} {number}")
        self._connection: Connection | None = None

    async def visit(self, requests: int, together: asyncio.Barrier | None = None) -> None:
        """Make this many requests, one after the other; with ``together``, once all visitors have been served."""
        made = 0
        try:
            if together is not None:
                await self._attempt(MEETING, f"{self._number}-together")
                await together.wait()
            while made < requests:
                [kind] = self._random.choices(self._kinds, self._weights)
                await self._attempt(kind, f"{self._number}-{made}")
                made += kind.requests
        finally:
            await self._leave()

    async def _attempt(self, kind: Kind, request_id: str) -> None:
        # Drawn first: what a visitor does next must not depend on how this ends.
        random = Random(f"{request_id} {self._random.random()}")
        leave = self._random.random() < LEAVE and kind is not MEETING
        outcome = await self._judge(kind, request_id, random)
        self._book.note(kind, outcome)
        if leave or kind.closes or outcome != OK:
            await self._leave()

    async def _judge(self, kind: Kind, request_id: str, random: Random) -> str:
        """Make the request; how it went."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                await kind.perform(Request(request_id, await self._connect(kind), random))
        except Wrong as error:
            outcome, reason = WRONG, str(error)
        except TimeoutError:
            outcome, reason = HANG, f"nothing for {REQUEST_TIMEOUT:.0f} s"
        except (OSError, EOFError, WebSocketException) as error:
            outcome, reason = self._explain(), repr(error)
        else:
            return OK
        if outcome in (WRONG, HANG, UNEXPLAINED):
            self._book.complain(f"{outcome} {kind.name} {request_id} faults={self._faults()}: {reason}")
        return outcome

    def _explain(self) -> str:
        """The fault that was injected into this very connection before it failed."""
        faults = self._faults()
        return faults[0] if faults else UNEXPLAINED

    def _faults(self) -> list[str]:
        return [] if self._connection is None else self._connection.faults

    async def _connect(self, kind: Kind) -> Connection:
        if kind.fresh:
            await self._leave()
        if self._connection is None:
            await self._door.open.wait()
            self._connection = Connection()
            self._door.connections.add(self._connection)
            await self._connection.connect(self._door.port)
        if not kind.fresh:
            await self._connection.open_streams()
        return self._connection

    async def _leave(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            self._door.connections.remove(connection)
            await connection.close()
