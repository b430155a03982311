"""The fleet's metrics for Prometheus (docs/metrics.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from api.operators.view import ClassView, FleetView
from api.routing.counters import Counts
from tasks.heartbeat import BOUNDS, DeviceFacts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The exposition format that `exposition` returns."""

Latency = Mapping[tuple[str, ...], Sequence[float]]
"""The figures of `tasks.heartbeat` by class and stage."""

_PER_FLEET: Mapping[str, tuple[str, Callable[[FleetView], float]]] = {
    "stale": ("1 while the fleet's state cannot be read.", lambda view: view.stale),
    "held_jobs": ("Jobs in holding.", lambda view: view.held),
    "dead_letters": ("Messages that were given up and are kept.", lambda view: view.dead),
    "models_wrong": (
        "Models with a wrong file: not served, or as they were before.",
        lambda view: len(view.disabled) + len(view.outdated),
    ),
    "webhook_events_waiting": ("Events that wait for webhook endpoints.", lambda view: view.webhooks_waiting),
    "webhook_events_dead": ("Events that were given up and are kept.", lambda view: view.webhooks_dead),
}
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
_COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "placed": ("Jobs that this router placed.", ("class", "model")),
    "moved": ("Jobs that this router moved.", ("source", "target", "kind")),
    "yields": ("Running jobs that this router asked to yield.", ("class",)),
    "refused": ("Requests that this router refused, by error code.", ("code",)),
    "ended": ("Jobs that this router ended before a worker did.", ("outcome",)),
    "parked": ("Arrivals that this router could not read, and dead-lettered.", ()),
    "webhook_attempts": ("Webhook deliveries that this router tried.", ("outcome",)),
    "rejected": (
        "Messages without a router's ticket, or altered after sealing, which workers dead-lettered.",
        ("class",),
    ),
    "results": ("Jobs that workers ended.", ("class", "outcome")),
    "usd": ("US dollars that jobs cost.", ("class", "model", "tenant")),
    "tokens": ("Tokens that endpoints counted or workers made.", ("class", "model", "kind")),
    "aborts": ("Requests to endpoints that were closed early.", ("class", "model")),
}
_LATENCIES: Mapping[str, tuple[str, str]] = {
    "queue": ("queue_wait_seconds", "Seconds from a job's acceptance to its start."),
    "run": ("run_seconds", "Seconds of the batches that a job ran in."),
    "total": ("latency_seconds", "Seconds from a job's acceptance to its result."),
    "bound": ("bound_ratio", "Share of the seconds that a placement stated as at most which the job took."),
    "first": ("first_token_seconds", "Seconds from sending a request to an endpoint to the first part of its answer."),
    "token": ("token_seconds", "Seconds for each token of an endpoint's answer after the first part."),
}


def exposition(view: FleetView, counted: Mapping[str, Counts], latency: Latency) -> bytes:
    """All metrics in Prometheus's text format: the view's, counters by name, and latencies by class and stage."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(view, counted, latency))
    return generate_latest(registry)


class _Families(Collector):
    """The metric families."""

    def __init__(self, view: FleetView, counted: Mapping[str, Counts], latency: Latency) -> None:
        self._view = view
        self._counted = counted
        self._latency = latency

    def collect(self) -> Iterable[Metric]:
        """Every family with its samples."""
        for name, (text, figure) in _PER_FLEET.items():
            yield GaugeMetricFamily(f"taxiway_{name}", text, float(figure(self._view)))
        yield from _gauges(self._view.classes)
        for name, (text, labels) in _COUNTERS.items():
            family = CounterMetricFamily(f"taxiway_{name}", text, labels=labels)
            for values, count in sorted(self._counted[name].items()):
                family.add_metric(values, count)
            yield family
        yield _endpoints(self._view.devices)
        yield from _histograms(self._latency)


def _endpoints(devices: Iterable[DeviceFacts]) -> Metric:
    """Endpoints by class and by the state of their circuit breaker."""
    family = GaugeMetricFamily("taxiway_endpoints", "Endpoints, by class and state.", labels=["class", "state"])
    counts = Counter((device.hardware_class, one.state) for device in devices if (one := device.endpoint) is not None)
    for values, endpoints in sorted(counts.items()):
        family.add_metric(values, endpoints)
    return family


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


def _histograms(latency: Latency) -> Iterator[Metric]:
    bounds = [*map(str, BOUNDS), "+Inf"]
    for stage, (name, text) in _LATENCIES.items():
        family = HistogramMetricFamily(f"taxiway_{name}", text, labels=["class"])
        for (label, _), (*counts, seconds) in sorted(pair for pair in latency.items() if pair[0][1] == stage):
            family.add_metric([label], list(zip(bounds, accumulate(counts), strict=True)), seconds)
        yield family
