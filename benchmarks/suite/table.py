"""The suite's lines as Markdown tables, a workload each: `python -m benchmarks.suite.table FILE`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from benchmarks.harness.bars import short
from benchmarks.harness.measure import Line

HEADS = ("", "saturated, a second", "of the limit", "idle p50 / p99 ms", "half load p50 / p99 ms", "CPU µs an item")

Figures = Mapping[str, float]
"""A contestant's medians by measure."""


def tables(lines: Iterable[Line]) -> Iterator[str]:
    """A heading and a table for each workload, the best contestant first."""
    workloads: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    titles: dict[str, str] = {}
    for line in lines:
        if "measure" in line:
            name = str(line["workload"])
            titles[name] = str(line["question"]).partition(":")[0]
            workloads[name][str(line["contestant"])][str(line["measure"])] = float(str(line["median"]))
    for name, contestants in workloads.items():
        yield f"### {titles[name]}\n\n{_table(contestants)}\n"


def _table(contestants: Mapping[str, Figures]) -> str:
    limit = contestants.get("limit", {}).get("saturated", float("nan"))
    ordered = sorted(contestants.items(), key=lambda pair: -pair[1]["saturated"])
    rows = [HEADS, ["---"] * len(HEADS), *(_cells(name, figures, limit) for name, figures in ordered)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(name: str, figures: Figures, limit: float) -> list[str]:
    cpu = sum(figure for measure, figure in figures.items() if measure.startswith("cpu "))
    rate = figures["saturated"]
    return [name, short(rate), f"{rate / limit:.2f}", _times(figures, "idle"), _times(figures, "half load"), short(cpu)]


def _times(figures: Figures, loop: str) -> str:
    times = [figures.get(f"{loop} p{share}") for share in (50, 99)]
    return " / ".join(short(taken) for taken in times if taken is not None)


def main() -> None:
    """Read the file of JSON lines, and print."""
    lines = (msgspec.json.decode(line, type=Line) for line in Path(sys.argv[1]).read_bytes().splitlines() if line)
    sys.stdout.write("\n".join(tables(lines)))


if __name__ == "__main__":
    main()
