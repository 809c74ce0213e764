"""Where the time goes: run one load on one contender under py-spy, and print what used it.

python -m benchmarks.profile --load get --stack httptools+uvloop

The stacks are kept in a file that https://www.speedscope.app and flamegraph.pl read.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import uvloop

from benchmarks.contenders import CONTENDERS, STACKS, Running
from benchmarks.loads import LOADS, Load
from benchmarks.measuring import metering

RATE = 500  # samples a second
SHOWN = 30  # functions
PY_SPY = shutil.which("py-spy", path=Path(sys.executable).parent) or "py-spy"


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--load", choices=list(LOADS), default="get")
    parser.add_argument("--stack", choices=list(STACKS), default="httptools+uvloop")
    parser.add_argument("--contender", choices=list(CONTENDERS), default="tunnel")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--native", action="store_true", help="also what runs in compiled code")
    parser.add_argument("--output", type=Path, default=Path("profile.txt"), metavar="FILE")
    options = parser.parse_args()
    uvloop.run(profile(options))
    print(busiest(options.output.read_text()))


async def profile(options: argparse.Namespace) -> None:
    """Sample the contender's last process, which is the one that faces the tunnel, under the load."""
    async with CONTENDERS[options.contender](STACKS[options.stack]) as server:
        command = ["record", "--pid", str(server.pids[-1]), "--duration", str(options.seconds), "--rate", str(RATE)]
        command += [
            "--format",
            "raw",
            "--function",
            "--output",
            str(options.output),
            *(["--native"] if options.native else []),
        ]
        if await run_under(LOADS[options.load], server, command):
            raise SystemExit("py-spy failed; it may need root, or /proc/sys/kernel/yama/ptrace_scope to be 0")


async def run_under(load: Load, server: Running, command: list[str]) -> int:
    """Run py-spy while the load runs; returns its exit code."""
    with metering() as meter:
        await load.begin(meter, server.entrance)
        process = await asyncio.create_subprocess_exec(PY_SPY, *command, stdout=asyncio.subprocess.DEVNULL)
        ended = asyncio.ensure_future(process.wait())
        await meter.until(ended)
        await meter.end()
    return ended.result()


def busiest(stacks: str) -> str:
    """The functions that were on top of the stack most often."""
    tops: Counter[str] = Counter()
    for stack, count in re.findall(r"^(.*) (\d+)$", stacks, re.MULTILINE):
        tops[stack.rpartition(";")[2]] += int(count)
    total = tops.total() or 1
    return "\n".join(f"{count / total:6.1%}  {function}" for function, count in tops.most_common(SHOWN))


if __name__ == "__main__":
    main()
