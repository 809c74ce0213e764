"""What the operating system charges to processes: CPU time and memory. Linux only."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_CPUCLOCK_SCHED = 2  # clock_getcpuclockid(3): nanoseconds on a CPU, user and system, all threads


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes and their children so far, to the microsecond.

    It is the same account as the times in ``/proc/<pid>/stat``, which are rounded to 10 ms. A child that ended
    is not counted, so none may end between two looks whose difference counts.

    Raises:
        ProcessLookupError: a process has ended.
    """
    return sum(_cpu_seconds(pid) for pid in with_children(pids))


def memory_kib(pids: Iterable[int]) -> int:
    """KiB of memory that these processes and their children share with nobody."""
    return sum(_private_kib(pid) for pid in with_children(pids))


def with_children(pids: Iterable[int]) -> Iterator[int]:
    """The processes and all their descendants."""
    for pid in pids:
        yield pid
        for thread in Path(f"/proc/{pid}/task").iterdir():
            yield from with_children(map(int, (thread / "children").read_text().split()))


def _cpu_seconds(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        raise ProcessLookupError(f"process {pid} has ended") from None


def _private_kib(pid: int) -> int:
    report = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB$", report, re.MULTILINE))
