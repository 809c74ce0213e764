"""One WebSocket to the tunnel server: dial it, pump it, time it, recycle it.

Follow the bytes: ``data_received`` reads frames, ``_receive`` turns them into events of the wire protocol,
and the events go straight into the visitor's transport, all in one callback. Responses come back through the
``Wire`` methods.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import logging
import ssl
import time
from typing import Any, Protocol, cast

from websockets.asyncio.client import ClientConnection, connect
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidProxy, InvalidStatus, ProxyError
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State

from tunnel_asgi.auth import JwtManager
from tunnel_asgi.config import TunnelConfig
from tunnel_asgi.errors import (
    AuthenticationFailed,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    NoCredits,
    ProtocolError,
    ServerError,
    UpgradeRefused,
    WebSocketError,
)
from tunnel_asgi.protocol import MAX_TEXT, ClientSide, Connected, Dropped, Ended, printable, without_token
from tunnel_asgi.transport import TunnelTransport

__all__ = ["Owner", "TunnelConnection", "dial"]

logger: logging.Logger = logging.getLogger("tunnel_asgi")

# websockets logs the whole upgrade request at DEBUG, and the token stands in it. This logger hangs in no
# hierarchy, so no logging configuration can switch it on.
_silent_logger = logging.Logger("tunnel_asgi.websocket", level=logging.CRITICAL + 1)

LAST_BYTES = 1024 * 1024  # bytes read after the end of a WebSocket, in which its close frame must come
CLOSE_TIMEOUT = 5.0  # seconds for the server to answer our close frame
HIGH_WATER = 64 * 1024  # bytes in the socket's buffer past which we wait; asyncio's default with TLS is 512 KiB
WRITE_LIMIT = 1024 * 1024  # bytes there that end the WebSocket: only answers to a flood of pings get so far
LATE = 1.0  # seconds; a timer that fires later was held up by us, and what it waits for may lie in the socket

_numbers = itertools.count(1)  # for visitors to whom the server gave no id


class Owner(Protocol):
    """Who holds a connection, and is told what becomes of it. No method may raise or block."""

    @property
    def accepting(self) -> bool:
        """Whether a WebSocket whose visitor has gone shall wait for another one."""

    def connection_ready(self, connection: TunnelConnection) -> None:
        """The upgrade succeeded: the WebSocket waits for its first visitor."""

    def visitor_connected(self, connection: TunnelConnection, visitor: Connected) -> TunnelTransport:
        """A visitor came; returns the transport that serves it. The connection must not be closed meanwhile."""

    def connection_recycled(self, connection: TunnelConnection) -> None:
        """It waits for another visitor."""

    def connection_ending(self, connection: TunnelConnection, error: WebSocketError | None) -> None:
        """The WebSocket serves nobody any more; ``error`` is None if we closed it in good order."""

    def connection_lost(self, connection: TunnelConnection) -> None:
        """Its TCP connection is gone too."""


class TunnelConnection(asyncio.Protocol):
    """One WebSocket, in one of the states of PROTOCOL.md 5. It is the ``Wire`` of its visitor's transport."""

    def __init__(self, ws: ClientProtocol, owner: Owner, config: TunnelConfig) -> None:
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)  # set by connection_made
        self.visitor: TunnelTransport | None = None
        self.connection_id: str | None = None
        self.answered: bool = False
        """Whether a visitor was ever sent a byte: then it was worth its dial."""
        self._ws = ws
        self._owner = owner
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._side = ClientSide()
        self._response: asyncio.Future[None] = self._loop.create_future()
        self._ready = False
        self.writable = True
        self._reading_paused = False
        self._ended = False

        self._fragments = bytearray()  # of a text message only; bytes are passed on as they come
        self._message_opcode = Opcode.BINARY
        self._message_size = 0

        self._discarded = 0
        self._heard_at = 0.0
        self._pinged_at = 0.0
        self._stuck_at = 0
        self._keepalive_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._close_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<TunnelConnection {self.state} id={self.connection_id}>"

    @property
    def state(self) -> str:
        """A word for logs and tests: dialling, waiting, open, draining or closed."""
        if self._ended:
            return "closed"
        if not self._ready:
            return "dialling"
        if self._side.waiting:
            return "waiting"
        return "open" if self.visitor is not None else "draining"

    # What websockets' connect() asks of a connection: see tests/test_contracts.py.

    async def handshake(self, additional_headers: Any = None, user_agent_header: str | None = None) -> None:
        request = self._ws.connect()
        request.headers.update(additional_headers or {})
        if user_agent_header is not None:
            request.headers.setdefault("User-Agent", user_agent_header)
        self._ws.send_request(request)
        self._write_out()
        await self._response
        if self._ws.handshake_exc is not None:
            raise self._ws.handshake_exc

    def start_keepalive(self) -> None:
        """Nothing to do: the watch began when the upgrade succeeded."""

    # asyncio.Protocol: the socket side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._ended and not self._awaits_close(len(data)):
            return
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if self._ended:
                break
            if isinstance(event, Frame):
                self._receive_frame(event)
            else:
                self._upgraded()
        self._write_out()
        if self._ws.state is not State.OPEN:
            if self._ready and self._ws.close_expected():
                self._end(self._why_closed())
        elif not self.writable and self.buffered > WRITE_LIMIT:
            self.abort(WebSocketError("the tunnel server sends pings and reads no pongs"))

    def eof_received(self) -> None:
        self._ws.receive_eof()
        self._write_out()
        if self._ready:
            self._end(WebSocketError("connection lost: end of stream"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._ws.receive_eof()
        if not self._response.done():
            self._response.set_result(None)
        if self._ready:
            self._end(WebSocketError(f"connection lost: {exc or 'end of stream'}"))
            self._owner.connection_lost(self)
        self._stop_timers()

    def pause_writing(self) -> None:
        self.writable = False
        self._watch_writing()

    def resume_writing(self) -> None:
        self.writable = True
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self.visitor is not None:
            self.visitor.wire_writable()

    # Frames to events.

    def _upgraded(self) -> None:
        if self._ws.handshake_exc is None:
            self._ready = True
            self._watch_silence()
            self._owner.connection_ready(self)
        if not self._response.done():
            self._response.set_result(None)

    def _receive_frame(self, frame: Frame) -> None:
        opcode = frame.opcode
        try:
            if opcode is Opcode.BINARY or opcode is Opcode.TEXT:
                self._message_opcode = opcode
                self._message_size = 0
                self._receive_fragment(frame)
            elif opcode is Opcode.CONT:
                self._receive_fragment(frame)
        except ProtocolError as error:
            self._break(error)

    def _receive_fragment(self, frame: Frame) -> None:
        self._message_size += len(frame.data)
        if self._message_opcode is Opcode.TEXT:
            self._receive_text(frame)
        elif frame.data:
            self._receive_data(bytes(frame.data))
        elif frame.fin and not self._message_size:
            self._receive(self._side.receive_binary(b""))

    def _receive_text(self, frame: Frame) -> None:
        if self._message_size > MAX_TEXT:
            raise ProtocolError(f"received a text message of more than {MAX_TEXT} bytes")
        self._fragments += frame.data
        if not frame.fin:
            return
        text = self._fragments.decode(errors="replace")
        self._fragments.clear()
        event = self._side.receive_text(text)
        if event is not None:
            self._receive(event)

    def _receive_data(self, data: bytes) -> None:
        self._side.receive_data()
        if self.visitor is not None:
            self.visitor.feed_data(data)
        else:
            self._discard(len(data))

    def _receive(self, event: Any) -> None:
        if type(event) is Connected:
            self._open(event)
        elif type(event) is Ended:
            if self.visitor is not None:
                self.visitor.feed_eof()
            self._maybe_recycle()
        else:
            assert type(event) is Dropped
            logger.debug("[%s] the visitor was dropped: %s", self.connection_id, event.reason)
            if self.visitor is not None:
                self.visitor.feed_drop(event.reason)
            self._maybe_recycle()

    def _open(self, visitor: Connected) -> None:
        self.connection_id = visitor.connection_id or f"#{next(_numbers)}"  # for logs
        logger.debug("[%s] visitor %s connected", self.connection_id, visitor.ip or "(unknown address)")
        self.visitor = self._owner.visitor_connected(self, visitor)
        self.visitor.start()

    # Wire: what the visitor's transport asks.

    @property
    def buffered(self) -> int:
        return self.transport.get_write_buffer_size()

    def send_data(self, data: bytes | memoryview) -> None:
        self._side.send_data()
        if self._ws.state is State.OPEN:
            self.answered = True
            self._ws.send_binary(data)
            self._write_out()

    def send_eof(self) -> None:
        eof = self._side.send_eof()
        if self._ws.state is State.OPEN:
            self._ws.send_binary(eof)
            self._write_out()

    def pause_reading(self) -> None:
        self._reading_paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._heard_at = self._loop.time()  # what was sent meanwhile, a pong perhaps, is only read from now on
        self.transport.resume_reading()

    def release(self) -> None:
        self.visitor = None
        self._discarded = 0
        if self._owner.accepting and not self._side.ended:
            self._drain_timer = self._loop.call_later(self._config.drain_timeout, self._drain_timed_out)
            return
        self._maybe_recycle()

    # Between two visitors.

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > self._config.drain_limit:
            self.close(1000, "the visitor kept sending after the end")

    def _drain_timed_out(self) -> None:
        self.close(1000, "the visitor did not end its direction")

    def _maybe_recycle(self) -> None:
        if self._ended or self.visitor is not None or self._ws.state is not State.OPEN:
            return
        if not self._owner.accepting:
            self.close(1000)
        elif self._side.ended:
            self._recycle()

    def _recycle(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
        logger.debug("[%s] the visitor connection ended", self.connection_id)
        self.connection_id = None
        self._ws.send_text(self._side.send_reset().encode())
        self._write_out()
        self._owner.connection_recycled(self)

    # The end of the WebSocket.

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close in good order; the server has 5 seconds to answer. A visitor still there is reset."""
        if self._ended:
            return
        if self._ws.state is State.OPEN:
            self._ws.send_close(code, reason)
            self._write_out()
        self._end(None)

    def abort(self, error: WebSocketError | None = None) -> None:
        """Drop the TCP connection at once."""
        self._end(error)
        self.transport.abort()

    def _break(self, error: ProtocolError) -> None:
        self._ws.fail(1002, str(error))
        self._end(error)

    def _end(self, error: WebSocketError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._stop_timers()
        visitor, self.visitor = self.visitor, None
        if visitor is not None:
            visitor.wire_lost(ConnectionResetError(f"the tunnel connection ended: {error or 'closed'}"))
        if self._reading_paused:
            self.resume_reading()  # or the server's answer to our close frame would not be seen
        self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self.transport.abort)
        self._owner.connection_ending(self, error)

    def _why_closed(self) -> WebSocketError:
        if self._ws.parser_exc is not None:
            return ProtocolError(str(self._ws.parser_exc))
        return WebSocketError(f"closed by the server: {printable(str(self._ws.close_rcvd))}")

    def _awaits_close(self, size: int) -> bool:
        """Whether to read on after the end, for the server's close frame; a flood is not read to its end."""
        self._discarded += size
        if self._discarded > LAST_BYTES:
            self.transport.abort()
        return self._discarded <= LAST_BYTES

    # Timers.

    def _watch_silence(self) -> None:
        self._keepalive_timer = self._loop.call_at(self._heard_at + self._config.ping_interval, self._check_silence)

    def _check_silence(self) -> None:
        if self._reading_paused or not self.writable:
            # We cannot hear a pong, or the server not our ping: that is back-pressure, not a dead peer.
            self._heard_at = self._loop.time()
        if self._loop.time() < self._heard_at + self._config.ping_interval:
            self._watch_silence()
        else:
            self._ping()

    def _ping(self) -> None:
        self._ws.send_ping(b"")
        self._write_out()
        self._pinged_at = self._loop.time()
        self._keepalive_timer = self._loop.call_later(self._config.ping_timeout, self._check_answer)

    def _check_answer(self) -> None:
        now = self._loop.time()
        if self._heard_at >= self._pinged_at or self._reading_paused or not self.writable:
            self._check_silence()
        elif now > self._pinged_at + self._config.ping_timeout + LATE:
            self._ping()
        else:
            self.abort(WebSocketError(f"the tunnel server was silent for {now - self._heard_at:.0f} s"))

    def _watch_writing(self) -> None:
        if not self._config.write_timeout:
            return
        self._stuck_at = self.buffered
        self._write_timer = self._loop.call_later(self._config.write_timeout, self._check_writing, self._loop.time())

    def _check_writing(self, since: float) -> None:
        late = self._loop.time() > since + self._config.write_timeout + LATE
        if late or self.buffered < self._stuck_at:
            self._watch_writing()
        else:
            self.abort(WebSocketError(f"a send made no progress for {self._config.write_timeout:.0f} s"))

    def _stop_timers(self) -> None:
        for timer in (self._keepalive_timer, self._write_timer, self._drain_timer, self._close_timer):
            if timer is not None:
                timer.cancel()

    def _write_out(self) -> None:
        for data in self._ws.data_to_send():
            if data:
                self.transport.write(data)
            else:  # websockets asks for the end of the stream
                self.transport.close()


async def dial(config: TunnelConfig, jwt: JwtManager, ssl_context: ssl.SSLContext | None, owner: Owner) -> None:
    """Open one WebSocket; ``owner.connection_ready`` has been called when this returns.

    A 401 is answered once, at once, with a fresh token.

    Raises:
        ConnectionFailed: the server could not be reached within ``open_timeout``.
        AuthenticationFailed, NoCredits, BadRequest, ServerError: it refused the upgrade.
        ConfigError: the proxy set in the environment cannot be used.
    """
    try:
        await _dial(config, jwt.get_token(), ssl_context, owner)
    except AuthenticationFailed as refusal:
        if refusal.status != 401:
            raise
        await _dial(config, jwt.refresh_token(), ssl_context, owner)


async def _dial(config: TunnelConfig, token: str, ssl_context: ssl.SSLContext | None, owner: Owner) -> None:
    def create_connection(protocol: ClientProtocol, **_: Any) -> TunnelConnection:
        return TunnelConnection(protocol, owner, config)

    options: dict[str, Any] = {} if ssl_context is None else {"ssl": ssl_context}
    try:
        await _Connect(
            config.dial_url,
            additional_headers={"Authorization": f"Bearer {token}"},
            user_agent_header="tunnel-asgi",
            compression=None,
            proxy=None if config.server_is_local else True,
            open_timeout=config.open_timeout,
            max_size=(None, config.max_message_size),
            logger=_silent_logger,
            create_connection=cast(type[ClientConnection], create_connection),
            **options,
        )
    except InvalidStatus as error:
        raise _refusal(error.response, config) from None
    except InvalidProxy:  # it quotes the proxy's URL, and a password may stand in it
        raise ConfigError("the proxy in the environment (HTTPS_PROXY, ...) is not a valid URL") from None
    except ImportError as error:
        raise ConfigError("a SOCKS proxy needs another package: pip install 'tunnel-asgi[socks]'") from error
    except InvalidHandshake as error:  # it quotes the answer, and the token may stand in it
        raise ConnectionFailed(config.server_url, without_token(_reason(error))) from None
    except (OSError, UnicodeError) as error:  # UnicodeError: no host of that name can exist
        raise ConnectionFailed(config.server_url, _reason(error)) from error


class _Connect(connect):
    """websockets' ``connect``, which follows no redirect: the token is for the server it was made for."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


def _refusal(response: Response, config: TunnelConfig) -> UpgradeRefused:
    status = response.status_code
    if status in (401, 403):
        kind: type[UpgradeRefused] = AuthenticationFailed
    elif status == 402:
        kind = NoCredits
    elif status == 429 or status >= 500:
        kind = ServerError
    else:
        kind = BadRequest
    return kind(
        status,
        domain=config.domain,
        key_id=config.access_key.key_id,
        retry_after=_retry_after(_header(response, "Retry-After")),
        clock_skew=_clock_skew(_header(response, "Date")),
    )


def _header(response: Response, name: str) -> str | None:
    values = response.headers.get_all(name)
    return values[-1] if values else None


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of RFC 9110 section 10.2.3."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    date = _parse_date(value)
    return None if date is None else max(0.0, date - time.time())


def _clock_skew(value: str | None) -> float | None:
    date = _parse_date(value)
    return None if date is None else time.time() - date


def _parse_date(value: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() if value else None
    except (ValueError, OverflowError):
        return None


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message} (--trust-ca adds a CA of your own)"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, ProxyError) and error.__cause__ is not None:
        return f"{error}: {error.__cause__}"
    if isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError):
        return "it closed the connection during the upgrade"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
