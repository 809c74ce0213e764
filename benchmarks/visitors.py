"""What visitors do. Each checks every byte it gets, and counts what it completed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.entrances import Entrance, Line, Wrong
from benchmarks.payload import EVENT

EVENT_CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)

_HEAD_END = b"\r\n\r\n"


class Meter:
    """Counts operations, and tells visitors when it is over."""

    def __init__(self) -> None:
        self.operations = 0
        self.over = False
        loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = loop.create_future()
        self._left: asyncio.Future[None] = loop.create_future()
        self._present: set[Guest] = set()

    def enter(self, guest: Guest) -> None:
        self._present.add(guest)

    def leave(self, guest: Guest) -> None:
        self._present.discard(guest)
        if not self._present and not self._left.done():
            self._left.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Let ``run_for`` and ``end`` raise this."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def run_for(self, seconds: float) -> None:
        """Let visitors do what they do for so long."""
        await asyncio.wait([self._failure], timeout=seconds)
        self._check()

    async def until(self, what: asyncio.Future[Any]) -> None:
        """Let visitors do what they do until this."""
        await asyncio.wait([self._failure, what], return_when=asyncio.FIRST_COMPLETED)
        self._check()

    async def end(self) -> None:
        """Let them finish what they are at, and leave."""
        self.over = True
        await self.until(self._left)

    def abandon(self) -> None:
        """Cut off whoever is still there."""
        self.over = True
        for guest in list(self._present):
            guest.vanish()

    def _check(self) -> None:
        if self._failure.done():
            self._failure.result()


@dataclass(frozen=True)
class Exchange:
    """A request and the body of its answer."""

    request: bytes
    answer: bytes

    @classmethod
    def of(cls, method: str, path: str, answer: bytes, *, body: bytes = b"", close: bool = False) -> Exchange:
        """An HTTP request as a plain client sends it, in one piece."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "User-Agent: benchmarks", "Accept: */*"]
        lines += [f"Content-Length: {len(body)}"] if body or method == "POST" else []
        lines += ["Connection: close"] if close else []
        return cls("\r\n".join([*lines, "", ""]).encode() + body, answer)


class Guest:
    """What all visitors share: they read an answer to its head, then exactly the bytes they expect."""

    status = b"HTTP/1.1 200 "

    def __init__(self, meter: Meter, entrance: Entrance) -> None:
        self._meter = meter
        self._entrance = entrance
        self._line: Line | None = None
        self._head: bytes | None = None  # what came of it, None if none is awaited
        self._expected = b""
        self._position = 0
        self._leaving = False
        meter.enter(self)

    def connected(self, line: Line) -> None:
        self._line = line
        if self._leaving:
            line.end()
        else:
            self.begin()

    def received(self, data: bytes) -> None:
        if self._leaving:
            return  # the app's last words
        if self._head is not None:
            head, end, data = (self._head + data).partition(_HEAD_END)
            if not end:
                self._head = head
                return
            self._head = None
            self.read_head(head)
        if not self._expected.startswith(data, self._position):
            raise Wrong(f"{data[:80]!r} ... is not the answer expected")
        self._position += len(data)
        if self._position == len(self._expected):
            self.answered()

    def ended(self) -> None:
        if self._leaving:
            self._meter.leave(self)
        else:
            self.closed()

    def say(self, data: bytes) -> None:
        """Send bytes."""
        assert self._line is not None
        self._line.write(data)

    def leave(self) -> None:
        """End the connection."""
        self._leaving = True
        if self._line is not None:
            self._line.end()

    def vanish(self) -> None:
        """Break the connection; an answer still on the way is no matter."""
        self._leaving = True
        if self._line is not None:
            self._line.abort()

    def expect(self, answer: bytes, *, head: bool) -> None:
        """Say what the next bytes must be."""
        self._head = b"" if head else None
        self._expected = answer
        self._position = 0

    def come_again(self) -> None:
        """One connection is one operation."""
        self._meter.operations += 1
        if self._meter.over:
            self._meter.leave(self)
        else:
            self._entrance.admit(self)

    def read_head(self, head: bytes) -> None:
        """Check the head of an answer."""
        if not head.startswith(self.status):
            raise Wrong(f"{head!r} is not the answer expected")

    def begin(self) -> None:
        """Say something on a new connection."""
        raise NotImplementedError

    def answered(self) -> None:
        """All that was expected came."""
        raise NotImplementedError

    def closed(self) -> None:
        """The server closed the connection."""
        raise Wrong("the connection ended early")


class Regular(Guest):
    """Stays on one connection, and asks again and again. The first exchange may be another one."""

    def __init__(self, meter: Meter, entrance: Entrance, exchange: Exchange, first: Exchange | None = None) -> None:
        super().__init__(meter, entrance)
        self._exchange = exchange
        self._first = first or exchange

    def begin(self) -> None:
        self.ask(self._first)

    def ask(self, exchange: Exchange) -> None:
        self.expect(exchange.answer, head=True)
        self.say(exchange.request)

    def answered(self) -> None:
        self._meter.operations += 1
        if self._meter.over:
            self.leave()
        else:
            self.ask(self._exchange)


class Newcomer(Guest):
    """Makes a new connection for every request; the server closes it."""

    def __init__(self, meter: Meter, entrance: Entrance, exchange: Exchange) -> None:
        super().__init__(meter, entrance)
        self._exchange = exchange
        self._served = False

    def begin(self) -> None:
        self._served = False
        self.expect(self._exchange.answer, head=True)
        self.say(self._exchange.request)

    def answered(self) -> None:
        self._served = True

    def closed(self) -> None:
        if not self._served:
            super().closed()
        self.come_again()


class Passer(Guest):
    """Connects, says nothing and leaves: the cost of a visitor connection as such."""

    def connected(self, line: Line) -> None:
        line.end()

    def received(self, data: bytes) -> None:
        raise Wrong(f"{data[:80]!r} came unasked")

    def closed(self) -> None:
        self.come_again()


class Chatter(Guest):
    """Opens a WebSocket and sends one message after the other, each when the one before has come back."""

    status = b"HTTP/1.1 101 "
    _handshake = (
        b"GET /echo HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )

    def __init__(self, meter: Meter, entrance: Entrance, message: bytes) -> None:
        super().__init__(meter, entrance)
        mask = b"\x12\x34\x56\x78"
        masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(message))
        self._question = bytes([0x82, 0x80 + len(message)]) + mask + masked
        self._answer = bytes([0x82, len(message)]) + message
        self._open = False

    def begin(self) -> None:
        self.expect(b"", head=True)
        self.say(self._handshake)

    def answered(self) -> None:
        self._meter.operations += self._open
        self._open = True
        if self._meter.over:
            self.leave()
        else:
            self.expect(self._answer, head=False)
            self.say(self._question)


class Audience:
    """Subscribers of server-sent events, and a publisher who sends the next one when all have had the last."""

    def __init__(
        self, meter: Meter, entrance: Entrance, size: int, *, subscription: bytes, publication: Exchange
    ) -> None:
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.subscribers = [Subscriber(meter, entrance, self, subscription) for _ in range(size)]
        self._meter = meter
        self._publisher = Publisher(meter, entrance, self, publication)
        self._unheard = size
        for subscriber in self.subscribers:
            entrance.admit(subscriber)
        self.complete.add_done_callback(lambda _: entrance.admit(self._publisher))

    def heard(self) -> None:
        """One more has subscribed, or has had the last event, or its answer if it is the publisher."""
        self._unheard -= 1
        if self._unheard:
            return
        self._unheard = len(self.subscribers) + 1
        if not self.complete.done():
            self.complete.set_result(None)
        elif self._meter.over:
            for guest in (self._publisher, *self.subscribers):
                guest.leave()
        else:
            self._publisher.begin()


class Subscriber(Guest):
    """Gets one event after the other. Each is an operation."""

    def __init__(self, meter: Meter, entrance: Entrance, audience: Audience, subscription: bytes) -> None:
        super().__init__(meter, entrance)
        self._audience = audience
        self._subscription = subscription
        self._subscribed = False

    def begin(self) -> None:
        self.expect(b"", head=True)
        self.say(self._subscription)

    def answered(self) -> None:
        self._meter.operations += self._subscribed
        self._subscribed = True
        self.expect(EVENT_CHUNK, head=False)
        self._audience.heard()


class Publisher(Guest):
    """Has an event sent to every subscriber."""

    def __init__(self, meter: Meter, entrance: Entrance, audience: Audience, publication: Exchange) -> None:
        super().__init__(meter, entrance)
        self._audience = audience
        self._publication = publication

    def begin(self) -> None:
        self.expect(self._publication.answer, head=True)
        self.say(self._publication.request)

    def answered(self) -> None:
        self._audience.heard()


class Crowd:
    """Visitors who all come at once, ask one thing each and stay. ``complete`` is done when all have their answer."""

    def __init__(self, meter: Meter, entrance: Entrance, size: int, exchange: Exchange) -> None:
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_bytes: list[float] = []
        """Seconds until each visitor's answer began."""
        self._came = time.perf_counter()
        self._unserved = size
        self._stayers = [Stayer(meter, entrance, self, exchange) for _ in range(size)]
        for stayer in self._stayers:
            entrance.admit(stayer)

    def answer_began(self) -> None:
        self.first_bytes.append(time.perf_counter() - self._came)

    def served(self) -> None:
        """One more has its answer."""
        self._unserved -= 1
        if not self._unserved:
            self.complete.set_result(None)

    def leave(self) -> None:
        """Let all of them go."""
        for stayer in self._stayers:
            stayer.leave()


class Stayer(Guest):
    """Asks one thing and stays."""

    def __init__(self, meter: Meter, entrance: Entrance, crowd: Crowd, exchange: Exchange) -> None:
        super().__init__(meter, entrance)
        self._crowd = crowd
        self._exchange = exchange

    def begin(self) -> None:
        self.expect(self._exchange.answer, head=True)
        self.say(self._exchange.request)

    def read_head(self, head: bytes) -> None:
        super().read_head(head)
        self._crowd.answer_began()

    def answered(self) -> None:
        self._crowd.served()
