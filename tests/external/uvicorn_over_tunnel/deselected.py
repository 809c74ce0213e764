"""The tests of uvicorn that cannot hold over a tunnel, with the reason."""

from __future__ import annotations

__all__ = ["DESELECTED"]

DESELECTED: dict[str, str] = {}
