"""The real fleet and its recorded arrivals as the simulator's: what the twin is made of. Pure.

A model whose requests must stay in a locality counts as a model of its own, which only the classes there can run: the
twin cannot place private data elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import msgspec
import numpy as np

from controller.decide.pools import PoolRules
from router.decide.candidates import expected
from router.decide.classify import Candidate, Constraints, classify, level_of
from router.decide.plan import Cell, Density, Plan
from router.decide.snapshot import FleetSnapshot
from simulator.fleet import SERVICES, DeviceClass, Fleet, ServiceName, Stepping, Timing, WholeBatches
from simulator.policies.policy import Assignment, able_classes
from simulator.policies.policy import Cell as TwinCell
from simulator.traces import Column, Trace, trace_of
from simulator.tuning.twin import ClassState, DeviceState, TwinConditions
from simulator.workload import Workload, figures_of, prepare
from tasks.document import Size
from tasks.heartbeat import DeviceFacts, dollars_per_hour, variant_key
from tasks.history import ENDED, Arrivals
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model, Profile, generates
from tasks.models.profiles import ProfileBook
from tasks.queues.endpoints import Rate
from tasks.topology import LATE_USD_PER_HOUR, HardwareClass, Price, Topology
from taxiway.contract.job import Tokens
from taxiway.contract.keys import LEVELS
from taxiway.errors import TaxiwayError
from workers.decide.endpoints import MINUTE, Bucket, EndpointRates

UNBOUNDED = 16
"""Devices that the twin may start of a class without `scaling.maximum`."""

ANSWER_SHARE = 0.5
"""The answer's share of the sizes that generating models are profiled with (`workers.profiling.measure`)."""

NODES = PoolRules()
"""Seconds after which a class whose devices do not come is out of stock, and until it is tried again."""

_MEMORY = Size(2**40)  # of a class that does not say: enough


Kinds = Mapping[TwinCell, Sequence[Cell]]
"""The real requests that each cell of the twin stands for; their classes are yet to be set."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """A class has had work and fewer devices than the `planned` ones `since` this time of the store's clock."""

    since: float
    planned: int


@dataclass(frozen=True, slots=True)
class KnownFleet:
    """What routers know of the fleet: its files, its devices at present, and the classes that lack some."""

    topology: Topology
    catalogue: Catalogue
    book: ProfileBook
    snapshot: FleetSnapshot
    short: Mapping[str, Shortage] = field(default_factory=dict)

    @property
    def paces(self) -> tuple[float, ...]:
        """The mean pace that each class's devices learned."""
        return paces(self.snapshot, self.topology.hardware)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Recorded arrivals as a workload of the twin's fleet, with the present conditions.

    `kinds` are the real requests that each cell stands for. The workload ends `span` seconds after its first arrival.
    Its requests are those of the arrivals' jobs with the numbers `rows`; the fleet cannot run the others. Of them
    `waiting` wait at its end.
    """

    workload: Workload
    conditions: TwinConditions
    kinds: Kinds
    span: float
    rows: Column
    waiting: Column

    def assignment(self, plan: Plan | None) -> Assignment | None:
        """The plan as an assignment, for the search to begin with.

        None if it says nothing about these requests, or was a guess: that gives way to any plan.
        """
        if plan is None or plan.guessed:
            return None
        names = list(self.workload.fleet.classes)
        able = able_classes(self.workload.fleet, self.workload.trace.models)
        said = {cell: _planned(kinds, plan, names) for cell, kinds in self.kinds.items()}
        used = {place for cell, place in said.items() if place is not None and place in able[cell]}
        if not used:
            return None
        classes = {}
        for cell, places in able.items():
            place = said.get(cell)
            rest = [other for other in places if other in used] or places
            classes[cell] = place if place is not None and place in places else rest[0]
        rules = tuple(plan.classes[name].rule if name in plan.classes else Density() for name in names)
        return Assignment(classes, rules)

    def translated(self, plan: Plan) -> Plan:
        """A plan for the twin's models and services as one for the requests that they stand for."""
        models = self.workload.trace.models
        cells = tuple(
            msgspec.structs.replace(kind, classes=cell.classes, handover=cell.handover)
            for cell in plan.cells
            for kind in self.kinds.get((models.index(cell.model), SERVICES.index(cell.service)), ())
        )
        used = {cell.classes[0] for cell in cells}
        classes = {name: planned for name, planned in plan.classes.items() if name in used}
        return msgspec.structs.replace(plan, cells=cells, classes=classes)


def _planned(kinds: Sequence[Cell], plan: Plan, names: Sequence[str]) -> int | None:
    """The class, by its place, that the plan prefers for the first of these requests that it covers."""
    found = [plan.cell(kind.model, kind.service, kind.locality) for kind in kinds]
    return next((names.index(cell.classes[0]) for cell in found if cell and cell.classes[0] in names), None)


def recorded(arrivals: Arrivals, known: KnownFleet, until: float) -> Recorded | None:
    """The arrivals up to a time whose model and service the fleet still has; None if there are none."""
    trace, models, rows = _trace(arrivals, known)
    if not len(trace):
        return None
    fleet = _fleet(trace, models, known)
    cells = able_classes(fleet, trace.models)
    able = {name for n, name in enumerate(trace.models) if all((n, rank) in cells for rank in range(len(SERVICES)))}
    kept = np.flatnonzero(np.array([name in able for name in trace.models])[trace.model])
    if not len(kept):
        return None
    trace, rows = trace.part(kept), rows[kept]
    names = [name for name in trace.models if name in able]
    numbers = np.array([names.index(name) if name in names else -1 for name in trace.models])
    trace = replace(trace, models=tuple(names), model=numbers[trace.model].astype(np.int16))
    services = arrivals.jobs["service"][rows]
    kinds = _kinds(trace, [models[name] for name in names], services, arrivals.names["service"])
    ids = [models[name][0].id for name in names]
    conditions = tuple(_state(name, device, known, ids) for name, device in fleet.classes.items())
    span = max(until - float(arrivals.jobs["arrival"][0]), float(trace.arrival[-1]))
    workload = prepare(trace, fleet)
    jobs, places = arrivals.jobs[rows], {name: place for place, name in enumerate(fleet.classes)}
    place = np.array([places.get(name, -1) for name in arrivals.names["hardware_class"]])[jobs["hardware_class"]]
    waiting = _waiting(workload, jobs["state"], place, span, known.snapshot)
    return Recorded(workload, conditions, kinds, span, rows, waiting)


def _state(name: str, device: DeviceClass, known: KnownFleet, models: Sequence[str]) -> ClassState:
    """A class as it is: devices that a plan asked for start yet, or are out of stock if none came for too long."""
    own, short = known.snapshot.own(name), known.short.get(name)
    warm = [{key.rpartition("/")[0] for key in each.warm} for each in own]
    devices = [DeviceState(0.0, frozenset(n for n, model in enumerate(models) if model in held)) for held in warm]
    allowed = [each.endpoint.allowed for each in own if each.endpoint is not None and each.endpoint.allowed is not None]
    rates = EndpointRates(
        _bucket([(one.requests, one.requests_left) for one in allowed]),
        _bucket([(one.tokens, one.tokens_left) for one in allowed]),
    )
    available = device.count
    if short is not None:
        age = known.snapshot.now - short.since
        if age >= device.start + NODES.stock_out:
            available = len(own)
        else:
            devices += [DeviceState(max(device.start - age, 0.0))] * (short.planned - len(own))
    return ClassState(tuple(devices), available, rates if allowed else None)


def _bucket(limits: Sequence[tuple[float | None, float]]) -> Bucket | None:
    """What endpoints that share a queue allow together, from the rate and what is left of each; None if unlimited."""
    known = [(rate, left) for rate, left in limits if rate is not None]
    if not known or len(known) < len(limits):
        return None
    rate, left = (sum(each) for each in zip(*known, strict=True))
    return Bucket(rate * MINUTE, rate, left, 0.0)


def shortages(before: Mapping[str, Shortage], plan: Plan | None, known: KnownFleet) -> dict[str, Shortage]:
    """The classes that have work and fewer devices than planned, and those that were out of stock not long ago."""
    now, found = known.snapshot.now, dict[str, Shortage]()
    for name, hardware in known.topology.hardware.items():
        planned = plan.classes[name].devices if plan is not None and name in plan.classes else 0
        short = before.get(name, Shortage(now, planned))
        out = now - short.since - hardware.scaling.start - NODES.stock_out
        lacks = len(known.snapshot.own(name)) < planned and sum(known.snapshot.work.get(name, ())) > 0
        if (out < 0 and lacks) or 0 <= out < NODES.retry:
            found[name] = replace(short, planned=planned)
    return found


def _waiting(workload: Workload, states: Column, place: Column, now: float, fleet: FleetSnapshot) -> Column:
    """The requests that wait `now`: of each level the latest that were not seen to end, for as much work as it has.

    The history is some minutes behind, the work is that of the last snapshot. `place` is each request's class, or -1.
    """
    trace = workload.trace
    work = sum((np.array(levels) for levels in (*fleet.work.values(), *fleet.held.values())), np.zeros(LEVELS))
    figures = figures_of(trace, workload.fleet, trace.output)[1]
    seconds = np.where(place < 0, figures.min(axis=1), figures[np.arange(len(place)), place])
    found = []
    for level in range(LEVELS):
        due = trace.arrival + trace.deadline > now
        mine = np.flatnonzero((workload.level == level) & (states < ENDED) & due)[::-1]
        found.append(mine[np.cumsum(seconds[mine]) <= work[level]])
    return np.sort(np.concatenate(found))


def urgency(topology: Topology, service: str) -> int:
    """The number of the simulator's service that stands for this one."""
    terms = topology.service[service]
    return min(level_of(terms.deadline, terms.priority), len(SERVICES) - 1)


def _trace(arrivals: Arrivals, known: KnownFleet) -> tuple[Trace, dict[str, tuple[Model, str]], Column]:
    """The trace with models by locality, each of these with its model and locality, and its jobs' numbers."""
    jobs, trace = arrivals.jobs, trace_of(arrivals)
    pairs = list(zip(jobs["model"].tolist(), jobs["locality"].tolist(), strict=True))
    models: dict[str, tuple[Model, str]] = {}
    numbers: dict[tuple[int, int], int] = {}
    for model, place in sorted(set(pairs)):
        try:
            entry = known.catalogue.resolve(arrivals.names["model"][model])
        except TaxiwayError:
            continue
        locality = arrivals.names["locality"][place]
        numbers[model, place] = len(models)
        models[f"{entry.id} {locality}".strip()] = entry, locality
    topology = known.topology
    ranks = [urgency(topology, name) if name in topology.service else -1 for name in arrivals.names["service"]]
    rank = np.array(ranks, np.int8)[jobs["service"]]
    number = np.array([numbers.get(pair, -1) for pair in pairs], np.int16)
    kept = np.flatnonzero((rank >= 0) & (number >= 0))
    deadline = np.where(np.isnan(trace.deadline), math.inf, trace.deadline)
    trace = replace(trace, models=tuple(models), model=number, service=rank, deadline=deadline)
    return trace.part(kept), models, kept


def _fleet(trace: Trace, models: Mapping[str, tuple[Model, str]], known: KnownFleet) -> Fleet:
    """The fleet as the simulator's. A service there may be interrupted if every one that it stands for may be."""
    topology = known.topology
    may = [
        [terms.preemptible for name, terms in topology.service.items() if urgency(topology, name) == rank]
        for rank in range(len(SERVICES))
    ]
    timings = {
        name: _timings(model, locality, _usual(trace.part(np.flatnonzero(trace.model == number))), known)
        for number, (name, (model, locality)) in enumerate(models.items())
    }
    return Fleet(
        classes={name: _device_class(name, hardware, known, models) for name, hardware in topology.hardware.items()},
        preemptible=tuple(bool(mine) and all(mine) for mine in may),
        rebalance=topology.rebalance,
        timings=timings,
        penalties=penalties(topology),
    )


def _device_class(
    name: str, hardware: HardwareClass, known: KnownFleet, models: Mapping[str, tuple[Model, str]]
) -> DeviceClass:
    """The class with the devices that it may have: those there are, unless more are started on demand.

    A plan says what a class serves, and routers follow it also where the class is reserved for another service.
    """
    own, reserved = known.snapshot.own(name), hardware.reserve_for
    here = len(own)
    scaling = hardware.scaling
    count, minimum = here, here
    if name in known.snapshot.startable:
        count, minimum = UNBOUNDED if scaling.maximum is None else scaling.maximum, scaling.minimum
    return DeviceClass(
        count=max(count, 1),
        minimum=min(minimum, max(count, 1)),
        initial=min(here, max(count, 1)),
        price=_price(own, name, hardware),
        spot=hardware.capacity == "spot",
        memory=hardware.memory or Size(min((d.memory_total for d in own if d.memory_total), default=_MEMORY)),
        start=scaling.start,
        reclaims_per_hour=hardware.reclaims_per_hour,
        max_batch=hardware.max_batch,
        max_wait=hardware.max_wait,
        max_run=hardware.max_run,
        horizon=max(hardware.horizon, 1e-3),
        warm=tuple(twin for twin, (model, _) in models.items() if {model.id, model.name} & {*hardware.warm}),
        reserve_for=None if reserved is None else get_args(ServiceName)[urgency(known.topology, reserved)],
        endpoint=hardware.endpoint is not None,
        rate=Rate() if hardware.endpoint is None else hardware.endpoint.rate,
    )


def _price(own: Sequence[DeviceFacts], name: str, hardware: HardwareClass) -> Price:
    """The class's price, where its devices have prices of their own, the average of those."""
    if all(device.usd_per_hour is None for device in own):
        return hardware.price
    prices = dollars_per_hour(own, name, hardware)
    mean = sum(prices) / len(prices)
    return msgspec.structs.replace(hardware.price, usd_per_hour=mean, spot_usd_per_hour=mean)


def penalties(topology: Topology) -> tuple[float, ...]:
    """What it costs when all of a service of the simulator is late, in US dollars an hour."""
    said = [(urgency(topology, name), usd) for name, usd in topology.plan.late_usd_per_hour.items()]
    return tuple(
        max((usd for which, usd in said if which == rank), default=usual)
        for rank, usual in enumerate(LATE_USD_PER_HOUR)
    )


def _usual(requests: Trace) -> tuple[float, float]:
    """The mean size of a model's requests, and the mean tokens that a generation of it has cached."""
    if not len(requests):
        return 1.0, 1.0
    size = float(requests.size.mean())
    return size, max(size + float(requests.output.mean()) / 2, 1.0)


def _timings(model: Model, locality: str, usual: tuple[float, float], known: KnownFleet) -> tuple[Timing | None, ...]:
    """The model's timing on each class, by its fastest variant there; None where it cannot run."""
    constraints = Constraints(locality=locality or None, preemptible=True)
    candidates, _ = classify(model, constraints, known.topology, known.snapshot)
    row: list[Timing | None] = []
    for name in known.topology.hardware:
        usable = name in known.snapshot.startable or known.snapshot.of_class(name)
        mine = [candidate for candidate in candidates if usable and candidate.hardware_class == name]
        timings = [_timing(candidate, model, usual, known.book) for candidate in mine]
        one = np.ones(1)
        row.append(min(timings, key=lambda timing: float(timing.answer(one * usual[0], one, 8)[0]), default=None))
    return tuple(row)


def _timing(candidate: Candidate, model: Model, usual: tuple[float, float], book: ProfileBook) -> Timing:
    """The variant's profile at the mean pace that the class's devices learned."""
    devices, (size, context) = candidate.devices, usual
    kind, device = (devices[0].kind, devices[0].name) if devices else (candidate.hardware.device, "")
    profile = book.lookup(model, candidate.variant_name, kind, device).profile
    key = variant_key(model.id, candidate.variant_name)
    pace = pace_of(devices, key)
    load = profile.load * float(np.mean(expected([each.loading for each in devices], key) or 1.0))
    memory = int(candidate.variant.memory)
    if not generates(model):
        base = profile.base + profile.step * size
        return WholeBatches(load, memory, base, profile.slope, profile.floor).slower(pace)
    return generation_timing(profile, context, load=load, memory=memory).slower(pace)


def generation_timing(profile: Profile, context: float, *, load: float, memory: int) -> Stepping:
    """The timing of a generation by its profile, whose rows have `context` tokens cached on average.

    It reads its prompt in one step, and takes a step for each token of its answer. A step reads the weights and the
    rows' caches at the same bandwidth: a row's part of it is in proportion to its context, and says how many bytes a
    cached token has.
    """
    known = profile.prompt_step is not None  # else the step is over prompt and answer
    step, per_cached = profile.step if known else profile.step / ANSWER_SHARE, profile.slope / context
    return Stepping(
        load=load,
        memory=memory,
        cache=memory * per_cached / step if step else 0.0,
        per_token=sum(profile.of_prompt) if known else profile.slope,
        per_pair=0.0,
        reading=0.0,
        per_cached=per_cached,
        overhead=step,
    )


def _kinds(
    trace: Trace, models: Sequence[tuple[Model, str]], services: Column, names: Sequence[str]
) -> dict[tuple[int, int], list[Cell]]:
    """The real requests of each cell, with their tightest deadline."""
    tightest: dict[tuple[int, int, int], float] = {}
    for model, rank, service, deadline in zip(
        trace.model.tolist(), trace.service.tolist(), services.tolist(), trace.deadline.tolist(), strict=True
    ):
        key = model, rank, service
        tightest[key] = min(tightest.get(key, math.inf), deadline)
    kinds: dict[tuple[int, int], list[Cell]] = {}
    for (number, rank, service), deadline in sorted(tightest.items()):
        model, locality = models[number]
        kinds.setdefault((number, rank), []).append(
            Cell(
                model=model.id,
                service=names[service],
                locality=locality or None,
                classes=("",),
                deadline=None if math.isinf(deadline) else deadline,
            )
        )
    return kinds


def pace_of(devices: Sequence[DeviceFacts], key: str) -> float:
    """The mean pace of a variant on a class's devices, as they learned it; 1 without devices."""
    return float(np.mean(expected([device.pace for device in devices], key))) if devices else 1.0


def paces(fleet: FleetSnapshot, names: Iterable[str]) -> tuple[float, ...]:
    """The mean pace that the devices of each of these classes learned; 1 where none did."""
    learned = [[pace for device in fleet.own(name) for pace in device.pace.values()] for name in names]
    return tuple(float(np.mean(each)) if each else 1.0 for each in learned)


def timely(arrivals: Arrivals, topology: Topology) -> list[tuple[TwinCell, bool]]:
    """Of each job that has ended or was refused, its model and service as the twin's, and whether it was in time."""
    jobs = arrivals.jobs[arrivals.jobs["state"] >= ENDED]
    ranks = [urgency(topology, name) if name in topology.service else -1 for name in arrivals.names["service"]]
    late = jobs["seconds"] > jobs["deadline"]
    good = (jobs["state"] == ENDED) & ~late
    services = np.array(ranks, np.int64)[jobs["service"]]
    rows = zip(jobs["model"].tolist(), services.tolist(), good.tolist(), strict=True)
    return [((model, service), ok) for model, service, ok in rows if service >= 0]


def billed(arrivals: Arrivals, topology: Topology) -> float:
    """US dollars that endpoints asked for the tokens of these jobs, and for each of them."""
    jobs, names, total = arrivals.jobs[arrivals.jobs["state"] == ENDED], arrivals.names["hardware_class"], 0.0
    for number, name in enumerate(names):
        tariff = topology.hardware[name].price.tariff if name in topology.hardware else None
        if tariff is not None:
            mine = jobs[jobs["hardware_class"] == number]
            rows = mine["rows"].astype(np.int64)
            read, written = int((rows * mine["size"]).sum()), int((rows * np.maximum(mine["output"], 0)).sum())
            total += tariff.bill(Tokens(input=read, output=written), len(mine))
    return total


def spending(known: KnownFleet) -> float:
    """US dollars an hour of the devices that are there."""
    return sum(known.snapshot.spending(name, hardware) for name, hardware in known.topology.hardware.items())
