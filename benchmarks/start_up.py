"""How long do `taxiway --help` and `import taxiway` take, Python's own start included?

`python -m benchmarks.start_up` starts each repeatedly in alternation, with an empty Python for comparison. Compiled
modules are cached, as on a user's machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness.bars import Bar, Panel, write_chart
from benchmarks.harness.measure import CHARTS, answer, machine, say
from tasks.settings import TREE

COMMANDS: Mapping[str, Sequence[str]] = {
    "python": (sys.executable, "-c", "pass"),
    "import taxiway": (sys.executable, "-c", "import taxiway"),
    "taxiway --help": (sys.executable, "-m", "taxiway", "--help"),
}

TARGETS = {"import taxiway": 150.0, "taxiway --help": 120.0}
"""Most milliseconds."""


def main() -> None:
    """Measure, print a line for each, and write the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="starts of each command; the median counts")
    parser.add_argument("--chart", type=Path, default=CHARTS / "start_up.html", help="where the chart is written")
    given = parser.parse_args()
    taken = measured(given.repeats)
    for name, times in taken.items():
        target = TARGETS.get(name)
        met = {} if target is None else {"target": target, "holds": statistics.median(times) <= target}
        say(answer(f"start-up of {name}, ms", times, **met))
    bars = [Bar(name, times, own=name in TARGETS) for name, times in taken.items()]
    write_chart(given.chart, "Start-up", str(machine()["device"]), [Panel("From nothing to the end", "ms", bars)])


def measured(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each start by command, after one warm-up start of each."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as compiled:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment = kept | {"PYTHONPYCACHEPREFIX": compiled}
        for _, (name, command) in itertools.product(range(repeats + 1), COMMANDS.items()):
            began = time.perf_counter()
            subprocess.run(command, cwd=TREE, env=environment, stdout=subprocess.DEVNULL, check=True)
            taken[name].append(1000 * (time.perf_counter() - began))
    return {name: figures[1:] for name, figures in taken.items()}


if __name__ == "__main__":
    main()
