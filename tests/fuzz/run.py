"""Fuzz one target with atheris: ``python -m tests.fuzz.run TARGET [libFuzzer options] [corpus folders]``."""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["tunnel_asgi", "h11", "uvicorn.protocols", "websockets"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    logging.disable(logging.CRITICAL)  # what a bad visitor does is logged, a thousand times a second
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
