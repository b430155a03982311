"""The fleet's metrics for Prometheus; docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.view import ClassView, FleetView

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The exposition format that `exposition` writes."""

_PER_CLASS: Mapping[str, tuple[str, Callable[[ClassView], float | None]]] = {
    "devices": ("Live devices.", lambda one: one.devices),
    "utilisation": ("Busy share of the live devices, 0 to 1.", lambda one: one.utilisation),
    "oldest_seconds": ("Seconds since the oldest waiting job was accepted.", lambda one: one.oldest),
    "rows_per_second": ("Rows that arrive a second.", lambda one: one.rows_per_second),
    "usd_per_hour": ("US dollars an hour for the live devices.", lambda one: one.spending),
    "wanted_replicas": ("Devices that the class should have.", lambda one: one.replicas),
}
_PER_LEVEL: Mapping[str, tuple[str, Callable[[ClassView], tuple[float, ...]]]] = {
    "waiting": ("Messages that wait, by priority level.", lambda one: one.depth),
    "work_seconds": ("Device seconds queued and running, by priority level.", lambda one: one.work),
    "held_seconds": ("Device seconds in holding, by priority level.", lambda one: one.held),
}


@dataclass(frozen=True, slots=True)
class Done:
    """What one router did since it started: jobs placed by (class, model), and moved by (source, target, kind)."""

    placed: Mapping[tuple[str, ...], int]
    moved: Mapping[tuple[str, ...], int]


def exposition(view: FleetView, done: Done) -> bytes:
    """All metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(view, done))
    return generate_latest(registry)


class _Families(Collector):
    """One look at the fleet, as metric families."""

    def __init__(self, view: FleetView, done: Done) -> None:
        self._view = view
        self._done = done

    def collect(self) -> Iterable[Metric]:
        """Every family with its samples."""
        yield GaugeMetricFamily("taxiway_stale", "1 while the fleet's state cannot be read.", int(self._view.stale))
        yield from _gauges(self._view.classes)
        yield _counter("placed", "Jobs that this router placed.", ("class", "model"), self._done.placed)
        yield _counter("moved", "Jobs that this router moved.", ("source", "target", "kind"), self._done.moved)


def _gauges(classes: Mapping[str, ClassView]) -> Iterator[Metric]:
    for name, (text, figure) in _PER_CLASS.items():
        family = GaugeMetricFamily(f"taxiway_{name}", text, labels=["class"])
        for label, one in classes.items():
            value = figure(one)
            if value is not None:
                family.add_metric([label], value)
        yield family
    for name, (text, figures) in _PER_LEVEL.items():
        family = GaugeMetricFamily(f"taxiway_{name}", text, labels=["class", "level"])
        for label, one in classes.items():
            for level, value in enumerate(figures(one)):
                family.add_metric([label, str(level)], value)
        yield family


def _counter(name: str, text: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]) -> Metric:
    family = CounterMetricFamily(f"taxiway_{name}", text, labels=labels)
    for values, count in sorted(counts.items()):
        family.add_metric(values, count)
    return family
