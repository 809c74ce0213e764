"""What is fuzzed: functions of bytes that raise if a law is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import connection, guard, head, protocol

__all__ = ["CORPUS", "TARGETS", "corpus"]

CORPUS = Path(__file__).parent / "corpus"

TARGETS: dict[str, Callable[[bytes], None]] = {
    "protocol": protocol.check,
    "connection": connection.check,
    "upgrade": connection.check_upgrade,
    "head": head.check,
    "guard": guard.check,
}


def corpus(name: str) -> list[bytes]:
    """The inputs kept for this target."""
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]
