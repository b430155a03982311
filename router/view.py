"""The fleet and its models as shown to operators and callers, and its metrics for Prometheus (docs/metrics.md).

One value, `FleetView`, is behind `GET /v2/fleet`, `taxiway top` and the metrics. Workers count outcomes and latencies
since their start; `OutcomeCounters` sums their increments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.port import Head, Moved, QueueMover
from router.decide.classify import Constraints, classify
from router.decide.plan import STALE, Cell, Followed, Tuned, preferred_class
from router.decide.scaling import ScalingTarget
from router.decide.snapshot import FleetSnapshot
from router.service.admission import UNLOADED
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from tasks.heartbeat import BOUNDS, HEARTBEAT, DeviceFacts, Done, Ran, Use, empty, is_emulated
from tasks.models.catalogue import Catalogue, Model, TensorSpec, Variant
from tasks.models.folder import Report
from tasks.topology import HardwareClass, Price, Topology
from taxiway.contract.keys import LEVELS
from taxiway.contract.values import BATCH_AXIS


class ClassView(msgspec.Struct, frozen=True, kw_only=True):
    """One hardware class. Times in seconds, money in US dollars.

    `usd_per_hour` is what a device costs now, and `price` all that queues.yaml says, with the prices of use.
    `depth` is waiting messages by level if the broker reports it, else one total. `work` is device seconds queued and
    running, `held` those in holding for the class, both by level. `oldest` is the age of the oldest waiting job since
    acceptance. `replicas` is the number of devices there should be, and `why` the reason.
    """

    device: str
    devices: int
    emulated: int
    usd_per_hour: float
    price: Price
    spending: float
    utilisation: float
    depth: tuple[int, ...]
    oldest: float
    work: tuple[float, ...]
    held: tuple[float, ...]
    rows_per_second: float
    running: int
    warm: tuple[str, ...]
    replicas: int | None
    why: str


class PlannedCell(msgspec.Struct, frozen=True, kw_only=True):
    """Requests in the plan: the class that they prefer, and the one that they go to until devices of it serve.

    `until_then` is empty if they are placed one by one until then, and None if they do not move.
    """

    model: str
    service: str
    locality: str | None
    prefers: str
    until_then: str | None = None


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """The stored plan and the tuner. Ages are in seconds; `number` is None without a plan that can be read.

    `not_followed` is why this router does not follow it, empty if it does. `followers` of the `routers` follow it.
    `tuner` is the one at work, empty if there is none; what the last tuning found is that `tuned` seconds ago.
    """

    number: int | None
    age: float | None
    not_followed: str
    followers: int
    routers: int
    score: float | None
    cells: tuple[PlannedCell, ...]
    tuner: str
    tuned: float | None = None
    adopted: bool = False
    found: str = ""


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole fleet; `stale` if its state could not be read recently. Moves are latest first.

    `silent` has the workers left out of `devices`, with the seconds since their last heartbeat: they may have died, or
    lost the state store. `held` counts the held jobs, `dead` the dead letters, `webhooks_waiting` and `webhooks_dead`
    the events that wait for webhook endpoints, and those given up. `disabled` gives by name why models are
    not served. `outdated` gives by name and version which models are served as they were before their file became
    invalid; operators took those in `unloaded` out of service. The processes in `restart` use a queues.yaml that has
    changed since they started. `plan` is None if there is neither a plan nor a tuner. `tokens` counts those that were
    read and generated since this router started, as far as engines count what they read.
    """

    stale: bool
    now: float
    held: int
    dead: int
    classes: dict[str, ClassView]
    devices: tuple[DeviceFacts, ...]
    moves: tuple[Moved, ...]
    silent: dict[str, float] = {}
    disabled: Mapping[str, str] = {}
    outdated: Mapping[str, str] = {}
    unloaded: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    plan: PlanView | None = None
    webhooks_waiting: int = 0
    webhooks_dead: int = 0
    tokens: int = 0

    @property
    def spending(self) -> float:
        """US dollars per hour for all live devices."""
        return sum(one.spending for one in self.classes.values())


SILENT = 2.5 * HEARTBEAT
"""Seconds without a heartbeat after which a device is not shown; decisions still use it until `GONE_AFTER`."""


async def view_fleet(
    topology: Topology, reader: FleetReader, queue_mover: QueueMover, targets: Mapping[str, ScalingTarget], store: Store
) -> FleetView:
    """The fleet now, with its queues and held jobs.

    Raises:
        BrokerUnavailableError: the broker or the state store does not answer.
    """
    now, fleet = store.now(), reader.working.fleet
    silent = {} if fleet.stale else silent_for(fleet.devices, reader.heartbeats, now)
    fleet = replace(fleet, devices=tuple(device for device in fleet.devices if device.worker not in silent))
    held, dead = await store.held_and_dead()
    heads = {name: await queue_mover.head(name) for name in sorted(topology.hardware)}
    since = await _accepted(queue_mover, [job for head in heads.values() for job in head.first])
    classes = {
        name: _class_view(name, topology.hardware[name], fleet, head, targets.get(name), _oldest(head, since, now))
        for name, head in heads.items()
    }
    moves = tuple(await queue_mover.moves())
    return FleetView(
        stale=fleet.stale,
        now=now,
        held=held,
        dead=dead,
        classes=classes,
        devices=fleet.devices,
        moves=moves,
        silent=silent,
    )


def view_plan(
    followed: Followed, fleet: FleetSnapshot, now: float, reports: Iterable[Report], tuner: str, told: Tuned | None
) -> PlanView | None:
    """The plan and the tuner at `now`; None if there is neither.

    `reports` are what processes said of themselves, and `tuner` is the token of the one that holds the lease. One that
    tuned lately is at work without it, too: on a busy machine a search may take longer.
    """
    if not followed.raw and not tuner and told is None:
        return None
    plan = followed.stored
    routers = [report.plan for report in reports if report.kind == "router"]
    serving = {name: len(fleet.of_class(name)) for name in {cell.classes[0] for cell in plan.cells}} if plan else {}
    return PlanView(
        number=plan.number if plan is not None else None,
        age=max(now - plan.made, 0.0) if plan is not None else None,
        not_followed=followed.why,
        followers=routers.count(plan.number) if plan is not None else 0,
        routers=len(routers),
        score=plan.score if plan is not None else None,
        cells=tuple(_planned_cell(cell, serving, now) for cell in plan.cells) if plan is not None else (),
        tuner=tuner.rpartition("#")[0] or (told.tuner if told is not None and now - told.at < STALE else ""),
        tuned=max(now - told.at, 0.0) if told is not None else None,
        adopted=told is not None and told.adopted,
        found=told.why if told is not None else "",
    )


def _planned_cell(cell: Cell, serving: Mapping[str, int], now: float) -> PlannedCell:
    at_present = preferred_class(cell, serving, now)
    return PlannedCell(
        model=cell.model,
        service=cell.service,
        locality=cell.locality,
        prefers=cell.classes[0],
        until_then=None if at_present == cell.classes[0] else at_present or "",
    )


def silent_for(devices: Sequence[DeviceFacts], heartbeats: Mapping[str, float], now: float) -> dict[str, float]:
    """Seconds since the last heartbeat of each worker that has been silent for longer than `SILENT`."""
    ages = {device.worker: now - heartbeats.get(device.worker, now) for device in devices}
    return {worker: round(age, 3) for worker, age in ages.items() if age > SILENT}


async def _accepted(queue_mover: QueueMover, jobs: Sequence[str]) -> Mapping[str, float]:
    """The acceptance time of each of these jobs that has a record."""
    records = await queue_mover.records(jobs, ("accepted",)) if jobs else []
    return {job: float(its["accepted"]) for job, its in zip(jobs, records, strict=True) if "accepted" in its}


def _oldest(head: Head, accepted: Mapping[str, float], now: float) -> float:
    """Seconds since the oldest of the jobs served next was accepted; 0 if none is known to wait."""
    return max([0.0, *(now - accepted[job] for job in head.first if job in accepted)])


def _class_view(
    name: str, hardware: HardwareClass, fleet: FleetSnapshot, head: Head, target: ScalingTarget | None, oldest: float
) -> ClassView:
    devices = fleet.of_class(name)
    none = (0.0,) * LEVELS
    price = hardware.dollars_per_second * 3600
    return ClassView(
        device=hardware.device,
        devices=len(devices),
        emulated=sum(is_emulated(device.kind, hardware) for device in devices),
        usd_per_hour=price,
        price=hardware.price,
        spending=price * len(fleet.own(name)),
        utilisation=sum(device.utilisation for device in devices) / len(devices) if devices else 0.0,
        depth=head.depths,
        oldest=oldest,
        work=tuple(fleet.work.get(name, none)),
        held=tuple(fleet.held.get(name, none)),
        rows_per_second=sum(rate for traffic, rate in fleet.rates.items() if traffic.partition("|")[0] == name),
        running=sum(device.running for device in devices),
        warm=tuple(sorted({key.partition("/")[0] for device in devices for key in device.warm})),
        replicas=None if target is None else target.replicas,
        why="no fleet snapshot yet" if target is None else target.reason,
    )


def model_metadata(catalogue: Catalogue, model: Model) -> dict[str, Any]:
    """The protocol's model metadata, plus the parameters that the model takes."""
    return {
        "name": model.name,
        "versions": [str(m.version) for m in catalogue.versions(model.name)],
        "platform": f"taxiway_{model.pipeline}",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
        "parameters": {name: msgspec.to_builtins(spec) for name, spec in model.parameters.items()},
        "summary": model.summary,
        "licence": model.licence,
    }


def model_list(catalogue: Catalogue, fleet: FleetSnapshot, unloaded: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every model by name: versions and aliases, plus variants and summary of the version that the bare name means.

    A second name has the versions and variants of the model that it leads to, and that model's `alias_of`.
    `disabled` is why the bare name is not served. `problems` lists other faults: invalid files of other versions, or of
    a version still served from before its file became invalid; versions that an operator unloaded; and, by variant, why
    live devices could not load it.
    """
    names = {m.name for m in catalogue.models.values()} | {
        catalogue.bare(reference) for reference in catalogue.disabled
    }
    return [_listed(catalogue, name, fleet, unloaded) for name in sorted(names | catalogue.others.keys())]


def _listed(catalogue: Catalogue, name: str, fleet: FleetSnapshot, unloaded: Collection[str]) -> dict[str, Any]:
    versions = catalogue.versions(name)
    current = catalogue.resolve(name) if catalogue.serves(name) else None
    entry = {
        "name": name,
        "versions": [str(m.version) for m in versions],
        "aliases": {alias: str(m.version) for m in versions for alias in m.aliases},
        "variants": {} if current is None else {key: _variant(v) for key, v in current.variants.items()},
        "summary": "" if current is None else current.summary,
    }
    if current is not None and name in catalogue.others:
        entry["alias_of"] = current.id
    out = {m.id: UNLOADED for m in versions if m.id in unloaded}
    problems = _problems(catalogue, name) | out | ({} if current is None else _unloadable(current, fleet))
    if current is None and name in problems:
        entry["disabled"] = problems.pop(name)
    return entry | ({"problems": problems} if problems else {})


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "runtime": variant.runtime,
        "precision": variant.precision,
        "accuracy": variant.accuracy,
        "memory": int(variant.memory),
    }


def _problems(catalogue: Catalogue, name: str) -> dict[str, str]:
    """Faults in the files of a model."""
    found = {**catalogue.disabled, **catalogue.outdated}
    return {reference: why for reference, why in sorted(found.items()) if catalogue.bare(reference) == name}


def _unloadable(model: Model, fleet: FleetSnapshot) -> dict[str, str]:
    """Why live devices could not load variants of the model, by variant."""
    found: dict[str, str] = {}
    for device in fleet.devices:
        for key, why in device.unavailable.items():
            if key.partition("/")[0] == model.id:
                found.setdefault(key.partition("/")[2], f"{device.worker}: {why}")
    return found


def unready(model: Model, topology: Topology, fleet: FleetSnapshot, unloaded: Collection[str] = ()) -> str:
    """Why the model takes no requests, or no live device has or can load it; empty if one does."""
    if model.id in unloaded:
        return UNLOADED
    if fleet.stale:
        return "the fleet snapshot is stale"
    candidates, refusals = classify(model, Constraints(), topology, fleet)
    if any(candidate.devices for candidate in candidates):
        return ""
    reasons = [f"{one.hardware_class}/{one.variant}: {one.reason}" for one in refusals if not one.ever]
    return "; ".join(reasons) or "no live device can run it"


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    tensor = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    axis = {BATCH_AXIS: spec.batch_axis} if spec.batch_axis != 0 else {}
    return tensor | axis | ({"optional": True} if spec.optional else {})


class OutcomeCounters:
    """Sums since this router's first update. They never decrease when workers come and go.

    `outcomes` counts jobs by class and final state. `latency` has the figures of `tasks.heartbeat` by class and stage.
    `rejected` counts messages by class. `models` has each model's sums over all classes, `used` those of endpoints by
    class and model, and `dollars` US dollars by class, model and tenant.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, ...]] = Counter()
        self.latency: dict[tuple[str, ...], list[float]] = {}
        self.rejected: Counter[tuple[str, ...]] = Counter()
        self.models: dict[str, Ran] = {}
        self.used: dict[tuple[str, str], Use] = {}
        self.dollars: dict[tuple[str, ...], float] = {}
        self._seen: dict[tuple[str, str], Done] = {}
        self._started = False

    def update(self, devices: Iterable[DeviceFacts]) -> None:
        """Add what live devices did since the last update. The first update sets the baseline."""
        for device in devices:
            for hardware_class, done in device.done.items():
                before = self._seen.get((device.worker, hardware_class), Done())
                self._seen[device.worker, hardware_class] = done
                if self._started:
                    self._add(hardware_class, done, before)
        self._started = True

    def _add(self, hardware_class: str, done: Done, before: Done) -> None:
        if _sum(done) < _sum(before):  # a new process under the same name
            before = Done()
        if done.rejected:
            self.rejected[hardware_class,] += done.rejected - before.rejected
        for outcome, jobs in done.outcomes.items():
            self.outcomes[hardware_class, outcome] += jobs - before.outcomes.get(outcome, 0)
        for model, ran in done.models.items():
            self.models[model] = self.models.get(model, Ran()).plus(ran, before.models.get(model, Ran()))
        self._add_use(hardware_class, done, before)
        for stage, figures in done.latency.items():
            sums = self.latency.setdefault((hardware_class, stage), empty())
            counted = before.latency.get(stage, empty())
            sums[:] = [one + now - was for one, now, was in zip(sums, figures, counted, strict=True)]

    def _add_use(self, hardware_class: str, done: Done, before: Done) -> None:
        for model, use in done.used.items():
            own = (hardware_class, model)
            self.used[own] = self.used.get(own, Use()).plus(use, before.used.get(model))
        for model, paid in done.dollars.items():
            for tenant, dollars in paid.items():
                key, was = (hardware_class, model, tenant), before.dollars.get(model, {}).get(tenant, 0.0)
                self.dollars[key] = self.dollars.get(key, 0.0) + dollars - was


def _sum(done: Done) -> int:
    return sum(done.outcomes.values()) + done.rejected


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The exposition format that `exposition` returns."""

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
_LATENCIES: Mapping[str, tuple[str, str]] = {
    "queue": ("queue_wait_seconds", "Seconds from a job's acceptance to its start."),
    "run": ("run_seconds", "Seconds of the batches that a job ran in."),
    "total": ("latency_seconds", "Seconds from a job's acceptance to its result."),
    "first": ("first_token_seconds", "Seconds from sending a request to an endpoint to the first part of its answer."),
    "token": ("token_seconds", "Seconds for each token of an endpoint's answer after the first part."),
}

Counts = Mapping[tuple[str, ...], float]
"""Counts by the values of a metric's labels."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters since one router started.

    Counted by the router: `placed` by class and model, `moved` by source, target and kind, `refused` by error code,
    `ended` by final state, `parked` (dead-lettered arrivals), `webhooks` by the outcome of an attempt. Counted by the
    fleet's workers: `outcomes` by class and final state, `latency` by class and stage with the figures of
    `tasks.heartbeat`, `rejected` messages by class, `used` by class and model, `dollars` by class, model and tenant.
    """

    placed: Counts
    moved: Counts
    refused: Counts = field(default_factory=dict)
    ended: Counts = field(default_factory=dict)
    outcomes: Counts = field(default_factory=dict)
    latency: Mapping[tuple[str, ...], Sequence[float]] = field(default_factory=dict)
    parked: int = 0
    rejected: Counts = field(default_factory=dict)
    used: Mapping[tuple[str, str], Use] = field(default_factory=dict)
    dollars: Counts = field(default_factory=dict)
    webhooks: Counts = field(default_factory=dict)


def exposition(view: FleetView, done: Counters) -> bytes:
    """All metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(view, done))
    return generate_latest(registry)


class _Families(Collector):
    """One fleet view as metric families."""

    def __init__(self, view: FleetView, done: Counters) -> None:
        self._view = view
        self._done = done

    def collect(self) -> Iterable[Metric]:
        """Every family with its samples."""
        for name, (text, figure) in _PER_FLEET.items():
            yield GaugeMetricFamily(f"taxiway_{name}", text, float(figure(self._view)))
        yield from _gauges(self._view.classes)
        done = self._done
        yield _counter("placed", "Jobs that this router placed.", ("class", "model"), done.placed)
        yield _counter("moved", "Jobs that this router moved.", ("source", "target", "kind"), done.moved)
        yield _counter("refused", "Requests that this router refused, by error code.", ("code",), done.refused)
        yield _counter("ended", "Jobs that this router ended before a worker did.", ("outcome",), done.ended)
        yield CounterMetricFamily(
            "taxiway_parked", "Arrivals that this router could not read, and parked.", done.parked
        )
        yield _counter("webhook_attempts", "Webhook deliveries that this router tried.", ("outcome",), done.webhooks)
        yield _counter("rejected", "Messages that no router ordered, and workers parked.", ("class",), done.rejected)
        yield _counter("results", "Jobs that workers ended.", ("class", "outcome"), done.outcomes)
        yield _counter("usd", "US dollars that jobs cost.", ("class", "model", "tenant"), done.dollars)
        yield _counter(
            "tokens", "Tokens that endpoints counted or workers made.", ("class", "model", "kind"), _tokens(done.used)
        )
        aborted: Counts = {own: float(use.aborted) for own, use in done.used.items()}
        yield _counter("aborts", "Requests to endpoints that were closed early.", ("class", "model"), aborted)
        yield _endpoints(self._view.devices)
        yield from _histograms(done.latency)


def _tokens(used: Mapping[tuple[str, str], Use]) -> Counts:
    """Tokens by class, model and kind: `input` is what was not cached."""
    kinds: Mapping[str, Callable[[Use], int]] = {
        "input": lambda use: use.input - use.cached,
        "cached": lambda use: use.cached,
        "output": lambda use: use.output,
    }
    return {(*own, kind): float(of(use)) for own, use in used.items() for kind, of in kinds.items()}


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


def _counter(name: str, text: str, labels: tuple[str, ...], counts: Counts) -> Metric:
    family = CounterMetricFamily(f"taxiway_{name}", text, labels=labels)
    for values, count in sorted(counts.items()):
        family.add_metric(values, count)
    return family


def _histograms(latency: Mapping[tuple[str, ...], Sequence[float]]) -> Iterator[Metric]:
    bounds = [*map(str, BOUNDS), "+Inf"]
    for stage, (name, text) in _LATENCIES.items():
        family = HistogramMetricFamily(f"taxiway_{name}", text, labels=["class"])
        for (label, _), (*counts, seconds) in sorted(pair for pair in latency.items() if pair[0][1] == stage):
            family.add_metric([label], list(zip(bounds, accumulate(counts), strict=True)), seconds)
        yield family
