"""Measure what serving costs: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path

import uvloop

from benchmarks import report
from benchmarks.contenders import CONTENDERS, STACKS
from benchmarks.figures import FIGURES, measure_figure
from benchmarks.loads import LOADS
from benchmarks.machine import describe
from benchmarks.measuring import Pace, measure_stack
from benchmarks.results import Results

FULL = Pace(rounds=5, warm_up=0.3, window=0.8, idle=10)
FOLDER = Path(__file__).parent / "results"
QUICK = Pace(rounds=3, warm_up=0.2, window=0.3, idle=0.5)


def main() -> None:
    """Measure, print, save."""
    options = parse_arguments()
    pace = QUICK if options.quick else FULL
    if options.rounds is not None:
        pace = dataclasses.replace(pace, rounds=options.rounds)
    results = Results(datetime.date.today().isoformat(), describe(), pace.rounds, pace.window)
    uvloop.run(measure(options, pace, results))
    print(report.text_report(results))
    if options.json is not None:
        results.save(options.json)
    if options.save:
        save(results)


def save(results: Results) -> None:
    """Keep the run in the project: JSON, plot, and the tables in README.md."""
    from benchmarks.plot import draw  # matplotlib is there only for this

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{results.date}.json"
    results.save(path)
    draw(results, path.with_suffix(".png"))
    report.main([str(path)])


async def measure(options: argparse.Namespace, pace: Pace, results: Results) -> None:
    """Everything that was asked for."""
    loads = [LOADS[name] for name in options.only if name in LOADS]
    if loads:
        for name in options.stack:
            await measure_stack(STACKS[name], loads, options.contender, pace, results)
    for name in options.only:
        if name in FIGURES:
            await measure_figure(name, pace, results)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short windows, few rounds: to see that it works")
    parser.add_argument("--rounds", type=int, help=f"{FULL.rounds} by default, {QUICK.rounds} with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--save", action="store_true", help="keep the run in benchmarks/results, and in README.md")
    for option, known in (("--only", [*LOADS, *FIGURES]), ("--stack", STACKS), ("--contender", CONTENDERS)):
        names = list(known)
        parser.add_argument(option, nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    return parser.parse_args()


if __name__ == "__main__":
    main()
