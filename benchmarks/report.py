"""Tables of what was measured, for the terminal and for README.md.

python -m benchmarks.report RESULTS.json     writes the tables into benchmarks/README.md
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import CONTENDERS, STACKS
from benchmarks.goals import FIGURE_GOALS, RATIO_GOALS, verdict
from benchmarks.loads import LOADS
from benchmarks.results import Results, summary

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

RATIO_DIGITS = 3  # enough to see on which side of its goal a ratio is

Row = Sequence[str]


def cost_table(results: Results) -> list[Row]:
    """CPU microseconds of each contender for each stack and load, and how many cores it and the generator used."""
    rows: list[Row] = [["stack", "one operation", *(f"{name}, us" for name in CONTENDERS), "cores", "generator"]]
    for stack, load in _measured(results):
        costs = [summary(results.costs(stack, load, name), 1) for name in CONTENDERS]
        cores = [_cores(results, stack, load, spent) for spent in ("cpu_seconds", "generator_seconds")]
        rows.append([stack, LOADS[load].title, *costs, *cores])
    return rows


def ratio_table(results: Results) -> list[Row]:
    """What the tunnel costs of the others."""
    rows: list[Row] = [["stack", "one operation", "tunnel / port", "tunnel / forward"]]
    for stack, load in _measured(results):
        ratios = [results.ratios(stack, load, "tunnel", yardstick) for yardstick in ("port", "forward")]
        rows.append([stack, LOADS[load].title, *map(summary, ratios)])
    return rows


def figure_table(results: Results) -> list[Row]:
    """What is no load."""
    return [["figure", "measured"], *([name, summary(values)] for name, values in results.figures.items())]


def ratio_goals(results: Results) -> list[Row]:
    """The ratios beside their goals."""
    rows: list[Row] = [["ratio", "goal", *STACKS]]
    for goal in RATIO_GOALS:
        if any(found := [goal.values(results, stack) for stack in STACKS]):
            rows.append(
                [goal.title, f"<= {goal.limit:.2f}", *(_judged(values, goal.limit, RATIO_DIGITS) for values in found)]
            )
    return rows


def figure_goals(results: Results) -> list[Row]:
    """The figures beside their goals."""
    rows: list[Row] = [["figure", "goal", "measured"]]
    for goal in FIGURE_GOALS:
        if values := goal.values(results):
            limit = f"<= {goal.limit} {goal.unit}".rstrip()
            rows.append([goal.title, limit, _judged(values, goal.limit, goal.digits)])
    return rows


def text_report(results: Results) -> str:
    """For the terminal."""
    tables = [table(results) for table in (cost_table, ratio_table, figure_table, ratio_goals, figure_goals)]
    failures = [f"FAILED {failure}" for failure in results.failures]
    return "\n\n".join([*map(_aligned, filter(_has_rows, tables)), *failures])


def markdown_report(results: Results, plot: Path | None) -> str:
    """For README.md. ``plot`` is a path relative to it."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    parts = [
        f"Measured on {results.date}: {machine}. Medians of {results.rounds} rounds of {results.window} s; "
        "in brackets the least and the most.",
        _markdown(ratio_goals(results)),
        _markdown(figure_goals(results)),
        "" if plot is None else f"![What tunnel and forward cost of the port]({plot.as_posix()})",
        "CPU microseconds for one operation; then the cores that port / tunnel / forward kept busy, and those that the "
        "generator took beside each.",
        _markdown(cost_table(results)),
        "Their ratios, each within a round:",
        _markdown(ratio_table(results)),
        "What the other goals were judged by:",
        _markdown(figure_table(results)),
        *(f"Not measured: {failure}" for failure in results.failures),
    ]
    return "\n\n".join(filter(None, parts))


def update_readme(results: Results, plot: Path | None, readme: Path = README) -> None:
    """Replace what stands between the markers."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    report = markdown_report(results, plot)
    readme.write_text(f"{before}{BEGIN}\n\n{report}\n\n{END}{after}", encoding="utf-8")


def _judged(values: list[float], limit: float, digits: int) -> str:
    return f"{summary(values, digits)} {verdict(values, limit)}".rstrip()


def _measured(results: Results) -> list[tuple[str, str]]:
    """Stacks and loads of which there are samples, in our order."""
    return [(stack, load) for stack in STACKS for load in LOADS if results.of(stack, load)]


def _cores(results: Results, stack: str, load: str, spent: str) -> str:
    """CPU seconds for each second on the clock, beside each contender."""
    cores: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for sample in results.of(stack, load):
        cores[sample.contender].append(getattr(sample, spent) / sample.seconds)
    return " / ".join(f"{statistics.median(values):.1f}" if values else "-" for values in cores.values())


def _aligned(table: list[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def _has_rows(table: list[Row]) -> bool:
    return len(table) > 1


def _markdown(table: list[Row]) -> str:
    """Nothing for a table without rows."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str]) -> None:
    """Write the tables of a JSON file into README.md, with the plot that lies beside it."""
    [name] = arguments
    source = Path(name).resolve()
    plot = source.with_suffix(".png")
    update_readme(Results.load(source), plot.relative_to(README.parent) if plot.exists() else None)


if __name__ == "__main__":
    main(sys.argv[1:])
