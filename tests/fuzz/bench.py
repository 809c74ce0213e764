"""Where targets that need a loop run: on a virtual clock, without sockets, and nothing may go unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from tests.support import VirtualClockLoop

__all__ = ["run"]


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run it. Nothing may reach the loop's exception handler, and no task may be left.

    Raises:
        AssertionError: so it is, or the test waits for what can never happen.
    """
    unheard: list[dict[str, Any]] = []
    loop = VirtualClockLoop()
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    try:
        loop.run_until_complete(test)
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks are left: {left}"
    finally:
        loop.close()
    assert not unheard, f"the loop's exception handler was called: {unheard}"
