"""What an app shows when it fails while it is loaded: its own frames, not those of who loads it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import TracebackType

__all__ = ["failed_while_loading", "print_app_frames"]

LOADERS = {("uvicorn.importer", "import_from_string"), ("uvicorn.config", "load")}
"""Module and function: who imports the app, and who calls its factory."""

MACHINERY = ("importlib", "tunnel_asgi", "uvicorn")
"""Packages whose frames stand between a loader and the app."""


def failed_while_loading(error: BaseException) -> bool:
    """Whether the app was being imported, or its factory called."""
    return any(_is_loader(step) for step in _steps(error))


def print_app_frames(error: BaseException) -> None:
    """Print to stderr as an interpreter would that had been given the app's module; all frames, if it was loaded."""
    # uvicorn exits when a factory raises a TypeError, and that is no cause of it.
    chain = not isinstance(error.__cause__, SystemExit)
    traceback.print_exception(type(error), error, _app_frames(error), chain=chain)


def _app_frames(error: BaseException) -> TracebackType | None:
    """None if it has none: the module has a syntax error."""
    if not failed_while_loading(error):
        return error.__traceback__
    loading = False
    for step in _steps(error):
        loading = loading or _is_loader(step)
        if loading and _module(step).partition(".")[0] not in MACHINERY:
            return step
    return None


def _steps(error: BaseException) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _is_loader(step: TracebackType) -> bool:
    return (_module(step), step.tb_frame.f_code.co_name) in LOADERS


def _module(step: TracebackType) -> str:
    return str(step.tb_frame.f_globals.get("__name__", ""))
