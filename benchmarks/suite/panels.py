"""The suite's figures as bar charts: each contestant's throughput against the limit, and its latencies."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.harness.bars import Bar, Panel
from benchmarks.suite.ratios import Figures
from benchmarks.suite.workloads import Workload

_TIMES = ("idle p50", "idle p99", "half load p50", "half load p99")


def panels_of(workload: Workload, figures: Figures) -> Iterator[Panel]:
    """The panels of one workload, the best contestant first."""
    limit = figures.get(("limit", "saturated"))
    mark = (statistics.median(limit), "the limit, in process") if limit and workload.name != "W0" else None
    yield Panel(
        f"{workload.name} · {workload.title}: {workload.unit} a second, {workload.outstanding} outstanding",
        f"{workload.unit}/s",
        _bars(figures, "saturated", reverse=True),
        limit=mark,
    )
    for measure in _TIMES:
        if bars := _bars(figures, measure, reverse=False):
            yield Panel(f"{workload.name} · {measure}", "ms", bars)
    if bars := _cpu_bars(figures):
        yield Panel(
            f"{workload.name} · processor time an item", "µs", bars, note="Client, broker and servers together."
        )


def _bars(figures: Figures, wanted: str, *, reverse: bool) -> list[Bar]:
    bars = [_bar(name, rounds) for (name, measure), rounds in figures.items() if measure == wanted and name != "limit"]
    return sorted(bars, key=lambda bar: bar.median, reverse=reverse)


def _cpu_bars(figures: Figures) -> list[Bar]:
    parts: dict[str, list[Sequence[float]]] = {}
    for (name, measure), rounds in figures.items():
        if measure.startswith("cpu "):
            parts.setdefault(name, []).append(rounds)
    bars = [_bar(name, [sum(each) for each in zip(*all_parts, strict=True)]) for name, all_parts in parts.items()]
    return sorted(bars, key=lambda bar: bar.median)


def _bar(name: str, rounds: Sequence[float]) -> Bar:
    return Bar(name, rounds, own=name.startswith("taxiway"))
