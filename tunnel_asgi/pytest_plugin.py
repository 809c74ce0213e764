"""Fixtures that give an app a public URL, for end-to-end and webhook tests. pytest finds them by itself.

pytest imports this module at every start, so it imports nothing that takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tunnel_asgi.sharing import ThreadShare

__all__ = ["tunnel_asgi_share", "tunnel_asgi_share_session"]


@pytest.fixture
def tunnel_asgi_share() -> Generator[Callable[..., ThreadShare]]:
    """Shares apps until the test ends: ``tunnel_asgi_share(app).url`` is what visitors and services open.

    Takes the options of ``tunnel_asgi.share_in_thread`` and returns what that returns; ``local`` is true unless told
    otherwise. The app runs in a thread of its own, so a test may be ``def`` or ``async def``, and may block.
    """
    yield from _sharing()


@pytest.fixture(scope="session")
def tunnel_asgi_share_session() -> Generator[Callable[..., ThreadShare]]:
    """As ``tunnel_asgi_share``, until the whole run ends: for a session's own fixtures."""
    yield from _sharing()


def _sharing() -> Generator[Callable[..., ThreadShare]]:
    from tunnel_asgi.sharing import share_in_thread

    with ExitStack() as tunnels:
        yield lambda app, **options: tunnels.enter_context(share_in_thread(app, **{"local": True, **options}))
