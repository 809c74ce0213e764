"""What was measured, as data: it goes to JSON and back, and every table and plot is made from it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Sample:
    """One load on one contender in one round: CPU time within a window of the clock."""

    stack: str
    load: str
    contender: str
    round: int
    operations: int
    seconds: float
    cpu_seconds: float
    """Of the exposing side, all its processes."""
    generator_seconds: float
    """CPU time of the load generator; near ``seconds`` it was the bottleneck."""

    @property
    def cost(self) -> float:
        """CPU microseconds of one operation."""
        return self.cpu_seconds / self.operations * 1e6


class Figure(StrEnum):
    """What is measured and is no load."""

    BURST_TUNNEL = "last first byte of 50 visitors, tunnel, ms"
    BURST_ONE_ACCEPT = "last first byte of 50 visitors, one pending accept, ms"
    VISITOR_PORT = "memory of a visitor connection, port, KiB"
    VISITOR_TUNNEL = "memory of a visitor connection, tunnel, KiB"
    WAITING = "memory of a waiting WebSocket, KiB"
    START_PORT = "start-up to the first byte, uvicorn, ms"
    START_TUNNEL = "start-up to the first byte, tunnel-asgi --local, ms"
    IDLE_PORT = "CPU when idle, port, % of a core"
    IDLE_TUNNEL = "CPU when idle, tunnel with 8 waiting WebSockets, % of a core"


@dataclass
class Results:
    """One run."""

    date: str
    machine: dict[str, str]
    rounds: int
    window: float
    """Seconds of one sample."""
    samples: list[Sample] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    """What is not a load: one value for each round."""
    failures: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def note(self, values: Mapping[Figure, float]) -> None:
        """Add one value to each of these figures, which belong to the same round."""
        for name, value in values.items():
            self.figures.setdefault(name, []).append(value)

    def costs(self, stack: str, load: str, contender: str) -> list[float]:
        """CPU microseconds of one operation in each round."""
        return [
            sample.cost
            for sample in self.samples
            if (sample.stack, sample.load, sample.contender) == (stack, load, contender)
        ]

    def ratios(self, stack: str, load: str, contender: str, yardstick: str) -> list[float]:
        """What one contender costs of the other, in each round that has both."""
        costs = {(sample.contender, sample.round): sample.cost for sample in self.of(stack, load)}
        rounds = [number for name, number in costs if name == contender and (yardstick, number) in costs]
        return [costs[contender, number] / costs[yardstick, number] for number in rounds]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        content = json.loads(path.read_text(encoding="utf-8"))
        samples = [Sample(**sample) for sample in content.pop("samples")]
        return cls(**content, samples=samples)

    def of(self, stack: str, load: str) -> list[Sample]:
        """The samples of all contenders."""
        return [sample for sample in self.samples if (sample.stack, sample.load) == (stack, load)]


def summary(values: Sequence[float], digits: int = 2) -> str:
    """Median and spread."""
    if not values:
        return "not measured"
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"
