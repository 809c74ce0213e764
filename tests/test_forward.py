from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import asyncssh
import pytest

from tests.fakes import FakeSocket, make_config, run_on_each_loop, settle
from tests.support import DOMAIN, KEYS, Visitor, make_tls_contexts, run_async, run_virtually, visiting
from tunnel_asgi import forward
from tunnel_asgi.errors import IoError
from tunnel_asgi.forward import ForwardStats, forward_tunnel, forward_tunnel_tcp
from tunnel_asgi.listener import Streams, TunnelListener
from tunnel_asgi.relay import Relay

KIBIBYTE = 1024
MEBIBYTE = 1024 * KIBIBYTE
STALLED = 0.3  # seconds without progress that count as stalled; too short a time cannot fail a test


class Local:
    """A local service whose every connection is handled by the test."""

    def __init__(self) -> None:
        self.port = 0
        self.arrivals: asyncio.Queue[Visitor] = asyncio.Queue()
        """Their ends of each connection: what a visitor can do, a service can."""
        self.connections: list[Visitor] = []

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = Visitor(reader, writer)
        self.connections.append(end)
        self.arrivals.put_nowait(end)

    @classmethod
    @asynccontextmanager
    async def serving(cls, **options: Any) -> AsyncIterator[Local]:
        local = cls()
        server = await asyncio.start_server(local._arrived, "127.0.0.1", 0, **options)
        local.port = server.sockets[0].getsockname()[1]
        try:
            yield local
        finally:
            server.close()
            for end in local.connections:
                await end.close()
            await server.wait_closed()


class Forwarding:
    """One visitor who is forwarded to a local service: both far ends, and the call in between."""

    def __init__(self, relay: Relay, visitor: Visitor, local: Visitor, call: asyncio.Task[ForwardStats]) -> None:
        self.relay = relay
        self.visitor = visitor
        self.local = local
        self.call = call


@asynccontextmanager
async def accepted(
    *, recycled: bool = True
) -> AsyncIterator[tuple[Relay, Visitor, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A visitor and its streams; whatever happens to it, the WebSocket must be good for another one."""
    async with Relay(keys=KEYS, domain=DOMAIN) as relay, TunnelListener(make_config(relay)) as listener:
        async with visiting(relay) as visitor:
            streams = await listener.accept()
            yield relay, visitor, *streams
        if recycled:
            await relay.wait_for_waiting()
            async with visiting(relay):
                _, writer = await listener.accept()
                writer.close()
            assert relay.dials == 1
        assert relay.violations == []


@asynccontextmanager
async def forwarding(*, recycled: bool = True) -> AsyncIterator[Forwarding]:
    async with Local.serving() as service, accepted(recycled=recycled) as (relay, visitor, reader, writer):
        call = asyncio.create_task(forward_tunnel_tcp(reader, writer, "127.0.0.1", service.port))
        local = await service.arrivals.get()
        try:
            yield Forwarding(relay, visitor, local, call)
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


# Half-close


@run_on_each_loop
async def test_the_visitors_end_reaches_the_service_while_its_answer_still_flows() -> None:
    async with forwarding() as f:
        await f.visitor.send(b"question")
        f.visitor.send_eof()
        assert await f.local.read_all() == b"question"
        for n in range(3):
            await f.local.send(b"%d" % n)
            assert await f.visitor.read(1) == b"%d" % n
        f.local.send_eof()
        assert await f.visitor.read_all() == b""
        assert await f.call == ForwardStats(bytes_downloaded=8, bytes_uploaded=3)


@run_on_each_loop
async def test_the_services_end_reaches_the_visitor_who_may_go_on_sending() -> None:
    async with forwarding() as f:
        await f.local.send(b"greeting")
        f.local.send_eof()
        assert await f.visitor.read_all() == b"greeting"
        for n in range(3):
            await f.visitor.send(b"%d" % n)
            assert await f.local.read(1) == b"%d" % n
        f.visitor.send_eof()
        assert await f.local.read_all() == b""
        assert await f.call == ForwardStats(bytes_downloaded=3, bytes_uploaded=8)


@run_async
async def test_a_connection_on_which_nothing_is_said_is_forwarded_too() -> None:
    async with forwarding() as f:
        f.local.send_eof()
        f.visitor.send_eof()
        assert await f.call == ForwardStats(0, 0)


@run_async
async def test_a_protocol_that_half_closes_like_postgresql_copy_works() -> None:
    """Messages of a type and a length; the client ends its direction after Terminate, the rows still come."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!I", len(body) + 4) + body

    async def receive(end: Visitor) -> tuple[bytes, bytes]:
        kind, length = struct.unpack("!cI", await end.read(5))
        return kind, await end.read(length - 4)

    rows = [random.randbytes(random.randrange(20_000)) for _ in range(100)]
    async with forwarding() as f:

        async def serve() -> None:
            startup = await f.local.read(8)
            assert startup == struct.pack("!II", 8, 80877103)  # SSLRequest
            await f.local.send(b"N")
            assert await receive(f.local) == (b"Q", b"COPY t TO STDOUT\0")
            assert await receive(f.local) == (b"X", b"")
            assert await f.local.read_all() == b""
            for row in rows:
                await f.local.send(message(b"d", row))
            await f.local.send(message(b"c", b""))
            f.local.send_eof()

        serving = asyncio.create_task(serve())
        await f.visitor.send(struct.pack("!II", 8, 80877103))
        assert await f.visitor.read(1) == b"N"
        await f.visitor.send(message(b"Q", b"COPY t TO STDOUT\0") + message(b"X", b""))
        f.visitor.send_eof()
        assert [await receive(f.visitor) for _ in rows] == [(b"d", row) for row in rows]
        assert await receive(f.visitor) == (b"c", b"")
        assert await f.visitor.read_all() == b""
        await serving
        await f.call


# Many bytes


async def send_all(end: Visitor, data: bytes) -> None:
    await end.send(data)
    end.send_eof()


async def sha256(end: Visitor) -> str:
    digest = hashlib.sha256()
    while data := await end.reader.read(256 * KIBIBYTE):
        digest.update(data)
    return digest.hexdigest()


@run_on_each_loop
async def test_16_mebibytes_each_way_at_once_arrive_unchanged() -> None:
    up, down = random.randbytes(16 * MEBIBYTE), random.randbytes(16 * MEBIBYTE)
    async with forwarding() as f, asyncio.TaskGroup() as group:
        group.create_task(send_all(f.visitor, down))
        group.create_task(send_all(f.local, up))
        arrived_down = group.create_task(sha256(f.local))
        arrived_up = group.create_task(sha256(f.visitor))
        stats = await f.call
        assert stats == ForwardStats(bytes_downloaded=len(down), bytes_uploaded=len(up))
        assert await arrived_down == hashlib.sha256(down).hexdigest()
        assert await arrived_up == hashlib.sha256(up).hexdigest()


async def fill(end: Visitor, most: int) -> int:
    """Send as fast as bytes are taken, at most this many; how many were sent when nothing moved any more."""
    chunk = bytes(64 * KIBIBYTE)
    sent = 0
    while sent < most:
        end.writer.write(chunk)
        sent += len(chunk)
        try:
            async with asyncio.timeout(STALLED):
                await end.writer.drain()
        except TimeoutError:
            break
    return sent


@pytest.mark.parametrize("slow", ["visitor", "local"])
@run_on_each_loop
async def test_whoever_does_not_read_stops_the_other_side_and_loses_nothing(slow: str) -> None:
    async with forwarding() as f:
        reading, writing = (f.visitor, f.local) if slow == "visitor" else (f.local, f.visitor)
        reading.pause()
        sent = await fill(writing, 64 * MEBIBYTE)
        assert sent < 32 * MEBIBYTE  # the kernel's buffers take a few
        reading.resume()
        writing.send_eof()
        reading.send_eof()
        assert len(await reading.read_all()) == sent
        stats = await f.call
        assert {stats.bytes_downloaded, stats.bytes_uploaded} == {0, sent}


# The local side fails


@run_async
async def test_a_target_that_refuses_is_named_and_the_visitor_sees_the_end_at_once() -> None:
    port = unused_port()
    async with accepted() as (_, visitor, reader, writer):
        with pytest.raises(IoError) as raised:
            await forward_tunnel_tcp(reader, writer, "127.0.0.1", port)
        assert str(raised.value) == f"cannot forward to 127.0.0.1:{port}: Connection refused"
        assert raised.value.target == f"127.0.0.1:{port}"
        assert isinstance(raised.value.__cause__, ConnectionRefusedError)
        assert await visitor.read_all() == b""


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("no-such-host.invalid", "cannot forward to no-such-host.invalid:80: "),
        ("a" * 64 + ".example", "label"),
        ("::1", r"cannot forward to \[::1\]:80: "),
    ],
)
@run_async
async def test_a_target_that_does_not_exist_is_named(host: str, reason: str) -> None:
    async with accepted() as (_, visitor, reader, writer):
        with pytest.raises(IoError, match=reason) as raised:
            await forward_tunnel_tcp(reader, writer, host, 80)
        assert "\n" not in str(raised.value)
        assert await visitor.read_all() == b""


@run_async
async def test_a_target_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect_for_ever(*_: Any, **__: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async with accepted() as (_, visitor, reader, writer):
        monkeypatch.setattr(forward, "CONNECT_TIMEOUT", 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "create_connection", connect_for_ever)
            with pytest.raises(IoError, match=r"10\.255\.255\.1:80: it did not answer in time"):
                await forward_tunnel_tcp(reader, writer, "10.255.255.1", 80)
        assert await visitor.read_all() == b""


@run_async
async def test_a_call_that_is_cancelled_while_it_connects_closes_the_visitor(monkeypatch: pytest.MonkeyPatch) -> None:
    connecting = asyncio.Event()

    async def connect_for_ever(*_: Any, **__: Any) -> None:
        connecting.set()
        await asyncio.get_running_loop().create_future()

    async with accepted() as (_, visitor, reader, writer):
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "create_connection", connect_for_ever)
            call = asyncio.create_task(forward_tunnel_tcp(reader, writer, "10.255.255.1", 80))
            await connecting.wait()
            call.cancel()
            await asyncio.wait([call])
        assert call.cancelled()
        assert await visitor.read_all() == b""


@run_on_each_loop
async def test_a_service_that_dies_is_named_and_the_visitor_gets_what_came_before() -> None:
    async with forwarding() as f:
        await f.visitor.send(b"question")
        assert await f.local.read(8) == b"question"
        await f.local.send(b"the first half")
        assert await f.visitor.read(4) == b"the "
        f.local.reset()
        assert await f.visitor.read_all() == b"first half"
        with pytest.raises(IoError, match=r"127\.0\.0\.1:\d+: Connection reset by peer"):
            await f.call


@pytest.mark.parametrize("upload", [300 * KIBIBYTE, 16 * MEBIBYTE])
@run_on_each_loop
async def test_a_service_that_answers_and_closes_without_reading_on_is_heard(upload: int) -> None:
    """Its close over unread bytes is a reset. A web server does so with an upload that it refuses."""
    async with forwarding(recycled=False) as f:
        f.local.pause()
        await fill(f.visitor, upload)
        await f.local.send(b"413")
        f.local.reset()
        assert await f.visitor.read(3) == b"413"
        with pytest.raises(IoError):
            await f.call


@run_async
async def test_a_failing_write_to_the_service_leaves_its_answer_flowing() -> None:
    """A process may stop reading long before it stops writing."""
    program = "import sys, os; os.read(0, 5); os.close(0); print('enough', flush=True); sys.stdin = None; print('bye')"
    async with accepted(recycled=False) as (_, visitor, reader, writer):
        process = await start_process(program)
        call = asyncio.create_task(forward_tunnel(reader, writer, *process_streams(process)))
        sending = asyncio.create_task(visitor.send(bytes(MEBIBYTE)))
        assert await visitor.read_all() == b"enough\nbye\n"
        with pytest.raises(IoError, match="cannot forward to the local service: "):
            await call
        await process.wait()
        await asyncio.gather(sending, return_exceptions=True)


# The visitor fails


@run_on_each_loop
async def test_a_visitor_who_fails_takes_the_local_connection_with_it() -> None:
    async with forwarding() as f:
        await f.visitor.send(b"the first half")
        assert await f.local.read(14) == b"the first half"
        f.visitor.reset()
        with pytest.raises(ConnectionResetError):  # an end would make the half look like the whole
            await f.local.read_all()
        with pytest.raises(ConnectionResetError, match="the visitor"):
            await f.call


@run_on_each_loop
async def test_a_visitor_who_fails_after_its_end_does_not_leave_the_service_at_work() -> None:
    async with forwarding() as f:
        await f.visitor.send(b"a long question")
        f.visitor.send_eof()
        assert await f.local.read_all() == b"a long question"
        await f.relay.tunnels[0].drop("the router burns")
        with pytest.raises(ConnectionResetError, match="the router burns"):
            await f.call
        with pytest.raises(ConnectionResetError):
            await f.local.send(bytes(64 * MEBIBYTE))


@run_async
async def test_a_websocket_that_is_cut_takes_the_local_connection_with_it() -> None:
    async with forwarding(recycled=False) as f:
        f.relay.tunnels[0].cut()
        with pytest.raises(ConnectionResetError):
            await f.local.read_all()
        with pytest.raises(ConnectionResetError, match="the tunnel connection ended"):
            await f.call


@run_async
async def test_a_visitor_whose_writer_is_closed_by_somebody_else_is_gone() -> None:
    async with accepted() as (_, visitor, reader, writer), Local.serving() as service:
        call = asyncio.create_task(forward_tunnel_tcp(reader, writer, "127.0.0.1", service.port))
        local = await service.arrivals.get()
        await settle()
        writer.close()
        assert await visitor.read_all() == b""
        with pytest.raises(ConnectionResetError, match="the connection was closed"):
            await call
        await asyncio.wait([asyncio.ensure_future(local.read_all())])  # an end or a reset, whatever came first


# Cancellation


@run_on_each_loop
async def test_cancelling_the_call_closes_both_connections() -> None:
    async with forwarding() as f:
        await f.visitor.send(b"x")
        assert await f.local.read(1) == b"x"
        f.call.cancel()
        await asyncio.wait([f.call])
        assert f.call.cancelled()
        assert await f.visitor.read_all() == b""
        with pytest.raises(ConnectionResetError):
            await f.local.read_all()


@run_async
async def test_cancelling_the_call_while_it_flushes_closes_both_connections() -> None:
    async with forwarding() as f:
        f.visitor.pause()
        await fill(f.local, 64 * MEBIBYTE)
        f.call.cancel()
        await asyncio.wait([f.call])
        assert f.call.cancelled()
        f.visitor.resume()
        await f.visitor.read_all()


# Other streams than TCP


async def start_process(program: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdin=pipe, stdout=pipe)


def process_streams(process: asyncio.subprocess.Process) -> Streams:
    return cast(asyncio.StreamReader, process.stdout), cast(asyncio.StreamWriter, process.stdin)


@run_async
async def test_a_process_is_forwarded_to() -> None:
    program = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
    data = random.randbytes(MEBIBYTE)
    async with accepted() as (_, visitor, reader, writer):
        process = await start_process(program)
        sending = asyncio.create_task(send_all(visitor, data))
        call = asyncio.create_task(forward_tunnel(reader, writer, *process_streams(process)))
        assert await visitor.read_all() == data[::-1]
        await sending
        assert await call == ForwardStats(len(data), len(data))
        assert await process.wait() == 0


@run_async
async def test_a_unix_socket_is_forwarded_to_and_named(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    arrivals: asyncio.Queue[Visitor] = asyncio.Queue()

    def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrivals.put_nowait(Visitor(reader, writer))

    server = await asyncio.start_unix_server(arrived, path)
    async with server, accepted() as (_, visitor, reader, writer):
        call = asyncio.create_task(forward_tunnel(reader, writer, *await asyncio.open_unix_connection(path)))
        local = await arrivals.get()
        await visitor.send(b"question")
        assert await local.read(8) == b"question"
        await local.close()
        assert await visitor.read_all() == b""
        visitor.send_eof()
        assert await call == ForwardStats(8, 0)


@run_async
async def test_a_tls_service_is_forwarded_to_though_it_has_no_half_close(tmp_path: Path) -> None:
    server_context, client_context = make_tls_contexts(tmp_path)
    async with Local.serving(ssl=server_context) as service, accepted() as (_, visitor, reader, writer):
        streams = await asyncio.open_connection("127.0.0.1", service.port, ssl=client_context)
        call = asyncio.create_task(forward_tunnel(reader, writer, *streams))
        local = await service.arrivals.get()
        await visitor.send(b"question")
        visitor.send_eof()
        assert await local.read(8) == b"question"
        await local.send(b"answer")
        local.writer.close()
        assert await visitor.read_all() == b"answer"
        assert await call == ForwardStats(8, 6)


class AnyUser(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


@run_async
async def test_an_ssh_session_runs_a_command_and_copies_megabytes() -> None:
    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(await process.stdin.read())
        process.exit(7)

    data = random.randbytes(4 * MEBIBYTE)
    sshd = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=AnyUser,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=handle,
        encoding=None,
    )
    async with sshd, Relay(keys=KEYS, domain=DOMAIN) as relay, TunnelListener(make_config(relay)) as listener:

        async def forward_one() -> ForwardStats:
            return await forward_tunnel_tcp(*await listener.accept(), "127.0.0.1", sshd.get_port())

        call = asyncio.create_task(forward_one())
        async with asyncssh.connect("127.0.0.1", relay.port, username="ann", known_hosts=None, config=None) as ssh:
            result = await ssh.run("copy", input=data, encoding=None)
            assert result.stdout == data
            assert result.exit_status == 7
        stats = await call
        assert stats.bytes_downloaded > len(data)
        assert stats.bytes_uploaded > len(data)
        assert relay.violations == []


# Silence, on a virtual clock and without a network


class FakeEnd(FakeSocket):
    """A connection whose far end is the test."""

    def __init__(self) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(loop=loop)
        self.protocol = asyncio.StreamReaderProtocol(self.reader, loop=loop)
        self.protocol.connection_made(self)
        self.writer = asyncio.StreamWriter(self, self.protocol, self.reader, loop)
        self.on_closed = lambda: self.protocol.connection_lost(None)
        self.ended = False

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.buffer_size or self.aborted:
            super().close()

    def take(self, size: int) -> None:
        """The far end takes bytes out of the buffer."""
        self.buffer_size -= size
        if not self.buffer_size:
            self.close()


async def forward_fakes(visitor: FakeEnd, local: FakeEnd) -> ForwardStats:
    return await forward_tunnel(visitor.reader, visitor.writer, local.reader, local.writer)


@pytest.mark.parametrize("first", ["visitor", "local"])
@run_virtually
async def test_a_silent_direction_ends_a_minute_after_the_other_one(first: str) -> None:
    visitor, local = FakeEnd(), FakeEnd()
    ending = visitor if first == "visitor" else local
    call = asyncio.create_task(forward_fakes(visitor, local))
    await asyncio.sleep(1000)  # as long as both are open, silence is nobody's fault
    assert not call.done()
    ended_at = asyncio.get_running_loop().time()
    ending.reader.feed_eof()
    assert await call == ForwardStats(0, 0)
    assert asyncio.get_running_loop().time() == ended_at + 60
    assert visitor.closed
    assert local.closed
    assert not visitor.aborted
    assert not local.aborted


@run_virtually
async def test_a_direction_that_moves_may_take_as_long_as_it_likes() -> None:
    visitor, local = FakeEnd(), FakeEnd()
    call = asyncio.create_task(forward_fakes(visitor, local))
    visitor.reader.feed_eof()
    for _ in range(10):
        await asyncio.sleep(59)
        local.reader.feed_data(b"x")
    local.reader.feed_eof()
    assert await call == ForwardStats(0, 10)
    assert visitor.written == b"x" * 10


@run_virtually
async def test_a_slow_sink_is_not_silent() -> None:
    visitor, local = FakeEnd(), FakeEnd()
    call = asyncio.create_task(forward_fakes(visitor, local))
    visitor.protocol.pause_writing()
    visitor.buffer_size = 1000
    local.reader.feed_data(b"x")
    visitor.reader.feed_eof()
    for _ in range(10):
        await asyncio.sleep(59)
        visitor.buffer_size -= 1
    visitor.protocol.resume_writing()
    local.reader.feed_eof()
    await asyncio.sleep(59)
    assert not call.done()
    visitor.take(990)
    assert await call == ForwardStats(0, 1)
    assert not visitor.aborted


@run_virtually
async def test_a_service_that_takes_nothing_more_is_aborted_a_minute_after_the_end() -> None:
    visitor, local = FakeEnd(), FakeEnd()
    call = asyncio.create_task(forward_fakes(visitor, local))
    local.buffer_size = 1000
    visitor.reader.feed_eof()
    local.reader.feed_eof()
    assert await call == ForwardStats(0, 0)
    assert asyncio.get_running_loop().time() == 60
    assert local.aborted
    assert not visitor.aborted


@run_virtually
async def test_a_pipe_that_cannot_tell_its_end_is_forwarded_to() -> None:
    visitor, local = FakeEnd(), FakeEnd()
    protocol = asyncio.streams.FlowControlMixin()
    writer = asyncio.StreamWriter(local, protocol, None, asyncio.get_running_loop())
    visitor.reader.feed_data(b"question")
    visitor.reader.feed_eof()
    local.reader.feed_data(b"answer")
    local.reader.feed_eof()
    stats = await forward_tunnel(visitor.reader, visitor.writer, local.reader, writer)
    assert stats == ForwardStats(8, 6)
    assert local.ended
    assert local.closed


@run_virtually
async def test_what_a_service_takes_is_counted_and_not_what_it_was_offered() -> None:
    visitor, local = FakeEnd(), FakeEnd()
    local.protocol.pause_writing()
    call = asyncio.create_task(forward_fakes(visitor, local))
    visitor.reader.feed_data(b"question")
    local.reader.feed_eof()
    assert await call == ForwardStats(0, 0)
