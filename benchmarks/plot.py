"""A picture of what tunnel and forward cost of the port."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import STACKS
from benchmarks.loads import LOADS
from benchmarks.results import Results

COLOURS = {"tunnel": "#2a7f9e", "forward": "#d98b3a"}
THICKNESS = 0.38  # of a bar; two of them and a gap make 1


def draw(results: Results, path: Path) -> None:
    """Write the PNG: a panel for each stack, two bars for each load, with the spread."""
    stacks = [stack for stack in STACKS if any(results.of(stack, load) for load in LOADS)]
    figure = Figure(figsize=(4.2 * len(stacks) + 1.6, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(stacks), sharey=True, squeeze=False)[0]
    for stack, axes in zip(stacks, panels, strict=True):
        _draw_stack(results, stack, axes)
    panels[0].invert_yaxis()  # shared by all: the first load on top
    panels[0].legend(loc="lower right")
    figure.suptitle(f"CPU time for one operation, as a multiple of the port's ({results.date})")
    figure.savefig(path)


def _draw_stack(results: Results, stack: str, axes: Axes) -> None:
    for n, contender in enumerate(COLOURS):
        ratios = [results.ratios(stack, load, contender, "port") for load in LOADS]
        middles = [statistics.median(values) if values else 0.0 for values in ratios]
        less = [middle - min(values, default=0.0) for middle, values in zip(middles, ratios, strict=True)]
        more = [max(values, default=0.0) - middle for middle, values in zip(middles, ratios, strict=True)]
        places = [place + (n - 0.5) * THICKNESS for place in range(len(LOADS))]
        axes.barh(places, middles, THICKNESS, xerr=[less, more], color=COLOURS[contender], label=contender, capsize=2)
        for place, middle, end in zip(places, middles, more, strict=True):
            axes.annotate(f" {middle:.2f}", (middle + end, place), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(LOADS)), [load.title for load in LOADS.values()])
    axes.set_title(stack)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
