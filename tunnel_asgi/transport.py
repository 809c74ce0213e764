"""One visitor connection, offered to any asyncio protocol as an ``asyncio.Transport``.

A transport serves exactly one visitor. When it is finished it lets go of its wire, so that nothing a late or
cancelled handler still writes can reach the next visitor on the same WebSocket (PROTOCOL.md 4.8).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

__all__ = ["TunnelTransport", "Wire"]

SLICE = 112 * 1024  # bytes in one outgoing message: glibc maps buffers of 128 KiB afresh, page fault by page fault
PROMPT = 32 * 1024  # bytes written that leave at once, instead of together with what follows in this loop iteration
READ_SIZE = 256 * 1024  # bytes handed to the protocol at once, as many as asyncio reads; a message may be far larger
HELD_LIMIT = 64 * 1024  # bytes held for a paused protocol before the socket itself is paused
HIGH_WATER = 64 * 1024  # bytes not yet handed to the socket at which the protocol is paused, as in asyncio


class Wire(Protocol):
    """What a transport needs of its WebSocket."""

    writable: bool
    """Whether the socket takes more bytes without growing its buffer."""

    @property
    def buffered(self) -> int:
        """Bytes written but still in the socket's buffer."""

    def send_data(self, data: bytes | memoryview) -> None:
        """Send one message of bytes, not empty."""

    def send_eof(self) -> None:
        """End the outgoing direction."""

    def pause_reading(self) -> None:
        """Stop reading the socket."""

    def resume_reading(self) -> None:
        """Read the socket again."""

    def release(self) -> None:
        """The transport is finished: its outgoing direction has ended and nobody reads."""


class TunnelTransport(asyncio.Transport):
    """The transport of one visitor.

    It behaves as asyncio's own: ``close`` flushes first, ``abort`` does not, ``connection_lost`` comes exactly
    once and never from within a call, no bytes are delivered while reading is paused. A visitor that was
    dropped is ``ConnectionResetError``; bytes it sent before are delivered first, unless the protocol writes.

    ``get_extra_info`` knows ``peername`` (the visitor's address and port 0, or None), ``sockname``,
    ``connection_id`` and whatever the pool was told to add.
    """

    def __init__(
        self,
        wire: Wire,
        protocol: asyncio.BaseProtocol,
        *,
        extra: Mapping[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(dict(extra))
        self._wire: Wire | None = wire
        self._loop = loop
        self.set_protocol(protocol)

        self._pending: deque[bytes | memoryview] = deque()
        self._pending_size = 0
        self._flush_scheduled = False
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._writing_paused = False
        self._eof_asked = False
        self._eof_sent = False

        self._reading_paused = False
        self._wire_paused = False
        self._held: deque[bytes | memoryview] = deque()
        self._held_size = 0
        self._input_end: Callable[[], None] | None = None
        self._resume_scheduled = False

        self._closing = False
        self._lost_scheduled = False
        self._dropped: ConnectionResetError | None = None

    def __repr__(self) -> str:
        state = "closing" if self._closing else "open"
        return f"<TunnelTransport {self.get_extra_info('connection_id')} {state}>"

    # What the connection calls.

    def start(self) -> None:
        """Hand the transport to its protocol."""
        self._call_protocol(self._protocol.connection_made, self)

    def feed_data(self, data: bytes) -> None:
        """The visitor sent bytes."""
        if self._closing:
            return
        if self._reading_paused or self._held:
            self._hold(data)
        elif len(data) > READ_SIZE:
            self._hold(data)
            self._deliver_held()
        else:
            self._deliver(data)
            if self._held:  # more than a BufferedProtocol took at once
                self._deliver_held()

    def feed_eof(self) -> None:
        """The visitor ended its direction."""
        if self._closing:
            return
        self._input_end = self._deliver_eof
        if not self._held and not self._reading_paused:
            self._take_input_end()

    def feed_drop(self, reason: str) -> None:
        """The visitor connection failed."""
        error = ConnectionResetError(f"the visitor connection failed: {reason}")
        if self._held:
            self._dropped = error
            self._input_end = lambda: self._finish(error)
        else:
            self._finish(error)

    def wire_lost(self, error: Exception) -> None:
        """The WebSocket is gone, and the visitor connection with it."""
        self._wire = None
        self._finish(error)

    def wire_writable(self) -> None:
        """The socket takes bytes again."""
        self._flush()

    # asyncio.BaseTransport

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Flush what is written, end the direction, read no more."""
        if self._closing:
            return
        self._closing = True
        self._discard_input()
        self._flush()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol: Any = protocol
        self._protocol_buffers = isinstance(protocol, asyncio.BufferedProtocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    # asyncio.ReadTransport

    def is_reading(self) -> bool:
        return not self._reading_paused and not self._closing

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        """Deliver again, from the next loop iteration on. Harmless without a pause."""
        if self._closing or not self._reading_paused:
            return
        self._reading_paused = False
        waits = self._held or self._wire_paused or self._input_end is not None
        if waits and not self._resume_scheduled:
            self._resume_scheduled = True
            self._loop.call_soon(self._deliver_held)

    # asyncio.WriteTransport

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        self._update_writing()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return self._pending_size + (self._wire.buffered if self._wire is not None else 0)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes; what is written within one loop iteration leaves together."""
        if not isinstance(data, bytes):
            if not isinstance(data, bytearray | memoryview):
                raise TypeError(f"data must be a bytes-like object, not {type(data).__name__}")
            data = bytes(data)  # the caller may change it before it leaves
        if self._eof_asked:
            raise RuntimeError("cannot write after write_eof()")
        if self._closing or not data:  # an empty message would be EOF on the wire, PROTOCOL.md 4.1
            return
        if self._dropped is not None:
            self._finish(self._dropped)
            return
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= PROMPT:
            self._flush()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Flush what is written and end the outgoing direction; the visitor may go on sending."""
        if self._closing or self._eof_asked:
            return
        self._eof_asked = True
        self._flush()

    def abort(self) -> None:
        """End the connection at once; what is not sent yet is lost."""
        self._finish(None)

    # Reading

    def _deliver(self, data: bytes | memoryview) -> None:
        if self._protocol_buffers:
            self._call_protocol(self._fill_buffer, memoryview(data))
        else:
            self._call_protocol(self._protocol.data_received, bytes(data))

    def _fill_buffer(self, data: memoryview) -> None:
        """Fill the buffer of a BufferedProtocol once; hold what does not fit."""
        buffer = memoryview(self._protocol.get_buffer(len(data))).cast("B")
        size = min(len(buffer), len(data))
        if not size:
            raise RuntimeError("get_buffer() returned an empty buffer")
        buffer[:size] = data[:size]
        if size < len(data):
            self._held.appendleft(data[size:])
            self._held_size += len(data) - size
        self._protocol.buffer_updated(size)

    def _deliver_eof(self) -> None:
        if not self._call_protocol(self._protocol.eof_received):
            self.close()

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > HELD_LIMIT and not self._wire_paused and self._wire is not None:
            self._wire_paused = True
            self._wire.pause_reading()

    def _take_input_end(self) -> None:
        end, self._input_end = self._input_end, None
        if end is not None:
            end()

    def _deliver_held(self) -> None:
        self._resume_scheduled = False
        while self._held and not self._reading_paused:
            data = self._held.popleft()
            if len(data) > READ_SIZE:
                self._held.appendleft(memoryview(data)[READ_SIZE:])
                data = memoryview(data)[:READ_SIZE]
            self._held_size -= len(data)
            self._deliver(data)
        if self._held or self._reading_paused:
            return
        self._resume_wire()
        self._take_input_end()

    def _resume_wire(self) -> None:
        if self._wire_paused and self._wire is not None:
            self._wire_paused = False
            self._wire.resume_reading()

    def _discard_input(self) -> None:
        self._held.clear()
        self._held_size = 0
        self._input_end = None
        self._resume_wire()

    # Writing

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._lost_scheduled:
            return
        wire = self._wire
        while self._pending and wire is not None and wire.writable:
            wire.send_data(self._next_message())
        self._update_writing()
        if not self._pending:
            self._after_flush()

    def _after_flush(self) -> None:
        if self._eof_asked or self._closing:
            self._send_eof()
        if self._closing:
            self._finish(None)

    def _next_message(self) -> bytes | memoryview:
        """Up to SLICE bytes: small writes joined, or a piece of a large one, which is not copied."""
        if self._pending_size <= SLICE:
            message = b"".join(self._pending)
            self._pending.clear()
            self._pending_size = 0
            return message
        chunks: list[bytes | memoryview] = []
        room = SLICE
        while len(self._pending[0]) <= room:
            chunks.append(self._pending.popleft())
            room -= len(chunks[-1])
        if not chunks:
            large = memoryview(self._pending.popleft())
            self._pending.appendleft(large[SLICE:])
            chunks.append(large[:SLICE])
            room = 0
        self._pending_size -= SLICE - room
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _send_eof(self) -> None:
        if not self._eof_sent and self._wire is not None:
            self._eof_sent = True
            self._wire.send_eof()

    def _update_writing(self) -> None:
        if self._lost_scheduled:
            return
        if not self._writing_paused and self._pending_size > self._high:
            self._writing_paused = True
            self._call_protocol(self._protocol.pause_writing)
        elif self._writing_paused and self._pending_size <= self._low:
            self._writing_paused = False
            self._call_protocol(self._protocol.resume_writing)

    # The end

    def _finish(self, error: BaseException | None) -> None:
        """Forget all buffers, end the direction, let go of the wire, tell the protocol once."""
        if self._lost_scheduled:
            return
        self._lost_scheduled = True
        self._closing = True
        self._pending.clear()
        self._pending_size = 0
        self._discard_input()
        self._send_eof()
        self._loop.call_soon(self._tell_lost, error)
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.release()

    def _tell_lost(self, error: BaseException | None) -> None:
        self._call_protocol(self._protocol.connection_lost, error)

    def _call_protocol(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call into the protocol; an exception ends this visitor's connection, and nothing else."""
        try:
            return call(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._loop.call_exception_handler(
                {
                    "message": "Unhandled exception in a protocol of the tunnel",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
            self._finish(error)
            return None
