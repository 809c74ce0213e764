"""What the project aims at, as data: the figure, the limit, and how it follows from what was measured."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.results import Figure, Results


@dataclass(frozen=True)
class RatioGoal:
    """A limit for what the tunnel costs of a yardstick, for each stack."""

    title: str
    load: str
    yardstick: str
    limit: float

    def values(self, results: Results, stack: str) -> list[float]:
        """The ratio in each round."""
        return results.ratios(stack, self.load, "tunnel", self.yardstick)


@dataclass(frozen=True)
class FigureGoal:
    """A limit for a figure, or for what two of them give."""

    title: str
    limit: float
    unit: str
    digits: int
    names: tuple[Figure, ...]
    combine: Callable[..., float]

    def values(self, results: Results) -> list[float]:
        """The figure in each round."""
        columns = [results.figures.get(name, []) for name in self.names]
        return [self.combine(*row) for row in zip(*columns, strict=False)]


def verdict(values: list[float], limit: float) -> str:
    """The median decides."""
    if not values:
        return ""
    return "met" if statistics.median(values) <= limit else "missed"


RATIO_GOALS = (
    RatioGoal("CPU per small request, tunnel / port", "get", "port", 1.0),
    RatioGoal("CPU per small request, tunnel / forward", "get", "forward", 0.5),
    RatioGoal("CPU per downloaded MiB, tunnel / port", "download", "port", 1.5),
    RatioGoal("CPU per uploaded MiB, tunnel / port", "upload", "port", 1.5),
    RatioGoal("CPU per WebSocket echo message, tunnel / port", "echo", "port", 1.3),
    RatioGoal("CPU per visitor connection, recycled WebSocket / new TCP connection", "visit", "port", 1.0),
)

FIGURE_GOALS = (
    FigureGoal(
        "first byte for the last of 50 visitors at once (p99), tunnel / one pending accept",
        0.2,
        "",
        3,
        (Figure.BURST_TUNNEL, Figure.BURST_ONE_ACCEPT),
        operator.truediv,
    ),
    FigureGoal("memory per open idle visitor connection", 60, "KiB", 1, (Figure.VISITOR_TUNNEL,), float),
    FigureGoal("memory per waiting WebSocket", 40, "KiB", 1, (Figure.WAITING,), float),
    FigureGoal(
        "extra start-up time over uvicorn, to the first byte on the embedded relay",
        150,
        "ms",
        0,
        (Figure.START_TUNNEL, Figure.START_PORT),
        operator.sub,
    ),
    FigureGoal(
        "CPU when idle with 8 waiting WebSockets, above uvicorn's",
        0.1,
        "% of a core",
        3,
        (Figure.IDLE_TUNNEL, Figure.IDLE_PORT),
        operator.sub,
    ),
)
