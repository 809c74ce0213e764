"""Tables of what was measured."""

from __future__ import annotations

from benchmarks.contenders import CONTENDERS, STACKS
from benchmarks.loads import LOADS
from benchmarks.results import Results, summary


def cost_rows(results: Results) -> list[list[str]]:
    """CPU microseconds for each stack and load, and their ratios."""
    rows = []
    for stack in STACKS:
        for load in LOADS.values():
            costs = {name: results.costs(stack, load.name, name) for name in CONTENDERS}
            if not any(costs.values()):
                continue
            ratios = [summary(results.ratios(stack, load.name, "tunnel", other)) for other in ("port", "forward")]
            rows.append(
                [stack, f"{load.title}, per {load.unit}", *(summary(cost, 1) for cost in costs.values()), *ratios]
            )
    return rows


COST_HEADER = ["stack", "load", *(f"{name}, us" for name in CONTENDERS), "tunnel / port", "tunnel / forward"]


def text_table(results: Results) -> str:
    """For the terminal."""
    rows = [COST_HEADER, *cost_rows(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *results.failures])
