"""Shared by benchmarks: statistics, the machine's description, and the output line."""

from __future__ import annotations

import functools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from tasks.settings import TREE

CPUINFO = Path("/proc/cpuinfo")

_SCHEDULED = 2
"""The kind of a process's clock that counts its processor time: CPUCLOCK_SCHED in Linux's posix-timers.h."""

CHARTS = TREE / "build" / "benchmarks"
"""The default folder for charts."""

Line = dict[str, object]


def say(line: Mapping[str, object]) -> None:
    """Print a result as a JSON line."""
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


def answer(question: str, figures: Sequence[float], **more: object) -> Line:
    """A result's line: the question, the machine, the figures' summary, and further fields."""
    return {"question": question, **machine(), **summary(figures), **more}


def summary(figures: Sequence[float]) -> Line:
    """Repeats, median and spread (largest minus smallest), to four digits or the thousandth."""
    spread = max(figures) - min(figures)
    return {"repeats": len(figures), "median": _short(statistics.median(figures)), "spread": _short(spread)}


def percentile(taken: Sequence[float], share: float) -> float:
    """The percentile `share` of `taken`."""
    return sorted(taken)[math.ceil(len(taken) * share / 100) - 1]


@functools.cache
def machine() -> Line:
    """The commit and the device of the figures."""
    git = ["git", "-C", str(TREE), "describe", "--always", "--dirty"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": described or "uncommitted", "device": f"{os.cpu_count()} cores, {processor()}"}


def processor() -> str:
    """The processor's name, from Linux."""
    names = [line.partition(":")[2].strip() for line in CPUINFO.read_text().splitlines() if line[:10] == "model name"]
    return names[0] if names else platform.machine()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants; a descendant that has exited is not counted. Linux.

    Read from the processes' clocks: /proc counts in steps of 10 ms.
    """
    seconds = 0.0
    for process in tree(pid):
        with suppress(OSError):
            seconds += time.clock_gettime(~process.pid << 3 | _SCHEDULED)
    return seconds


def thread_switches(pid: int) -> int:
    """How often the threads of a process and its descendants waited for something; Linux.

    Where they had to leave a processor to others does not count: that is those others' doing.
    """
    found = 0
    for process in tree(pid):
        for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
            with suppress(OSError):
                lines = status.read_text().splitlines()
                found += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return found


def tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty if it has exited."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _short(figure: float) -> float:
    digits = 3 if abs(figure) < 1 else max(0, 3 - math.floor(math.log10(abs(figure))))
    return round(figure, digits)
