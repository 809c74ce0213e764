"""Nothing of one visitor reaches the next one on a recycled WebSocket (PROTOCOL.md 4.8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from websockets.frames import Close

from tests.fakes import Line, Recorder, VirtualTimeLoop, make_config, run_on_each_loop, settle
from tests.support import DOMAIN, KEYS, run_async, visiting
from tunnel_asgi.pool import TunnelPool
from tunnel_asgi.protocol import Ended, Recycled, ServerSide
from tunnel_asgi.relay import Relay
from tunnel_asgi.transport import HELD_LIMIT, SLICE, TunnelTransport

FIRST = "CONNECT: 203.0.113.1, first"
SECOND = "CONNECT: 203.0.113.2, second"
EOF = b""


def the_app_closes(line: Line) -> None:
    line.visitor(0).transport.close()
    line.send(EOF)


def the_app_aborts(line: Line) -> None:
    line.visitor(0).transport.abort()
    line.send(EOF)


def the_app_raises(line: Line) -> None:
    line.send(b"bad", EOF)


def the_visitor_ends(line: Line) -> None:
    line.send(EOF)


def the_visitor_is_dropped(line: Line) -> None:
    line.send("DROP: it left")


ENDS = [the_app_closes, the_app_aborts, the_app_raises, the_visitor_ends, the_visitor_is_dropped]

LATE_ACTS: dict[str, Callable[[TunnelTransport], Any]] = {
    "write": lambda transport: transport.write(b"late"),
    "a large write": lambda transport: transport.write(b"late" * SLICE),
    "writelines": lambda transport: transport.writelines([b"late", b"later"]),
    "write_eof": lambda transport: transport.write_eof(),
    "close": lambda transport: transport.close(),
    "abort": lambda transport: transport.abort(),
    "pause_reading": lambda transport: transport.pause_reading(),
    "resume_reading": lambda transport: transport.resume_reading(),
    "set_protocol": lambda transport: transport.set_protocol(asyncio.Protocol()),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(high=0),
    "feed_data": lambda transport: transport.feed_data(b"late"),
    "feed_eof": lambda transport: transport.feed_eof(),
    "feed_drop": lambda transport: transport.feed_drop("late"),
    "wire_writable": lambda transport: transport.wire_writable(),
    "wire_lost": lambda transport: transport.wire_lost(ConnectionResetError()),
}


def raise_on_bad(data: bytes) -> None:
    if data == b"bad":
        raise LookupError("an app's bug")


async def serve_first(end: Callable[[Line], None]) -> Line:
    """A line whose first visitor has ended in this way, with the second one connected on the same WebSocket."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    line = await Line.open()
    line.owner.protocols.append(Recorder(data=raise_on_bad))
    line.send(FIRST, b"secret of the first")
    line.visitor(0).transport.write(b"answer to the first")
    await asyncio.sleep(0)
    end(line)
    assert line.received() == [b"answer to the first", EOF, "RESET"]
    line.send(SECOND)
    return line


async def expect_second_untouched(line: Line) -> None:
    """The second visitor is served, and the wire and its protocol show nothing else."""
    second = line.visitor(1)
    await settle()
    line.send(b"question")
    second.transport.write(b"answer")
    await settle()
    assert second.events == ["made", b"question"]
    assert second.transport.get_extra_info("connection_id") == "second"
    assert line.received() == [b"answer"]
    assert line.state() == "open"
    line.send(EOF)
    assert line.received() == [EOF, "RESET"]
    await settle()
    assert second.events == ["made", b"question", "eof", "lost"]
    await line.close()


@pytest.mark.parametrize("act", LATE_ACTS)
@pytest.mark.parametrize("end", ENDS)
@run_async
async def test_whatever_a_late_handler_does_the_next_visitor_sees_nothing_of_it(
    end: Callable[[Line], None], act: str
) -> None:
    line = await serve_first(end)
    transport = line.visitor(0).transport
    with suppress(RuntimeError):
        LATE_ACTS[act](transport)
    await settle()
    with suppress(RuntimeError):
        LATE_ACTS[act](transport)
    await expect_second_untouched(line)
    assert line.visitor(0).data in (b"secret of the first", b"secret of the firstbad")


@run_async
async def test_a_write_in_the_loop_iteration_of_the_end_does_not_leave_in_the_next() -> None:
    line = await Line.open()
    line.send(FIRST)
    line.visitor(0).transport.write(b"on its way")  # its flush is scheduled
    line.send("DROP: it left", "DROP: it left")
    line.visitor(0).transport.write(b"late")
    line.send(SECOND)
    assert line.received() == [EOF, "RESET"]
    await expect_second_untouched(line)


@run_async
async def test_a_resume_in_the_loop_iteration_of_the_end_delivers_nothing_to_the_next() -> None:
    line = await Line.open()
    line.send(FIRST)
    line.visitor(0).transport.pause_reading()
    line.send(b"unread")
    line.visitor(0).transport.resume_reading()
    line.visitor(0).transport.close()
    line.send(EOF, SECOND)
    assert line.received() == [EOF, "RESET"]
    await expect_second_untouched(line)
    assert line.visitor(0).events == ["made", "lost"]


@run_async
async def test_unread_input_is_forgotten_and_its_back_pressure_too() -> None:
    line = await Line.open()
    line.send(FIRST)
    line.visitor(0).transport.pause_reading()
    line.send(b"x" * (HELD_LIMIT + 1))
    assert not line.reading()
    line.visitor(0).transport.abort()
    assert line.reading()
    line.send(EOF, SECOND)
    assert line.received() == [EOF, "RESET"]
    line.visitor(0).transport.pause_reading()
    await expect_second_untouched(line)
    assert line.reading()


@run_async
async def test_a_protocol_that_never_resumes_after_a_drop_does_not_keep_the_websocket_once_it_writes() -> None:
    line = await Line.open()
    line.send(FIRST)
    line.visitor(0).transport.pause_reading()
    line.send(b"unread", "DROP: it left")
    assert line.received() == []
    line.visitor(0).transport.write(b"late")
    assert line.received() == [EOF, "RESET"]
    line.send(SECOND)
    await expect_second_untouched(line)


@run_async
async def test_output_that_waits_for_the_socket_leaves_before_reset_and_never_after() -> None:
    line = await Line.open()
    line.send(FIRST)
    line.pause()
    line.visitor(0).transport.write(b"slow answer")
    line.visitor(0).transport.close()
    line.visitor(0).transport.write(b"late")
    line.send(b"discarded", EOF)
    await settle()
    assert line.received() == []
    line.resume()
    assert line.received() == [b"slow answer", EOF, "RESET"]
    line.send(SECOND)
    await expect_second_untouched(line)


@run_async
async def test_output_that_waits_for_the_socket_is_forgotten_when_its_visitor_is_dropped() -> None:
    line = await Line.open()
    line.send(FIRST)
    line.pause()
    line.visitor(0).transport.write(b"slow answer")
    line.send("DROP: it left")
    assert line.received() == [EOF, "RESET"]
    line.send(SECOND)
    line.resume()
    await expect_second_untouched(line)


@run_async
async def test_a_late_drop_never_reaches_the_next_visitor() -> None:
    line = await Line.open()
    line.send(FIRST, EOF)
    assert line.received() == [EOF, "RESET"]
    line.send("DROP: the first one", SECOND)
    await expect_second_untouched(line)


@pytest.mark.parametrize("late", [b"late", EOF])
@run_async
async def test_late_bytes_close_the_websocket_instead_of_reaching_the_next_visitor(late: bytes) -> None:
    line = await Line.open()
    line.send(FIRST, EOF)
    line.send(late, SECOND)
    *_, close = line.received()
    assert isinstance(close, Close)
    assert close.code == 1002
    assert len(line.owner.visitors) == 1
    await line.close()


@run_async
async def test_bytes_between_our_end_and_the_visitors_reach_nobody() -> None:
    line = await Line.open(drain_limit=100)
    line.send(FIRST)
    line.visitor(0).transport.close()
    line.send(b"x" * 100, EOF, SECOND)
    assert line.received() == [EOF, "RESET"]
    await expect_second_untouched(line)
    await settle()
    assert line.visitor(0).events == ["made", "lost"]


@run_async
async def test_a_visitor_past_the_drain_limit_costs_the_websocket_and_nobody_comes_after() -> None:
    line = await Line.open(drain_limit=100)
    line.send(FIRST)
    line.visitor(0).transport.close()
    line.send(b"x" * 101, EOF, SECOND, b"question")
    assert [type(message) for message in line.received()] == [bytes, Close]
    assert len(line.owner.visitors) == 1
    await line.close()


# Handlers as people write them, over sockets


@pytest.mark.parametrize("manner", ["hangs", "is cancelled", "raises", "never reads", "writes for ever"])
@run_on_each_loop
async def test_a_handler_that_misbehaves_bleeds_nothing_into_the_next_visitor(manner: str) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    handlers: list[asyncio.Task[None]] = []
    last_words = asyncio.Event()

    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if manner == "never reads":
                writer.transport.pause_reading()  # type: ignore[attr-defined]
            else:
                await reader.read(100)
            writer.write(b"first answer")
            if manner == "raises":
                raise LookupError
            while manner == "writes for ever":
                writer.write(b"first answer")
                await asyncio.sleep(0)
            await last_words.wait()
        finally:
            writer.write(b"first, late")
            writer.close()
            writer.write(b"first, later")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = answer if handlers else misbehave
        handlers.append(asyncio.ensure_future(handler(reader, writer)))

    def make_protocol() -> asyncio.BaseProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), serve)

    async with Relay(keys=KEYS, domain=DOMAIN) as relay:
        config = make_config(relay, max_connections=1)
        pool = TunnelPool(config, make_protocol, standby=lambda visitors: 1)
        await pool.start_serving()
        async with visiting(relay) as first:
            await first.send(b"secret of the first")
            await first.read(len(b"first answer"))
            if manner == "raises":
                await asyncio.wait(handlers)
            first.reset()
        await relay.wait_until(lambda relay: relay.visitors_served == 1)
        if manner == "is cancelled":
            handlers[0].cancel()
        async with visiting(relay) as second:
            await second.send(b"question")
            await relay.wait_until(lambda relay: relay.tunnels[0].state == "open")
            last_words.set()
            await settle()
            second.send_eof()
            assert await second.read_all() == b"QUESTION"
        handlers[0].cancel()
        await asyncio.wait(handlers)
        assert all(handler.done() for handler in handlers)
        assert (relay.dials, relay.violations) == (1, [])
        await pool.aclose()
        for handler in handlers:
            handler.cancelled() or handler.exception()


# Any order of anything


class App(Recorder):
    """Serves one visitor; the machine tells it what to do. It notes what it wrote while that could still arrive."""

    def __init__(self, number: int) -> None:
        super().__init__(half_close=number % 2 == 0)
        self.number = number
        self.on["data"] = self._got
        self.written = b""
        self.raises = False

    def _got(self, data: bytes) -> None:
        if self.raises:
            raise LookupError("an app's bug")

    def write(self, size: int) -> None:
        data = bytes([128 + self.number % 128]) * size
        with suppress(RuntimeError):  # after write_eof
            if not self.transport.is_closing():
                self.transport.write(data)
                self.written += data
            else:
                self.transport.write(data)


class Recycling(RuleBasedStateMachine):
    """Visitor after visitor on one WebSocket. Each byte carries the number of the visitor it belongs to.

    The server's side of the protocol core is the judge of what the client sends.
    """

    @initialize()
    def start(self) -> None:
        self.loop = VirtualTimeLoop()
        self.unhandled: list[Any] = []
        self.loop.set_exception_handler(lambda loop, context: self.unhandled.append(context["exception"]))
        self.judge = ServerSide()
        self.apps: list[App] = []
        self.sent: list[bytes] = []  # to each visitor's app
        self.answers: list[bytes] = []  # from each visitor's app, as the server got them
        self.line = self.run(Line.open(drain_limit=50))

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def turn(self) -> None:
        self.run(settle())

    @property
    def alive(self) -> bool:
        state: str = self.line.state()
        return state != "closed"

    # The server

    @precondition(lambda self: self.alive and self.judge.waiting)
    @rule()
    def a_visitor_comes(self) -> None:
        number = len(self.apps)
        self.apps.append(App(number))
        self.sent.append(b"")
        self.answers.append(b"")
        self.line.owner.protocols.append(self.apps[-1])
        self.line.send(self.judge.send_connect("203.0.113.7", str(number)))

    def can_send(self) -> bool:
        return self.alive and self.judge.outgoing.value == "open"

    @precondition(can_send)
    @rule(size=st.sampled_from([1, 2, 30, HELD_LIMIT + 1]))
    def the_visitor_sends(self, size: int) -> None:
        self.judge.send_data()
        data = bytes([len(self.apps) % 128]) * size
        self.sent[-1] += data
        self.line.send(data)

    @precondition(can_send)
    @rule()
    def the_visitor_ends(self) -> None:
        self.line.send(self.judge.send_eof())

    @precondition(lambda self: self.alive and self.judge.outgoing.value in ("open", "done") and not self.judge._dropped)
    @rule()
    def the_visitor_is_dropped(self) -> None:
        self.line.send(self.judge.send_drop("it left"))

    @precondition(lambda self: self.alive and self.judge.waiting)
    @rule()
    def a_stale_drop_arrives(self) -> None:
        self.line.send("DROP: long ago")

    @precondition(lambda self: self.alive and self.line.connection.writable)
    @rule()
    def the_socket_is_full(self) -> None:
        self.line.pause()

    @precondition(lambda self: self.alive and not self.line.connection.writable)
    @rule()
    def the_socket_takes_bytes_again(self) -> None:
        self.line.resume()

    # The apps, of this visitor and of all those before

    @precondition(lambda self: self.apps)
    @rule(back=st.integers(0, 2), size=st.sampled_from([0, 1, 5, SLICE + 1]))
    def an_app_writes(self, back: int, size: int) -> None:
        self.app(back).write(size)

    @precondition(lambda self: self.apps)
    @rule(
        back=st.integers(0, 2),
        act=st.sampled_from(["close", "abort", "write_eof", "pause_reading", "resume_reading"]),
    )
    def an_app_acts(self, back: int, act: str) -> None:
        getattr(self.app(back).transport, act)()

    @precondition(lambda self: self.apps)
    @rule()
    def the_app_will_raise(self) -> None:
        self.app(0).raises = True

    def app(self, back: int) -> App:
        return self.apps[max(len(self.apps) - 1 - back, 0)]

    @rule()
    def the_loop_turns(self) -> None:
        self.turn()

    # The law

    @invariant()
    def every_visitor_sees_only_its_own(self) -> None:
        for message in self.line.received():
            self.judge_message(message)
        for number, (app, sent, answer) in enumerate(zip(self.apps, self.sent, self.answers, strict=True)):
            assert sent.startswith(app.data), f"app {number} got what its visitor did not send"
            assert app.written.startswith(answer), f"visitor {number} got what its app did not write"
            assert app.events.count("eof") <= 1
            assert [event for event in app.events if event == "lost" or isinstance(event, Exception)] in (
                [],
                app.events[-1:],
            )
        assert all(isinstance(error, LookupError) for error in self.unhandled)

    def judge_message(self, message: Any) -> None:
        if isinstance(message, Close):
            assert message.reason == "the visitor kept sending after the end"
            return
        # Raises ProtocolError for whatever the client may not send now.
        event = self.judge.receive_text(message) if isinstance(message, str) else self.judge.receive_binary(message)
        if not isinstance(event, Recycled | Ended):
            self.answers[-1] += message

    def teardown(self) -> None:
        try:
            if self.alive:
                self.the_socket_takes_bytes_again()
                self.finish_visitor()
            self.run(self.line.close())
            self.every_visitor_sees_only_its_own()
            for app in self.apps:
                assert app.lost.is_set()
        finally:
            self.loop.close()

    def finish_visitor(self) -> None:
        """However it went, a visitor that both sides end leaves a WebSocket for the next one."""
        self.every_visitor_sees_only_its_own()
        if self.judge.waiting:
            return
        for app in self.apps:
            app.transport.close()
        if self.can_send():
            self.the_visitor_ends()
        self.turn()
        self.every_visitor_sees_only_its_own()
        assert self.judge.waiting, "the WebSocket was not recycled"


def test_visitor_after_visitor_on_one_websocket_sees_only_its_own_bytes() -> None:
    run_state_machine_as_test(
        Recycling,
        settings=settings(
            max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
