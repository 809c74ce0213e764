"""What travels: known to the app, which sends it, and to the generator, which checks it."""

from __future__ import annotations

import random

DOWNLOAD = "/download"
UPLOAD = "/upload"
CHECKED_UPLOAD = "/upload/checked"
PUBLISH = "/publish"
EVENTS = "/events"

MIB = 1024 * 1024

HELLO = b"hello"
BODY = random.Random(1).randbytes(MIB)  # reproducible, and no two parts of it are alike
EVENT = b"data: " + 40 * b"e" + b"\n\n"
MESSAGE = b"m" * 32  # bytes; a small WebSocket message
