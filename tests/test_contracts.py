"""What we lean on in others' packages beyond what they promise. A failure says which name moved."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import click
import django.core.management.base
import django.template.autoreload
import h11
import httptools
import pytest
import uvicorn
import uvicorn.config
import uvicorn.server
import uvicorn.supervisors
import websockets.asyncio.client
import websockets.asyncio.server
import websockets.client
import websockets.exceptions
import websockets.frames
import websockets.http11
import websockets.protocol
import websockets.uri
from a2wsgi import WSGIMiddleware
from uvicorn.importer import ImportFromStringError, import_from_string
from uvicorn.lifespan.off import LifespanOff
from uvicorn.lifespan.on import LifespanOn
from uvicorn.main import main as command
from uvicorn.middleware.asgi2 import ASGI2Middleware
from uvicorn.middleware.message_logger import MessageLoggerMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.middleware.wsgi import _WSGIMiddleware
from uvicorn.protocols.http import flow_control, h11_impl, httptools_impl
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from uvicorn.supervisors.statreload import StatReload
from uvicorn.supervisors.watchfilesreload import WatchFilesReload
from websockets.datastructures import Headers

from tests.support import run_async
from tests.test_guard import UPGRADE, App, Wire, get, post, request
from tunnel_asgi.cli import IGNORED_UVICORN_OPTIONS
from tunnel_asgi.server import DIFFERENT_DEFAULTS, SOCKET_OPTIONS
from tunnel_asgi.transport import TunnelTransport


def check_names(owner: Any, names: str, *, used_in: str) -> None:
    where = owner.__name__ if hasattr(owner, "__name__") else f"an instance of {type(owner).__name__}"
    missing = [name for name in names.split() if not hasattr(owner, name)]
    assert not missing, f"{owner.__module__}: {where} has no {', '.join(missing)} any more; see tunnel_asgi/{used_in}"


def check_parameters(function: Callable[..., Any], names: str, *, used_in: str) -> None:
    parameters = inspect.signature(function).parameters
    missing = [name for name in names.split() if name not in parameters]
    label = getattr(function, "__qualname__", function)
    assert not missing, f"{label} takes no {', '.join(missing)} any more; see tunnel_asgi/{used_in}"


async def app(scope: Any, receive: Any, send: Any) -> None: ...


def loaded(**options: Any) -> uvicorn.Config:
    config = uvicorn.Config(app, log_config=None, **options)
    config.load()
    return config


# uvicorn: the server


def test_uvicorns_server_has_the_methods_we_override_or_call() -> None:
    server = uvicorn.Server
    names = "run serve _serve main_loop on_tick shutdown capture_signals handle_exit"
    check_names(server, names, used_in="server.py")
    check_parameters(server.serve, "sockets", used_in="server.py")
    check_parameters(server._serve, "sockets", used_in="server.py")
    check_parameters(server.shutdown, "sockets", used_in="server.py")
    check_parameters(server.on_tick, "counter", used_in="server.py")
    check_parameters(server.handle_exit, "sig frame", used_in="server.py")


def test_uvicorns_server_has_the_attributes_we_read_or_set() -> None:
    names = "config server_state started should_exit force_exit _captured_signals"
    check_names(uvicorn.Server(uvicorn.Config(app, log_config=None)), names, used_in="server.py")
    names = "total_requests connections tasks default_headers"
    check_names(uvicorn.server.ServerState(), names, used_in="server.py and guard.py")


class Recorder:
    """Stands for a server, a connection or a lifespan; notes what is called in which order."""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls = calls
        self._name = name

    def close(self) -> None:
        self._calls.append(f"{self._name}.close")

    async def wait_closed(self) -> None:
        self._calls.append(f"{self._name}.wait_closed")


class RecordedConnection:
    def __init__(self, calls: list[str], connections: set[Any]) -> None:
        self._calls = calls
        self._connections = connections

    def shutdown(self) -> None:
        self._calls.append("connection.shutdown")
        self._connections.discard(self)


class RecordedLifespan:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    async def shutdown(self) -> None:
        self._calls.append("lifespan.shutdown")


def recorded_server() -> tuple[uvicorn.Server, list[str]]:
    calls: list[str] = []
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    server.servers = [cast(Any, Recorder(calls, "server"))]
    server.lifespan = cast(Any, RecordedLifespan(calls))
    connections = cast("set[Any]", server.server_state.connections)
    connections.add(RecordedConnection(calls, connections))
    return server, calls


@run_async
async def test_uvicorn_shuts_down_in_the_order_we_count_on() -> None:
    server, calls = recorded_server()
    await server.shutdown()
    assert calls == ["server.close", "connection.shutdown", "server.wait_closed", "lifespan.shutdown"]


@run_async
async def test_uvicorn_skips_the_lifespan_when_it_is_forced() -> None:
    server, calls = recorded_server()
    server.force_exit = True
    await server.shutdown()
    assert calls == ["server.close", "connection.shutdown", "server.wait_closed"]


@run_async
async def test_uvicorns_main_loop_ends_when_a_tick_says_so() -> None:
    ticks: list[int] = []

    class Ticking(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            ticks.append(counter)
            return len(ticks) == 2

    await Ticking(uvicorn.Config(app, log_config=None)).main_loop()
    assert ticks == [0, 1]


@run_async
async def test_a_tick_of_uvicorns_zero_sets_the_default_headers() -> None:
    server = uvicorn.Server(loaded())
    assert await server.on_tick(0) is False
    assert [name for name, _ in server.server_state.default_headers] == [b"date", b"server"]
    server.should_exit = True
    assert await server.on_tick(0) is True


# uvicorn: the configuration


OWN_DEFAULTS = "http proxy_headers timeout_graceful_shutdown log_config port"


def test_uvicorns_config_takes_and_keeps_what_we_pass() -> None:
    used_in = "server.py"
    check_parameters(uvicorn.Config, OWN_DEFAULTS, used_in=used_in)
    check_parameters(uvicorn.Config, " ".join(SOCKET_OPTIONS), used_in="server.py (SOCKET_OPTIONS)")
    names = (
        "app port http ws loop lifespan interface factory log_level access_log workers proxy_headers loaded "
        "timeout_graceful_shutdown h11_max_incomplete_event_size should_reload use_subprocess reload_delay "
        "reload_dirs reload_includes reload_excludes env_file"
    ).replace(" env_file", "")
    config = uvicorn.Config(app, log_config=None)
    check_names(config, names, used_in=used_in)
    check_names(config, "configure_logging load load_app get_loop_factory", used_in=used_in)
    assert config.loaded is False
    names = "loaded loaded_app http_protocol_class ws_protocol_class lifespan_class encoded_headers"
    check_names(loaded(), names, used_in=used_in)


def test_uvicorns_config_loads_by_the_method_we_override() -> None:
    class Loading(uvicorn.Config):
        def load_app(self) -> Any:
            return app

    config = Loading("no:app", log_config=None)
    config.load()
    assert cast(Any, config.loaded_app).app is app


def test_a_factory_that_takes_arguments_makes_uvicorn_exit_because_of_a_type_error() -> None:
    config = uvicorn.Config(lambda settings: app, factory=True, log_config=None)
    with pytest.raises(SystemExit) as raised:
        config.load()
    assert raised.value.code == uvicorn.config.STARTUP_FAILURE == 3
    cause = raised.value.__context__
    assert isinstance(cause, TypeError)
    assert cause.__traceback__ is not None
    assert cause.__traceback__.tb_next is None, "the frame that calls the factory is not the only one"


def test_what_uvicorn_puts_around_an_app_has_it_as_app() -> None:
    wrappers: list[Callable[[Any], Any]] = [
        ASGI2Middleware,
        MessageLoggerMiddleware,
        ProxyHeadersMiddleware,
        vars(uvicorn.config)["WSGIMiddleware"],
    ]
    for wrapper in wrappers:
        assert wrapper(app).app is app, f"{wrapper} has no app; see _unwrapped in tunnel_asgi/server.py"
    with pytest.warns(DeprecationWarning, match="a2wsgi"):
        assert cast(Any, _WSGIMiddleware(cast(Any, app))).app is app


def test_uvicorn_guesses_asgi2_for_what_is_no_coroutine_function() -> None:
    config = uvicorn.Config(lambda scope: None, log_config=None)
    config.load()
    assert config.interface == "asgi2"
    assert loaded().interface == "asgi3"


def test_uvicorns_logging_config_has_the_shape_we_extend() -> None:
    config = uvicorn.config.LOGGING_CONFIG
    assert "default" in config["handlers"]
    assert {"uvicorn", "uvicorn.error", "uvicorn.access"} <= config["loggers"].keys()
    assert config["disable_existing_loggers"] is False


def test_uvicorn_says_by_its_own_exception_what_cannot_be_imported() -> None:
    for text in ("no_such_module_of_ours:app", "tests.support:no_such_app", "tests.support"):
        with pytest.raises(ImportFromStringError):
            import_from_string(text)
    assert import_from_string(app) is app
    assert "uvloop" in uvicorn.config.LOOP_FACTORIES


@run_async
async def test_uvicorns_lifespan_runs_main_in_a_task_of_its_own() -> None:
    tasks: list[Any] = []

    class Recorded(LifespanOn):
        async def main(self) -> None:
            tasks.append(asyncio.current_task())
            self.startup_event.set()

    lifespan = Recorded(loaded())
    await lifespan.startup()
    assert tasks[0] is not asyncio.current_task()
    for kind in (lifespan, LifespanOff(loaded())):
        check_names(kind, "startup shutdown state should_exit", used_in="server.py")
    assert loaded().lifespan_class is LifespanOn


# uvicorn: the protocols


HTTP_PROTOCOLS: list[Any] = [h11_impl.H11Protocol, httptools_impl.HttpToolsProtocol]


def make_protocol(protocol_class: Any, **options: Any) -> tuple[Any, TunnelTransport]:
    config = loaded(http=protocol_class, lifespan="off", **options)
    config.loaded_app = cast(Any, App())
    loop = asyncio.get_running_loop()
    protocol = protocol_class(config=config, server_state=uvicorn.server.ServerState(), app_state={}, _loop=loop)
    return protocol, TunnelTransport(Wire(), protocol, extra={}, loop=loop)


def connected(protocol_class: Any) -> tuple[Any, TunnelTransport]:
    protocol, transport = make_protocol(protocol_class)
    transport.start()
    return protocol, transport


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("protocol_class", HTTP_PROTOCOLS)
@run_async
async def test_the_http_protocols_have_what_the_guard_touches(protocol_class: Any) -> None:
    used_in = "guard.py"
    names = "connection_made data_received connection_lost on_response_complete handle_websocket_upgrade"
    check_names(protocol_class, "_unset_keepalive_if_required", used_in=used_in)
    check_names(protocol_class, f"{names} send_400_response shutdown", used_in=used_in)
    check_parameters(protocol_class.send_400_response, "msg", used_in=used_in)
    check_parameters(protocol_class, "config server_state app_state _loop", used_in=used_in)
    protocol, transport = connected(protocol_class)
    check_names(protocol, "transport loop config cycle flow timeout_keep_alive", used_in=used_in)
    assert vars(protocol)["cycle"] is None
    assert vars(protocol)["timeout_keep_alive_task"] is None
    transport.feed_data(post(b"Content-Length: 5", b"Expect: 100-continue"))
    names = "response_started response_complete disconnected message_event more_body keep_alive"
    check_names(protocol.cycle, f"{names} waiting_for_100_continue", used_in=used_in)
    assert protocol.cycle.waiting_for_100_continue is True
    assert protocol.cycle.more_body is True
    assert protocol.flow.read_paused is False
    transport.abort()
    await settle()


def test_the_flow_control_has_what_the_guard_reads() -> None:
    check_names(flow_control.FlowControl(cast(Any, None)), "read_paused", used_in="guard.py")


@run_async
async def test_the_h11_protocol_parses_with_the_connection_we_replace() -> None:
    protocol, transport = connected(h11_impl.H11Protocol)
    assert isinstance(protocol.conn, h11.Connection), "H11Protocol.conn moved; see tunnel_asgi/guard.py"
    transport.feed_data(request())
    await settle()
    assert protocol.conn.our_state is h11.IDLE
    transport.abort()
    await settle()


@run_async
async def test_the_httptools_protocol_has_the_callbacks_and_the_pipeline_the_guard_extends() -> None:
    used_in = "guard.py"
    names = "on_message_begin on_url on_header on_headers_complete on_body on_message_complete"
    check_names(httptools_impl.HttpToolsProtocol, f"{names} _unsupported_upgrade_warning", used_in=used_in)
    check_names(httptools.HttpRequestParser, "get_http_version get_method", used_in=used_in)
    protocol, transport = connected(httptools_impl.HttpToolsProtocol)
    check_names(protocol, "parser pipeline", used_in=used_in)
    transport.feed_data(get(b"/1") + get(b"/2") + get(b"/3"))
    assert protocol.url == b"/3"
    assert [cycle.scope["path"] for cycle, _ in protocol.pipeline] == ["/3", "/2"], "the latest is not on the left"
    assert protocol.pipeline[0][0] is protocol.cycle
    transport.abort()
    await settle()


@pytest.mark.parametrize("protocol_class", [WebSocketsSansIOProtocol, WSProtocol])
@run_async
async def test_the_websocket_protocols_have_what_the_guard_touches(protocol_class: Any) -> None:
    check_names(protocol_class, "shutdown", used_in="guard.py")
    protocol = protocol_class(config=loaded(), server_state=uvicorn.server.ServerState(), app_state={})
    check_names(protocol, "transport", used_in="guard.py")
    if protocol_class is WebSocketsSansIOProtocol:
        assert protocol.handshake_initiated is False


class SpyTransport:
    """Passes everything on, and notes what was asked."""

    def __init__(self, transport: TunnelTransport, asked: set[str], keys: set[str]) -> None:
        self._transport = transport
        self._asked = asked
        self._keys = keys

    def __getattr__(self, name: str) -> Any:
        self._asked.add(name)
        if name == "get_extra_info":
            return self._get_extra_info
        return getattr(self._transport, name)

    def _get_extra_info(self, name: str, default: Any = None) -> Any:
        self._keys.add(name)
        return self._transport.get_extra_info(name, default)


TRANSPORT_METHODS = {
    "write",
    "close",
    "is_closing",
    "pause_reading",
    "resume_reading",
    "set_protocol",
    "get_extra_info",
}


async def converse(protocol_class: Any, ws: str, asked: set[str], keys: set[str]) -> None:
    """Requests with a large body, pipelined, malformed; a WebSocket that is shut down, and one that is closed."""
    for conversation in (
        [post(b"Content-Length: 300000"), *[b"x" * 100_000] * 3, get(b"/1") + get(b"/2")],
        [request(b"Bad header")],
        [request(*UPGRADE), b"\x81\x82\0\0\0\0hi", b"\x89\x80\0\0\0\0"],
        [request(*UPGRADE), b"\x88\x82\0\0\0\0\x03\xe8"],
    ):
        protocol, transport = make_protocol(protocol_class, ws=ws)
        protocol.connection_made(SpyTransport(transport, asked, keys))
        for piece in conversation:
            transport.feed_data(piece)
            await settle()
        current: Any = transport.get_protocol()
        if not transport.is_closing():
            current.shutdown()
        transport.feed_eof()
        await settle()


@pytest.mark.parametrize("protocol_class", HTTP_PROTOCOLS)
@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
@run_async
async def test_uvicorn_asks_of_a_transport_only_what_ours_has(protocol_class: Any, ws: str) -> None:
    asked: set[str] = set()
    keys: set[str] = set()
    await converse(protocol_class, ws, asked, keys)
    own = vars(TunnelTransport).keys() | {"get_extra_info"}
    assert asked <= own, f"uvicorn now asks for {asked - own}, which TunnelTransport does not implement"
    assert asked <= TRANSPORT_METHODS, f"uvicorn now asks for {asked - TRANSPORT_METHODS}: is that implemented right?"
    assert {"write", "close", "set_protocol", "get_extra_info"} <= asked, "the spy is blind"
    assert keys <= {"socket", "peername", "sockname", "sslcontext"}, f"uvicorn now asks for {keys}"


def test_our_transport_implements_all_of_asyncios() -> None:
    public = {name for name in dir(asyncio.Transport) if not name.startswith("_")}
    inherited = public - vars(TunnelTransport).keys()
    assert inherited == {"get_extra_info"}, f"asyncio.Transport has more than TunnelTransport: {inherited}"


# uvicorn: processes and the command line


@pytest.mark.parametrize("kind", [StatReload, WatchFilesReload])
def test_the_reloader_is_an_iterator_that_an_event_ends(kind: Any, tmp_path: Any) -> None:
    check_parameters(kind, "config target sockets", used_in="supervisor.py")
    config = uvicorn.Config("tests.support:app", reload=True, reload_dirs=[str(tmp_path)], log_config=None)
    reloader = kind(config, target=lambda sockets: None, sockets=[])
    assert isinstance(reloader.should_exit, threading.Event)
    reloader.should_exit.set()
    assert not any(reloader)
    if kind is StatReload:
        check_names(reloader, "mtimes iter_py_files", used_in="supervisor.py")
    assert uvicorn.supervisors.ChangeReload is WatchFilesReload


def test_uvicorns_command_is_made_of_click_parameters_with_the_names_we_change() -> None:
    assert isinstance(command, click.Command)
    assert all(isinstance(parameter, click.Parameter) for parameter in command.params)
    names = {parameter.name for parameter in command.params}
    changed = {"app", "log_config", "headers", "reload_dirs", "reload_includes", "reload_excludes", "app_dir"}
    wanted = IGNORED_UVICORN_OPTIONS | DIFFERENT_DEFAULTS.keys() | changed
    assert wanted <= names, f"uvicorn has no option {sorted(wanted - names)} any more; see tunnel_asgi/cli.py"


# websockets


def test_websockets_connect_takes_what_we_pass() -> None:
    names = "additional_headers user_agent_header compression proxy open_timeout max_size logger create_connection"
    check_parameters(websockets.asyncio.client.connect, names, used_in="connection.py")


class RecordedWebSocket(asyncio.Protocol):
    """Stands for a connection; notes what ``connect`` asks of it."""

    def __init__(self, calls: list[Any], error: Exception | None, transports: list[Any]) -> None:
        self._calls = calls
        self._error = error
        self._transports = transports
        self.transport: Any = self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transports.append(transport)

    def abort(self) -> None:
        self._calls.append("transport.abort")

    async def handshake(self, *args: Any) -> None:
        self._calls.append(("handshake", *args))
        if self._error is not None:
            raise self._error

    def start_keepalive(self) -> None:
        self._calls.append("start_keepalive")


@pytest.mark.parametrize(
    ("error", "last"), [(None, "start_keepalive"), (websockets.exceptions.InvalidHandshake(), "transport.abort")]
)
@run_async
async def test_websockets_connect_asks_of_a_connection_what_ours_has(error: Exception | None, last: str) -> None:
    calls: list[Any] = []
    real: list[Any] = []

    def create_connection(protocol: Any, **options: Any) -> Any:
        assert isinstance(protocol, websockets.client.ClientProtocol)
        return RecordedWebSocket(calls, error, real)

    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        headers = {"Authorization": "x"}
        connecting = websockets.asyncio.client.connect(
            f"ws://{host}:{port}",
            create_connection=cast(Any, create_connection),
            additional_headers=headers,
            user_agent_header="us",
            proxy=None,
        )
        with contextlib.suppress(websockets.exceptions.InvalidHandshake):
            await connecting
        for transport in real:
            transport.abort()
    assert calls == [("handshake", headers, "us"), last]


def test_the_websockets_protocol_has_the_methods_we_drive_it_with() -> None:
    protocol = websockets.client.ClientProtocol(websockets.uri.parse_uri("ws://localhost/"))
    names = (
        "connect send_request receive_data receive_eof events_received data_to_send close_expected send_binary "
        "send_text send_ping send_close fail state handshake_exc parser_exc close_rcvd close_sent close_rcvd_then_sent"
    )
    check_names(protocol, names, used_in="connection.py")
    check_parameters(protocol.send_close, "code reason", used_in="connection.py")
    assert protocol.state is websockets.protocol.State.CONNECTING
    check_names(websockets.protocol.State, "OPEN", used_in="connection.py")
    check_names(protocol.connect(), "headers", used_in="connection.py")
    check_names(websockets.frames.Opcode, "BINARY TEXT CONT", used_in="connection.py")
    frame = websockets.frames.Frame(websockets.frames.Opcode.TEXT, b"x")
    check_names(frame, "opcode data fin", used_in="connection.py")


def test_a_refused_handshake_shows_its_status_and_headers() -> None:
    response = websockets.http11.Response(402, "Payment Required", Headers({"Retry-After": "1"}), b"")
    error = websockets.exceptions.InvalidStatus(response)
    assert error.response.status_code == 402
    assert error.response.headers.get_all("retry-after") == ["1"]
    assert issubclass(websockets.exceptions.InvalidStatus, websockets.exceptions.InvalidHandshake)


@run_async
async def test_a_server_connection_of_websockets_has_what_the_relay_reaches_into() -> None:
    connections: asyncio.Queue[Any] = asyncio.Queue()

    async def handler(ws: websockets.asyncio.server.ServerConnection) -> None:
        await connections.put(ws)
        await ws.wait_closed()

    async with websockets.asyncio.server.serve(handler, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with websockets.asyncio.client.connect(f"ws://{host}:{port}", proxy=None):
            connection = await connections.get()
            names = "transport protocol state remote_address connection_lost_waiter send_data drain recv send close"
            check_names(connection, names, used_in="relay/wire.py")
            check_names(connection.recv_messages, "resume paused", used_in="relay/wire.py")


# h11


def test_h11_has_what_the_strict_connection_reads() -> None:
    connection = h11.Connection(h11.SERVER, 100)
    check_names(connection, "their_state next_event", used_in="strict.py")
    assert connection.their_state is h11.IDLE
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: x")
    assert connection.next_event() is h11.NEED_DATA
    assert connection.trailing_data == (b"GET / HTTP/1.1\r\nHost: x", False)
    connection.receive_data(b"y" * 100)
    with pytest.raises(h11.RemoteProtocolError) as raised:
        connection.next_event()
    assert raised.value.error_status_hint == 431


def test_the_buffer_of_h11_can_be_looked_into_without_a_copy_and_is_what_is_not_parsed_yet() -> None:
    connection = h11.Connection(h11.SERVER)
    pieces = (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chu",
        b"nked\r\n\r\n3;a=b\r\nab",
        b"c\r\n0\r\nX: y\r\n\r\nrest",
    )
    for piece in pieces:
        connection.receive_data(piece)
        event: Any = None
        while event not in (h11.NEED_DATA, h11.PAUSED):
            event = connection.next_event()
            buffer: Any = connection._receive_buffer
            check_names(buffer, "_data", used_in="strict.py")
            assert type(buffer._data) is bytearray
            assert (bytes(buffer._data), len(buffer)) == (connection.trailing_data[0], len(connection.trailing_data[0]))


def test_h11_takes_the_framing_of_a_chunk_and_all_trailers_together_with_their_event() -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.next_event()
    framing = [b"3;" + b"e" * 5000 + b"\r\n", b"\r\n3\r\n", b"\r\n0\r\nX: " + b"t" * 5000 + b"\r\n\r\n"]
    connection.receive_data(b"abc".join(framing))
    for around in framing:  # why what stands around the bytes may be judged by its first FRAMING_LIMIT bytes
        before = len(connection.trailing_data[0])
        event = connection.next_event()
        taken = before - len(connection.trailing_data[0])
        assert taken - len(getattr(event, "data", b"")) == len(around)
        assert type(event) is (h11.EndOfMessage if around is framing[-1] else h11.Data)


def test_h11_takes_from_its_buffer_only_what_an_event_is_made_of() -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nrest"
    )
    left: list[tuple[Any, bytes]] = []
    while (event := connection.next_event()) is not h11.PAUSED:
        left.append((type(event), connection.trailing_data[0]))
    assert left == [
        (h11.Request, b"3\r\nabc\r\n0\r\n\r\nrest"),
        (h11.Data, b"\r\n0\r\n\r\nrest"),
        (h11.EndOfMessage, b"rest"),
    ]


def test_a_request_of_h11_can_be_made_again() -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"GET http://x/ HTTP/1.1\r\nHost: x\r\nX: \xff\r\n\r\n")
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    headers: Iterable[tuple[bytes, bytes]] = list(event.headers)
    again = h11.Request(method=event.method, target=b"/", headers=list(headers), http_version=event.http_version)
    assert list(again.headers) == [(b"host", b"x"), (b"x", b"\xff")]


def test_h11_ignores_nothing_after_a_last_request() -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.0\r\n\r\n")
    while connection.their_state is not h11.MUST_CLOSE:
        connection.next_event()
    connection.receive_data(b"more")
    with pytest.raises(h11.RemoteProtocolError):  # why the guard feeds it no more
        connection.next_event()


# a2wsgi


@run_async
async def test_a2wsgi_calls_the_app_by_its_executor_with_the_scope_and_an_input_in_the_environment() -> None:
    class Recorder(ThreadPoolExecutor):
        calls = 0

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().submit(*args, **kwargs)

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["asgi.scope"]["ours"], environ["wsgi.input"].read(3), environ["wsgi.input"].read(3)]

    async def receive() -> Any:
        return {"type": "http.request", "body": b"body", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    sent: list[Any] = []
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "http_version": "1.1", "ours": b"key"}
    middleware: Any = WSGIMiddleware(wsgi)
    check_names(middleware, "executor", used_in="wsgi.py")
    with Recorder(1) as middleware.executor:
        await middleware(scope, receive, send)
        assert middleware.executor.calls == 1
    assert sent == [None, b"key", b"bod", b"y", b""]


# Django


def test_django_has_what_runtunnel_calls() -> None:
    check_names(django.template.autoreload, "reset_loaders", used_in="contrib/django/site.py")
    command = django.core.management.base.BaseCommand
    check_names(command, "check check_migrations", used_in="contrib/django/site.py")
    check_parameters(command.check, "display_num_errors", used_in="contrib/django/site.py")
