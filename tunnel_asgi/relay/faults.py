"""What a tunnel server can do to a client that dials: refuse it, be slow, never answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from tunnel_asgi.relay.head import Refused

__all__ = ["DialFaults"]


class DialFaults:
    """The fault verbs about dials. They hold for the dials that come after the call."""

    def __init__(self) -> None:
        self._refusal: Callable[[], Refused] | None = None
        self._refusals_left: int | None = None
        self._delay = 0.0
        self._answering = asyncio.Event()
        self._answering.set()
        self._faults_over = asyncio.Event()

    def refuse(self, status: int, *, times: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next ``times`` dials (None: all) with this HTTP status instead of judging them.

        ``headers`` replace those of the same name, ``Date`` for instance.
        """
        self._refusal = partial(Refused, status, "this dial is refused on purpose", headers)
        self._refusals_left = times

    def delay(self, seconds: float) -> None:
        """Let every upgrade wait this long before it is judged; 0 ends it."""
        self._delay = seconds

    def hang(self) -> None:
        """Answer no upgrade until ``accept()`` (or until the dial is 60 s old)."""
        self._answering.clear()

    def accept(self) -> None:
        """End ``refuse`` and ``hang``; dials that hang are judged now."""
        self._refusal = None
        self._answering.set()

    async def _dial_fault(self) -> None:
        """Wait as long as this dial shall wait.

        Raises:
            Refused: it is one of those to be refused.
        """
        if self._delay:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._delay):
                    await self._faults_over.wait()
        await self._answering.wait()
        if self._refusal is None or self._refusals_left == 0:
            return
        if self._refusals_left is not None:
            self._refusals_left -= 1
        raise self._refusal()

    def _end_dial_faults(self) -> None:
        """Let every dial go that waits for us, for good."""
        self._answering.set()
        self._faults_over.set()
