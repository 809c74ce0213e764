from __future__ import annotations

import asyncio
import itertools
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, serve

from tests.fakes import (
    QUIET,
    Recorder,
    make_config,
    run_on_each_loop,
    run_virtual,
    settle,
    unused_port,
    virtual_loop,
    watch_unhandled,
)
from tests.support import DOMAIN, KEYS, Visitor, run_async, visiting
from tunnel_asgi import pool as pool_module
from tunnel_asgi.connection import CLOSE_TIMEOUT, TunnelConnection, dial
from tunnel_asgi.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    ListenerClosed,
    NoCredits,
    TunnelError,
)
from tunnel_asgi.pool import (
    FIRST_DELAY,
    FRUITLESS,
    MAX_DELAY,
    MAX_RETRY_AFTER,
    MAX_STANDBY,
    PARALLEL_DIALS,
    ROOM_INTERVAL,
    STANDBY,
    SURPLUS_TIME,
    YOUNG,
    TunnelPool,
    adaptive_standby,
    backoff,
)
from tunnel_asgi.relay import Relay


class Answerer(Recorder):
    """Answers what it gets and closes at EOF."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data.upper())


@asynccontextmanager
async def relaying(**options: Any) -> AsyncIterator[Relay]:
    async with Relay(keys=KEYS, domain=DOMAIN, **options) as relay:
        yield relay


class Pool(TunnelPool):
    """A pool whose protocols are at hand."""

    def __init__(
        self, server: Relay | str, standby: int | Callable[[int], int] = 1, *, make: Any = Answerer, **options: Any
    ) -> None:
        self.protocols: list[Any] = []
        self.make = make
        super().__init__(
            make_config(server, **options),
            self._make,
            standby=standby if callable(standby) else lambda visitors: standby,
            extra={"sockname": ("public.example", 443)},
        )

    def _make(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self.make()
        self.protocols.append(protocol)
        return protocol


@asynccontextmanager
async def pooling(server: Relay | str, standby: int | Callable[[int], int] = 1, **options: Any) -> AsyncIterator[Pool]:
    """A pool that serves; at the end it is closed and must leave no timer."""
    pool = Pool(server, standby, **options)
    try:
        await pool.start_serving()
        yield pool
    finally:
        await pool.aclose()
        assert (pool.waiting, pool.busy) == (0, 0)
        assert not any((pool._dials, pool._ending, pool._opened_at, pool._visited, pool._waiters))
        loop: Any = asyncio.get_running_loop()
        timers = [timer for timer in getattr(loop, "_scheduled", []) if not timer.cancelled()]
        assert not [timer for timer in timers if "Tunnel" in repr(timer)], "a timer is left"


async def visit(relay: Relay, question: bytes = b"question") -> bytes:
    async with visiting(relay) as visitor:
        await visitor.send(question)
        visitor.send_eof()
        return await visitor.read_all()


@asynccontextmanager
async def visitors(relay: Relay, n: int) -> AsyncIterator[list[Visitor]]:
    """So many visitors, each of whom got an answer and stays."""
    async with AsyncExitStack() as stack:
        guests = [await stack.enter_async_context(visiting(relay)) for _ in range(n)]
        for guest in guests:
            await guest.send(b"hello")
            assert await guest.read(5) == b"HELLO"
        yield guests


async def until(pool: TunnelPool, predicate: Callable[[], bool]) -> None:
    """Wait until the pool is so; it is asked at every change of state."""
    await pool._wait_until(predicate)


class DialTimes:
    """When each dial reached the relay, on the loop's clock."""

    def __init__(self, relay: Relay) -> None:
        self.times: list[float] = []
        self._relay = relay

    def _look(self, relay: Relay) -> bool:
        now = asyncio.get_running_loop().time()
        self.times.extend([now] * (relay.dials - len(self.times)))
        return False

    async def __aenter__(self) -> DialTimes:
        self._watch = asyncio.ensure_future(self._relay.wait_until(self._look))
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        await asyncio.wait([self._watch])

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


# The standby target


@pytest.mark.parametrize("standby", [1, 4, 20])
@run_on_each_loop
async def test_as_many_websockets_wait_as_standby_says(standby: int) -> None:
    async with relaying() as relay, pooling(relay, standby) as pool:
        await pool.wait_ready()
        await relay.wait_for_waiting(standby)
        await until(pool, lambda: not pool._dials)
        assert (pool.waiting, pool.busy) == (standby, 0)
        assert relay.dials == standby
        assert pool.is_serving()


@run_on_each_loop
async def test_a_visitor_is_replaced_at_once_and_its_websocket_comes_back() -> None:
    async with relaying() as relay, pooling(relay, 2) as pool:
        async with visitors(relay, 3):
            await relay.wait_for_waiting(2)
            assert pool.busy == 3
            assert relay.dials == 5
        await until(pool, lambda: pool.busy == 0 and pool.waiting == 5)
        assert await visit(relay) == b"QUESTION"
        assert relay.dials == 5
        assert relay.violations == []


@run_on_each_loop
async def test_more_wait_while_more_are_taken() -> None:
    async with relaying() as relay, pooling(relay, adaptive_standby(2)) as pool, visitors(relay, 6):
        await until(pool, lambda: (pool.busy, pool.waiting) == (6, 6))


def test_the_adaptive_standby_is_bounded_on_both_sides() -> None:
    standby = adaptive_standby()
    assert [standby(visitors) for visitors in (0, STANDBY, STANDBY + 1, MAX_STANDBY, 10_000)] == [
        STANDBY,
        STANDBY,
        STANDBY + 1,
        MAX_STANDBY,
        MAX_STANDBY,
    ]
    assert adaptive_standby(100)(0) == 100


@run_virtual
async def test_surplus_websockets_are_closed_after_a_while_the_newest_first() -> None:
    async with relaying() as relay, pooling(relay, adaptive_standby(2)) as pool:
        await relay.wait_for_waiting(2)
        async with visitors(relay, 6):
            await relay.wait_for_waiting(6)
        await until(pool, lambda: pool.waiting == 12)
        quiet = virtual_loop().time()
        oldest = list(pool._waiting)[:2]
        await relay.wait_until(lambda relay: len(relay.tunnels) == 2)
        assert SURPLUS_TIME * 0.9 <= virtual_loop().time() - quiet <= SURPLUS_TIME * 1.1
        assert list(pool._waiting) == oldest
        await asyncio.sleep(600)
        assert pool.waiting == 2
        assert relay.dials == 12


@run_virtual
async def test_a_websocket_needed_again_in_time_is_not_closed() -> None:
    needed = 3
    async with relaying() as relay, pooling(relay, lambda visitors: needed) as pool:
        await relay.wait_for_waiting(3)
        needed = 1
        pool.settle()
        await asyncio.sleep(SURPLUS_TIME - 1)
        needed = 2
        pool.settle()
        await asyncio.sleep(600)
        assert (pool.waiting, relay.dials) == (2, 3)


@run_on_each_loop
async def test_standby_is_asked_again_only_after_the_new_protocol_has_its_transport() -> None:
    pending = 1

    class Accepting(Answerer):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal pending
            super().connection_made(transport)
            pending = 0

    async with (
        relaying() as relay,
        pooling(relay, lambda visitors: pending, make=Accepting) as pool,
        visitors(relay, 1),
    ):
        await settle(20)
        assert (pool.waiting, relay.dials) == (0, 1)


@run_on_each_loop
async def test_there_are_never_more_websockets_than_max_connections() -> None:
    async with relaying() as relay, pooling(relay, adaptive_standby(4), max_connections=5) as pool:
        await relay.wait_for_waiting(4)
        async with visitors(relay, 5) as [guest, *_], visiting(relay) as sixth:
            await sixth.send(b"late")
            await settle(20)
            assert (pool.busy, pool.waiting, len(relay.tunnels)) == (5, 0, 5)
            guest.send_eof()
            assert await sixth.read(4) == b"LATE"
            assert relay.dials == 5


class Idler(Answerer):
    """Idle since its last answer, unless it is told to be busy."""

    busy = False
    last = 0.0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.last = asyncio.get_running_loop().time()

    @property
    def idle_since(self) -> float | None:
        return None if self.busy or not self.data else self.last


@run_virtual
async def test_when_every_websocket_is_taken_the_visitor_idle_longest_makes_room_for_the_next() -> None:
    async with (
        relaying() as relay,
        pooling(relay, 2, make=Idler, max_connections=4) as pool,
        visitors(relay, 3) as guests,
    ):
        await relay.wait_for_waiting(1)
        for guest in (guests[2], guests[0], guests[1]):
            await asyncio.sleep(2)
            await guest.send(b"more")
            assert await guest.read(4) == b"MORE"
        await asyncio.sleep(600)
        assert pool.busy == 3, "nobody had to go while a WebSocket waited"
        async with AsyncExitStack() as stack:
            for longest_idle in (2, 0):
                newcomer = await stack.enter_async_context(visiting(relay))
                await newcomer.send(b"me too")
                assert await newcomer.read(6) == b"ME TOO"
                assert await guests[longest_idle].read_all() == b""
                await guests[longest_idle].close()
                await relay.wait_for_waiting(1)
            assert not guests[1].reader.at_eof()
        assert relay.dials == 4


@run_virtual
async def test_nobody_is_closed_who_is_not_idle_and_whoever_becomes_idle_makes_room_within_a_second() -> None:
    class Busy(Idler):
        busy = True

    async with (
        relaying() as relay,
        pooling(relay, 1, make=Busy, max_connections=2) as pool,
        visitors(relay, 2) as guests,
        visiting(relay) as held,
    ):
        await held.send(b"late")
        await asyncio.sleep(5)
        assert pool.busy == 2
        pool.protocols[1].busy = False
        asked = virtual_loop().time()
        assert await guests[1].read_all() == b""
        await guests[1].close()
        assert await held.read(4) == b"LATE"
        assert virtual_loop().time() - asked <= ROOM_INTERVAL
        guests[0].reset()


@run_virtual
async def test_a_visitor_who_does_not_go_when_told_to_is_not_waited_for() -> None:
    async with (
        relaying() as relay,
        pooling(relay, 1, make=Idler, max_connections=3) as pool,
        visitors(relay, 3) as guests,
    ):
        start = virtual_loop().time()
        for guest in guests[:2]:
            assert await guest.read_all() == b""  # but it keeps its own direction open
        assert virtual_loop().time() - start <= 2 * ROOM_INTERVAL
        await guests[1].close()
        await until(pool, lambda: pool.waiting == 1)
        await asyncio.sleep(5)
        assert pool.busy == 2


@run_virtual
async def test_no_room_is_made_for_visitors_nobody_wants() -> None:
    def wanted(visitors: int) -> int:
        return 0 if visitors else 1

    async with (
        relaying() as relay,
        pooling(relay, wanted, make=Idler, max_connections=1) as pool,
        visiting(relay) as guest,
    ):
        await guest.send(b"hello")
        assert await guest.read(5) == b"HELLO"
        await asyncio.sleep(600)
        assert pool.busy == 1


@run_virtual
async def test_a_websocket_that_is_being_closed_counts_until_it_is_gone() -> None:
    async with relaying() as relay, pooling(relay, 2, max_connections=2) as pool:
        await until(pool, lambda: pool.waiting == 2)
        for tunnel in relay.tunnels:
            tunnel.stall()
        next(iter(pool._waiting)).close(1000)
        assert pool.waiting == 1
        await asyncio.sleep(CLOSE_TIMEOUT - 0.1)
        assert (pool.waiting, relay.dials) == (1, 2)
        await until(pool, lambda: pool.waiting == 2)


@run_virtual
async def test_no_more_dials_run_at_once_than_the_machine_can_bear() -> None:
    async with relaying() as relay, pooling(relay, 100) as pool:
        relay.hang()
        await relay.wait_until(lambda relay: relay.dials == PARALLEL_DIALS)
        await asyncio.sleep(1)
        assert relay.dials == len(pool._dials) == PARALLEL_DIALS
        relay.accept()
        await relay.wait_for_waiting(100)


# Visitors


@run_on_each_loop
async def test_a_transport_knows_the_visitor_and_what_the_pool_was_told_to_add() -> None:
    async with relaying() as relay, pooling(relay) as pool, visitors(relay, 1):
        [protocol] = pool.protocols
        info = protocol.transport.get_extra_info
        assert info("peername") == ("127.0.0.1", 0)
        assert info("sockname") == ("public.example", 443)
        assert info("domain") == str(DOMAIN)
        visitor = relay.tunnels[0].visitor
        assert visitor is not None
        assert info("connection_id") == visitor.id
        assert info("sslcontext") is None


@run_on_each_loop
async def test_a_visitor_whose_protocol_cannot_be_made_gets_an_end_and_the_next_one_an_answer() -> None:
    unhandled = watch_unhandled()

    def make() -> asyncio.BaseProtocol:
        if not unhandled:
            raise LookupError("no protocol today")
        return Answerer()

    async with relaying() as relay, pooling(relay, make=make) as pool:
        assert await visit(relay) == b""
        assert await visit(relay) == b"QUESTION"
        assert [type(report["exception"]) for report in unhandled] == [LookupError]
        assert relay.dials == pool.waiting + pool.busy
        assert relay.violations == []


@run_on_each_loop
async def test_a_protocol_factory_may_close_the_pool_and_its_visitor_is_still_served() -> None:
    def make() -> asyncio.BaseProtocol:
        pool.close()
        return Answerer()

    async with relaying() as relay, pooling(relay, make=make) as pool:
        assert await visit(relay) == b"QUESTION"
        await pool.wait_closed()
        assert relay.visitors_served == 1


@run_on_each_loop
async def test_a_cut_takes_its_own_visitor_only_and_is_replaced() -> None:
    async with relaying() as relay, pooling(relay, 2) as pool, visitors(relay, 2) as [first, second]:
        await relay.wait_for_waiting(2)
        relay.tunnels[0].cut()
        with pytest.raises(ConnectionResetError):
            await first.read_all()
        await second.send(b"again")
        assert await second.read(5) == b"AGAIN"
        await until(pool, lambda: pool.waiting == 2)


@pytest.mark.parametrize("message", ["CONNECT: 203.0.113.8", b"\x00" * 2000])
@run_on_each_loop
async def test_a_websocket_on_which_the_server_breaks_the_protocol_is_replaced(message: str | bytes) -> None:
    async with relaying() as relay, pooling(relay, max_message_size=1000) as pool, visitors(relay, 1) as [guest]:
        await relay.wait_for_waiting(1)
        await relay.tunnels[0].send_raw(message)
        with pytest.raises(ConnectionResetError):
            await guest.read_all()
        await until(pool, lambda: pool.busy == 0)
        assert await visit(relay) == b"QUESTION"


@run_virtual
async def test_bytes_on_a_waiting_websocket_close_it_and_another_one_is_dialled() -> None:
    async with relaying() as relay, pooling(relay) as pool:
        await relay.wait_for_waiting()
        await relay.tunnels[0].send_raw(b"stale")
        await relay.wait_until(lambda relay: relay.dials == 2)
        assert await visit(relay) == b"QUESTION"
        assert pool.failure is None


# A server that fails


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_backoff_grows_by_half_up_to_30_seconds_and_each_step_is_shortened_by_up_to_a_half(seed: int, n: int) -> None:
    random.seed(seed)
    for step, delay in enumerate(itertools.islice(backoff(), n)):
        full = min(1.5**step, MAX_DELAY)
        assert full / 2 <= delay <= full


def test_two_processes_do_not_return_in_step() -> None:
    delays = [list(itertools.islice(backoff(), 10)) for _ in range(20)]
    assert len({tuple(steps) for steps in delays}) == 20


@run_virtual
async def test_a_failing_server_is_dialled_with_backoff_by_one_dial_at_a_time_and_served_wide_open_after() -> None:
    async with relaying() as relay, DialTimes(relay) as dials:
        relay.refuse(503)
        async with pooling(relay, 4) as pool:
            await relay.wait_until(lambda relay: relay.refused == 4 + 20)
            assert max(dials.gaps[:3]) == 0, "the first four leave together"
            for step, gap in enumerate(dials.gaps[3:]):
                full = min(1.5**step, MAX_DELAY)
                assert full / 2 - 0.01 <= gap <= full + 0.01
            relay.accept()
            relay.hang()
            await relay.wait_until(lambda relay: relay.dials == 25)
            await asyncio.sleep(5)
            assert relay.dials == 25
            relay.accept()
            start = virtual_loop().time()
            await until(pool, lambda: pool.waiting == 4)
            assert virtual_loop().time() - start < 0.1
            assert relay.dials == 28


@run_virtual
async def test_after_a_good_while_backoff_starts_again_at_one_second() -> None:
    async with relaying() as relay, pooling(relay, 1) as pool, DialTimes(relay) as dials:
        relay.refuse(503, times=12)
        await until(pool, lambda: pool.waiting == 1)
        assert dials.gaps[-1] > 10
        await asyncio.sleep(YOUNG + 1)
        relay.refuse(503, times=1)
        relay.tunnels[0].cut()
        await until(pool, lambda: pool.waiting == 0)
        await until(pool, lambda: pool.waiting == 1)
        assert dials.gaps[-1] <= 1.01


@run_virtual
async def test_a_success_dialled_before_the_failure_does_not_open_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    failed = asyncio.Event()

    async def dial_in_order(*arguments: Any) -> None:
        if next(calls) < 2:
            failed.set()
            raise ConnectionFailed("ws://127.0.0.1", "not yet")
        await failed.wait()
        await dial(*arguments)

    monkeypatch.setattr(pool_module, "dial", dial_in_order)
    async with relaying() as relay, pooling(relay, 5) as pool:
        await until(pool, lambda: pool.waiting == 3)
        assert relay.dials == 3
        relay.hang()
        await relay.wait_until(lambda relay: relay.dials == 4)
        await asyncio.sleep(3)
        assert relay.dials == 4, "both that failed were dialled again at once"
        relay.accept()
        await until(pool, lambda: pool.waiting == 5)


@pytest.mark.parametrize("status", [429, 503])
@run_virtual
async def test_retry_after_is_honoured_with_jitter(status: int) -> None:
    async with relaying() as relay, DialTimes(relay) as dials:
        relay.refuse(status, times=2, headers={"Retry-After": "60"})
        async with pooling(relay, 1) as pool:
            await pool.wait_ready()
            assert 60.4 <= dials.gaps[0] <= 61.1
            assert 60.7 <= dials.gaps[1] <= 61.6


@run_virtual
async def test_a_retry_after_without_measure_is_cut_short() -> None:
    async with relaying() as relay, DialTimes(relay) as dials:
        relay.refuse(503, times=1, headers={"Retry-After": "9" * 400})
        async with pooling(relay, 1) as pool:
            await pool.wait_ready()
            assert dials.gaps[0] <= MAX_RETRY_AFTER + 1.1


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "tunnel_asgi" and record.levelno >= level
    ]


@run_virtual
async def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with relaying() as relay:
        relay.refuse(503, times=30)
        async with pooling(relay, 4) as pool:
            await until(pool, lambda: pool.waiting == 4)
            assert [level for level, _ in messages(caplog)] == ["WARNING"]
            assert "503; trying again until it answers" in messages(caplog)[0][1]
            await asyncio.sleep(YOUNG + 1)
            assert messages(caplog)[1:] == [("INFO", "the tunnel server answers again")]
            await asyncio.sleep(600)
            relay.refuse(503, times=3)
            for tunnel in relay.tunnels:
                tunnel.cut()
            await until(pool, lambda: pool.waiting == 0)
            await until(pool, lambda: pool.waiting == 4)
            await asyncio.sleep(YOUNG + 1)
    assert [level for level, _ in messages(caplog)] == ["WARNING", "INFO"] * 2


@pytest.mark.parametrize("status", [401, 402, 403, 404])
@run_virtual
async def test_a_failure_no_retry_can_mend_stops_dialling_and_is_raised(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {401: AuthenticationFailed, 402: NoCredits, 403: AuthenticationFailed, 404: BadRequest}
    async with relaying() as relay:
        relay.refuse(status)
        async with pooling(relay, 1) as pool:
            for waiting in (pool.wait_ready, pool.wait_over, pool.wait_ready):
                with pytest.raises(kinds[status]) as raised:
                    await waiting()
                assert raised.value is pool.failure
            assert not pool.is_serving()
            dials = relay.dials
            relay.accept()
            pool.settle()
            await pool.start_serving()
            await asyncio.sleep(600)
            assert relay.dials == dials
    assert messages(caplog, logging.WARNING) == []


@run_on_each_loop
async def test_visitors_go_on_when_the_key_is_revoked() -> None:
    async with relaying() as relay, pooling(relay) as pool:
        await relay.wait_for_waiting()
        relay.refuse(403)
        async with visitors(relay, 1) as [guest]:
            with pytest.raises(AuthenticationFailed):
                await pool.wait_over()
            await guest.send(b"still")
            assert await guest.read(5) == b"STILL"


@run_virtual
async def test_what_goes_wrong_in_a_way_nobody_thought_of_is_a_failure_and_not_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*_: Any) -> None:
        raise LookupError("surprise")

    monkeypatch.setattr(pool_module, "dial", broken)
    async with pooling("ws://127.0.0.1:9", 3) as pool:
        with pytest.raises(TunnelError, match="surprise") as raised:
            await pool.wait_ready()
        assert isinstance(raised.value.__cause__, LookupError)


@asynccontextmanager
async def hostile_server(serve_one: Callable[[ServerConnection], Any]) -> AsyncIterator[tuple[str, list[float]]]:
    """A tunnel server that does as it likes; its URL, and when it was dialled."""
    dials: list[float] = []

    async def handler(ws: ServerConnection) -> None:
        dials.append(asyncio.get_running_loop().time())
        await serve_one(ws)

    async with serve(handler, "127.0.0.1", compression=None, logger=QUIET) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}/tunnels", dials


async def close_at_once(ws: ServerConnection) -> None:
    await ws.close(1008, "not today")


async def cut_at_once(ws: ServerConnection) -> None:
    ws.transport.abort()


async def break_the_protocol(ws: ServerConnection) -> None:
    await ws.send(b"unasked")
    await ws.wait_closed()


async def connect_and_cut(ws: ServerConnection) -> None:
    await ws.send("CONNECT: 203.0.113.7")
    ws.transport.abort()


async def connect_twice(ws: ServerConnection) -> None:
    await ws.send("CONNECT: 203.0.113.7")
    await ws.send("CONNECT: 203.0.113.7")
    await ws.wait_closed()


async def send_nobody_and_close(ws: ServerConnection) -> None:
    """A whole visit, EOF to RESET, by a visitor who wants nothing."""
    await ws.send("CONNECT: 203.0.113.7")
    await ws.send(b"")
    assert await ws.recv() == b""
    assert await ws.recv() == "RESET"


async def answer_and_close(ws: ServerConnection) -> None:
    await ws.send("CONNECT: 203.0.113.7")
    await ws.send(b"question")
    assert await ws.recv() == b"QUESTION"
    await ws.send(b"")
    assert await ws.recv() == b""
    assert await ws.recv() == "RESET"


@pytest.mark.parametrize(
    "serve_one",
    [close_at_once, cut_at_once, break_the_protocol, connect_and_cut, connect_twice, send_nobody_and_close],
)
@run_virtual
async def test_a_server_that_accepts_and_then_fails_is_not_dialled_in_a_loop(
    serve_one: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with hostile_server(serve_one) as (url, dials), pooling(url, 4):
        await asyncio.sleep(3600)
        # After the first burst: at most one wide open door (4) for each of some 130 steps of 15 to 30 s.
        assert 60 < len(dials) < 1200
        last_hour = [at for at in dials if at > dials[0] + 300]
        assert max(map(len, by_second(last_hour).values())) <= 4
    assert [level for level, _ in messages(caplog)] == ["WARNING"]


def by_second(times: list[float]) -> dict[int, list[float]]:
    return {second: list(group) for second, group in itertools.groupby(times, key=int)}


@run_virtual
async def test_a_server_that_ends_each_websocket_after_its_visitor_was_answered_is_dialled_for_the_next_at_once() -> (
    None
):
    visits, enough = itertools.count(1), asyncio.Event()

    async def serve_many(ws: ServerConnection) -> None:
        if next(visits) < 10 * FRUITLESS:
            await answer_and_close(ws)
        else:
            enough.set()
            await ws.wait_closed()

    async with hostile_server(serve_many) as (url, dials), pooling(url, 2) as pool:
        await enough.wait()
        assert dials[-1] - dials[0] < 1
        assert not pool._failing


@run_virtual
async def test_a_few_visitors_lost_with_young_websockets_are_no_reason_to_wait() -> None:
    async with relaying() as relay, pooling(relay, 1) as pool, DialTimes(relay) as dials:
        for n in range(3 * FRUITLESS):
            async with visitors(relay, 1):
                await relay.wait_for_waiting()
                next(tunnel for tunnel in relay.tunnels if tunnel.state == "open").cut()
                await until(pool, lambda: pool.busy == 0)
            if n % FRUITLESS == 0:
                assert await visit(relay) == b"QUESTION"
        assert max(dials.gaps) < 0.1
        assert not pool._failing


@run_on_each_loop
async def test_the_pool_is_whole_again_after_the_server_came_back_on_the_same_port() -> None:
    async with relaying() as relay:
        port = int(relay.server_url.rpartition(":")[2].partition("/")[0])
        pool = Pool(relay, 3)
        await pool.start_serving()
        await relay.wait_for_waiting(3)
        async with visitors(relay, 1):
            await relay.wait_for_waiting(3)
            await relay.aclose()
    await until(pool, lambda: pool._failing and pool.waiting == 0 and pool.busy == 0)
    async with relaying(tunnel_port=port) as relay:
        await relay.wait_for_waiting(3)
        assert await visit(relay) == b"QUESTION"
        await pool.aclose()


@run_virtual
async def test_the_pool_is_whole_again_within_a_second_of_a_restart() -> None:
    async with relaying() as relay:
        port = int(relay.server_url.rpartition(":")[2].partition("/")[0])
        pool = Pool(relay, adaptive_standby(20))
        await pool.start_serving()
        await until(pool, lambda: pool.waiting == 20)
        await asyncio.sleep(60)
    await until(pool, lambda: pool._failing and not pool.waiting)
    async with relaying(tunnel_port=port) as relay:
        start = virtual_loop().time()
        await until(pool, lambda: pool.waiting == 20)
        assert virtual_loop().time() - start <= FIRST_DELAY + 0.05
        assert await visit(relay) == b"QUESTION"
        await pool.aclose()


@run_virtual
async def test_an_hour_without_a_server_ends_at_most_one_step_after_it_is_back() -> None:
    port = unused_port()
    async with pooling(f"ws://127.0.0.1:{port}/tunnels", 4) as pool:
        await asyncio.sleep(3600)
        async with relaying(tunnel_port=port) as relay:
            start = virtual_loop().time()
            await pool.wait_ready()
            assert virtual_loop().time() - start <= MAX_DELAY + 0.1
            assert await visit(relay) == b"QUESTION"
            await pool.aclose()


@run_virtual
async def test_a_token_that_expired_during_an_outage_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    started, loop = time.time(), virtual_loop()
    began = loop.time()
    monkeypatch.setattr(time, "time", lambda: started + loop.time() - began)
    async with relaying(clock=lambda: started + loop.time() - began) as relay:
        relay.refuse(503)
        pool = TunnelPool(make_config(relay), Answerer, standby=lambda visitors: 1)
        pool._jwt._clock = lambda: started + loop.time() - began
        await pool.start_serving()
        await asyncio.sleep(2 * 3600)
        relay.accept()
        await pool.wait_ready()
        assert pool.failure is None
        await pool.aclose()


@pytest.mark.parametrize("ahead", [-600, 600])
@run_virtual
async def test_a_clock_that_is_ten_minutes_off_is_named_when_the_key_is_refused(ahead: int) -> None:
    async with relaying(clock=lambda: time.time() - ahead) as relay:
        relay.refuse(401)
        async with pooling(relay, 1) as pool:
            with pytest.raises(AuthenticationFailed) as raised:
                await pool.wait_ready()
    direction = "ahead of" if ahead > 0 else "behind"
    assert re.search(rf"this machine's clock is (599|600|601) s {direction} the server's", str(raised.value))


# A path that fails


@run_virtual
async def test_a_path_that_goes_silent_is_given_up_after_40_seconds_and_the_pool_is_whole_again() -> None:
    async with relaying() as relay, pooling(relay, 2) as pool:
        await relay.wait_for_waiting(2)
        async with visitors(relay, 1):
            await relay.wait_for_waiting(2)
            start = virtual_loop().time()
            stalled = list(relay.tunnels)
            for tunnel in stalled:
                tunnel.stall()
            [protocol] = pool.protocols
            await protocol.lost.wait()
            await relay.wait_until(lambda relay: relay.dials == 3 + 2)
            await until(pool, lambda: pool.waiting == 2 and not pool.busy)
            assert virtual_loop().time() - start <= 41
            for tunnel in stalled:
                tunnel.unstall()
        assert await visit(relay) == b"QUESTION"


@pytest.mark.parametrize("path", ["held", "lost"])
@run_virtual
async def test_a_machine_that_slept_for_an_hour_keeps_what_lives_and_replaces_what_does_not(path: str) -> None:
    async with relaying() as relay, pooling(relay, 2) as pool, visitors(relay, 1) as [guest]:
        await relay.wait_for_waiting(2)
        await asyncio.sleep(7)
        asleep = list(relay.tunnels) if path == "lost" else []
        for tunnel in asleep:
            tunnel.stall()
        virtual_loop().advance(3600)
        if path == "held":
            await guest.send(b"still")
            assert await guest.read(5) == b"STILL"
            await asyncio.sleep(120)
            assert relay.dials == 3, "what lives was given up"
        else:
            start = virtual_loop().time()
            await relay.wait_until(lambda relay: relay.dials == 3 + 2)
            await until(pool, lambda: pool.waiting == 2 and not pool.busy)
            assert virtual_loop().time() - start <= 41
            for tunnel in asleep:
                tunnel.unstall()
            assert await visit(relay) == b"QUESTION"


# The end


@run_on_each_loop
async def test_close_takes_no_more_visitors_and_lets_those_connected_go_on() -> None:
    async with relaying() as relay, pooling(relay, 3) as pool, visitors(relay, 1) as [guest]:
        await relay.wait_for_waiting(3)
        pool.close()
        pool.close()
        assert not pool.is_serving()
        assert (pool.waiting, pool.busy) == (0, 1)
        await relay.wait_until(lambda relay: len(relay.tunnels) == 1)
        closing = asyncio.ensure_future(pool.wait_closed())
        await guest.send(b"still")
        assert await guest.read(5) == b"STILL"
        assert not closing.done()
        guest.send_eof()
        assert await guest.read_all() == b""
        await closing
        await relay.wait_until(lambda relay: not relay.tunnels)
        for waiting in (pool.wait_ready, pool.wait_over):
            with pytest.raises(ListenerClosed):
                await waiting()
        assert relay.violations == []


@run_on_each_loop
async def test_close_does_not_wait_for_a_visitor_who_only_has_to_end() -> None:
    async with relaying() as relay, pooling(relay, 1) as pool, visitors(relay, 1):
        pool.close_clients()
        assert pool.busy == 1, "it drains"
        pool.close()
        await pool.wait_closed()
        assert pool.busy == 0


@run_on_each_loop
async def test_close_clients_ends_every_visitor_in_good_order_after_what_is_written() -> None:
    async with relaying() as relay, pooling(relay, 2) as pool, visitors(relay, 2) as guests:
        for protocol in pool.protocols:
            protocol.transport.write(b"bye")
        pool.close_clients()
        pool.close_clients()
        for guest in guests:
            assert await guest.read_all() == b"bye"
            guest.send_eof()
        await until(pool, lambda: pool.busy == 0)
        assert pool.is_serving()


@run_on_each_loop
async def test_abort_clients_resets_every_visitor_and_the_next_one_is_served() -> None:
    async with relaying() as relay, pooling(relay, 2) as pool:
        async with visitors(relay, 2) as guests:
            pool.abort_clients()
            for guest in guests:
                with pytest.raises(ConnectionResetError):
                    await guest.read_all()
        for protocol in pool.protocols:
            await protocol.lost.wait()
        assert pool.busy == 0
        assert await visit(relay) == b"QUESTION"


@run_on_each_loop
async def test_aclose_resets_whoever_is_left_and_leaves_nothing() -> None:
    async with relaying() as relay:
        async with pooling(relay, 3) as pool, visitors(relay, 2) as guests:
            await pool.aclose()
            await pool.aclose()
            for guest in guests:
                with pytest.raises(ConnectionResetError):
                    await guest.read_all()
            assert not [task for task in asyncio.all_tasks() if "dial" in repr(task)]
        await relay.wait_until(lambda relay: not relay.tunnels)


@pytest.mark.parametrize("dials", ["refused", "hanging", "never made"])
@run_on_each_loop
async def test_aclose_while_dialling_leaves_nothing(dials: str) -> None:
    async with relaying() as relay:
        if dials == "hanging":
            relay.hang()
        if dials == "refused":
            relay.refuse(503)
        async with pooling(relay, 5) as pool:
            if dials != "never made":
                await relay.wait_until(lambda relay: relay.dials == 5)
            await pool.aclose()
        assert relay.tunnels == []


@run_virtual
async def test_a_dial_that_succeeds_while_the_pool_closes_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relaying() as relay, pooling(relay, 1) as pool:
        # As if the answer had come in the same loop iteration, before the cancellation takes effect.
        ready = pool.connection_ready

        def close_first(connection: TunnelConnection) -> None:
            pool.close()
            ready(connection)

        monkeypatch.setattr(pool, "connection_ready", close_first)
        with pytest.raises(ListenerClosed):
            await pool.wait_ready()
        await pool.aclose()
        assert pool.waiting == 0
        await relay.wait_until(lambda relay: not relay.tunnels)


@pytest.mark.parametrize(("abort", "seconds"), [(False, CLOSE_TIMEOUT), (True, 0)])
@run_virtual
async def test_a_server_that_does_not_answer_holds_up_aclose_for_so_long_and_an_abort_not_at_all(
    abort: bool, seconds: float
) -> None:
    async with relaying() as relay, pooling(relay, 3) as pool, visitors(relay, 1):
        await relay.wait_for_waiting(3)
        for tunnel in relay.tunnels:
            tunnel.stall()
        start = virtual_loop().time()
        await pool.aclose(abort=abort)
        assert virtual_loop().time() - start == pytest.approx(seconds)


@run_on_each_loop
async def test_serve_forever_serves_until_it_is_cancelled_and_closes() -> None:
    async with relaying() as relay:
        pool = Pool(relay)
        serving = asyncio.ensure_future(pool.serve_forever())
        assert await visit(relay) == b"QUESTION"
        serving.cancel()
        await asyncio.wait([serving])
        assert serving.cancelled()
        assert (pool.waiting, pool.busy) == (0, 0)
        await relay.wait_until(lambda relay: not relay.tunnels)


@run_on_each_loop
async def test_serve_forever_raises_what_ended_it() -> None:
    async with relaying() as relay:
        relay.refuse(402)
        with pytest.raises(NoCredits):
            await Pool(relay).serve_forever()
        relay.accept()
        pool = Pool(relay)
        serving = asyncio.ensure_future(pool.serve_forever())
        await relay.wait_for_waiting()
        pool.close()
        with pytest.raises(ListenerClosed, match="closed"):
            await serving


@run_on_each_loop
async def test_it_is_an_asyncio_server() -> None:
    async with relaying() as relay:
        async with Pool(relay) as pool:
            assert isinstance(pool, asyncio.AbstractServer)
            assert pool.get_loop() is asyncio.get_running_loop()
            assert not pool.is_serving()
            await settle()
            assert relay.dials == 0, "it dials before start_serving"
            await pool.start_serving()
            await pool.start_serving()
            assert pool.is_serving()
            await pool.wait_ready()
            assert repr(pool) == f"<TunnelPool {DOMAIN} waiting=1 busy=0>"
        assert not pool.is_serving()
        await pool.start_serving()
        await pool.aclose()
        assert relay.dials == 1


@run_on_each_loop
async def test_wait_ready_returns_while_every_websocket_is_taken() -> None:
    async with relaying() as relay, pooling(relay, 1, max_connections=1) as pool, visitors(relay, 1):
        assert (pool.waiting, pool.busy) == (0, 1)
        await pool.wait_ready()


@run_virtual
async def test_wait_ready_waits_as_long_as_the_server_cannot_be_reached() -> None:
    async with relaying() as relay:
        relay.refuse(503)
        async with pooling(relay) as pool:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(3600):
                    await pool.wait_ready()
            relay.accept()
            await pool.wait_ready()
            assert pool.waiting == 1


@run_async
async def test_a_ca_that_cannot_be_read_is_told_before_anything_is_dialled() -> None:
    config = make_config("wss://127.0.0.1:9/tunnels", trust_ca="/does/not/exist.pem")
    with pytest.raises(ConfigError, match=r"exist\.pem"):
        TunnelPool(config, Recorder, standby=lambda visitors: 1)
