"""The bytes of a fuzzer, read as decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Tape"]

T = TypeVar("T")


class Tape:
    """Every byte decides something; behind the end all decisions are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        """Whether there is something left to decide."""
        return self._position < len(self._data)

    def byte(self) -> int:
        return self.take(1)[0] if self else 0

    def flag(self) -> bool:
        return self.byte() % 2 == 1

    def choose(self, items: Sequence[T]) -> T:
        return items[self.byte() % len(items)]

    def take(self, size: int) -> bytes:
        """Up to this many bytes as they are."""
        data = self._data[self._position : self._position + size]
        self._position += len(data)
        return data

    def chunk(self) -> bytes:
        """Some bytes as they are; a byte says how many."""
        return self.take(self.byte())
