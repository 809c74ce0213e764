"""Who gets whom: waiting tunnels and held visitors of each domain, both oldest first. Decides without awaiting."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.relay.visitor import Visitor

if TYPE_CHECKING:
    from tunnel_asgi.relay.tunnel import Tunnel

__all__ = ["Router"]

_Item = TypeVar("_Item")


class _Held:
    """A visitor for whom no WebSocket waits yet."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.tunnel: Tunnel | None = None


class Router:
    """Pairs visitors with tunnels of the same domain. At no moment do both wait for the same name."""

    def __init__(self, hold_timeout: float, changed: Callable[[], None]) -> None:
        self._hold_timeout = hold_timeout
        self._changed = changed
        self._waiting: defaultdict[TunnelDomain, deque[Tunnel]] = defaultdict(deque)
        self._held: defaultdict[TunnelDomain, deque[_Held]] = defaultdict(deque)

    @property
    def held(self) -> int:
        """How many visitors are held now."""
        return sum(map(len, self._held.values()))

    def offer(self, tunnel: Tunnel) -> None:
        """Give the tunnel the visitor held longest, or let it wait behind the others."""
        while held := _pop(self._held, tunnel.domain):
            if not held.visitor.gone:
                tunnel.assign(held.visitor)
                held.tunnel = tunnel
                held.visitor.wake()
                return
        self._waiting[tunnel.domain].append(tunnel)

    def withdraw(self, tunnel: Tunnel) -> None:
        """The tunnel takes no visitor any more."""
        _discard(self._waiting, tunnel.domain, tunnel)

    async def route(self, visitor: Visitor, domain: TunnelDomain) -> Tunnel | None:
        """The tunnel that has waited longest; the visitor is held for a bounded time while none does.

        Returns None if the time is up, or the visitor went away meanwhile (``visitor.gone``).
        """
        if visitor.lost:
            return None
        tunnel = _pop(self._waiting, domain)
        if tunnel is None:
            return await self._hold(_Held(visitor), domain)
        tunnel.assign(visitor)
        return tunnel

    async def _hold(self, held: _Held, domain: TunnelDomain) -> Tunnel | None:
        # Whoever comes back from a lost WebSocket came before all others.
        self._held[domain].insert(0 if held.visitor.rerouted else len(self._held[domain]), held)
        self._changed()
        try:
            async with asyncio.timeout(self._hold_timeout):
                while held.tunnel is None and not held.visitor.gone:
                    await held.visitor.event()
        except TimeoutError:
            pass  # a tunnel may have come at the same moment
        finally:
            _discard(self._held, domain, held)
            self._changed()
        return held.tunnel


def _pop(queues: dict[TunnelDomain, deque[_Item]], domain: TunnelDomain) -> _Item | None:
    queue = queues.get(domain)
    return queue.popleft() if queue else None


def _discard(queues: dict[TunnelDomain, deque[_Item]], domain: TunnelDomain, item: _Item) -> None:
    """Take the item out of its queue if it is there; a queue that is empty is forgotten."""
    queue = queues.get(domain, deque())
    if item in queue:
        queue.remove(item)
    if not queue:
        queues.pop(domain, None)
