"""How many devices a class should have (DESIGN §7): enough for the arriving load, and to serve the backlog in time.

A class that a plan uses follows the plan's rule; the others follow the rule here, `replicas`. KEDA, Prometheus and the
local autoscaler all get the same answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from router.decide.classify import level_of
from router.decide.plan import LONGEST, Cell, ClassPlan, Density, Depth, Need, devices_wanted, moves
from router.decide.snapshot import FleetSnapshot
from tasks.topology import HardwareClass, Topology
from taxiway.contract.keys import LEVELS

MAX_WINDOW = 60.0
"""Longest window of load samples, in seconds. The window is two device starts, within `MIN_WINDOW` and this bound."""

MIN_WINDOW = 2.0
"""Shortest window of load samples, in seconds: three samples."""

QUANTILE = 0.95
"""Quantile of the sampled load that the devices must carry (DESIGN §7: the 95th percentile)."""

NEGLIGIBLE = 1e-9
"""Device seconds (per second, or of work) below which a sum counts as zero: rounding errors."""

MOST = 1000
"""Devices of a class that has no `scaling.maximum`."""

TRICKLE = 0.01
"""Rows per second of a model from which it counts as in use: about one within the last 25 s (`RATE_MEMORY` 5 s)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A class at one instant: live devices, how many of them are busy, and device seconds waiting, by level."""

    at: float
    devices: int
    busy: float
    work: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ScalingTarget:
    """How many devices a class should have, and why; `devices` is how many are live now.

    It `lacks` devices that have been missing for longer than one takes to start.
    """

    replicas: int
    devices: int
    reason: str
    lacks: int = 0


@dataclass(slots=True)
class Scaler:
    """Per-class state: load samples of the last `MAX_WINDOW` seconds, recent scaling targets, and those by the plan."""

    topology: Topology
    _planned: dict[str, PlannedClass] = field(default_factory=dict)
    _by_plan: dict[str, ScalingTarget] = field(default_factory=dict)
    _samples: dict[str, deque[Sample]] = field(default_factory=dict)
    _recent: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)
    _short: dict[str, tuple[float, float]] = field(default_factory=dict)  # since when a class lacks devices, and now

    def observe(self, fleet: FleetSnapshot, now: float, jobs: Mapping[str, float] | None = None) -> None:
        """Sample the fleet as it is at `now`, in seconds of any monotonic clock.

        `jobs` are the unfinished ones of each class.
        """
        for name, hardware in self.topology.hardware.items():
            busy = sum(device.utilisation for device in fleet.devices if device.busy_for == name)
            samples = self._samples.setdefault(name, deque())
            samples.append(Sample(now, len(fleet.own(name)), busy, _waiting(fleet, name)))
            while samples[0].at < now - _window(hardware):
                samples.popleft()
            recent = self._recent.setdefault(name, deque())
            recent.append((now, replicas(hardware, deadlines(self.topology), samples).replicas))
            while recent[0][0] < now - hardware.scaling.start:
                recent.popleft()
        self._follow(fleet, now, jobs or {})
        short = [name for name, target in self.targets().items() if target.replicas > target.devices]
        self._short = {name: (self._short.get(name, (now, now))[0], now) for name in short}

    def _follow(self, fleet: FleetSnapshot, now: float, jobs: Mapping[str, float]) -> None:
        """Scale by the fleet's plan; without one, what is known of the last one is forgotten."""
        self._by_plan = {}
        if fleet.plan is None:
            self._planned.clear()
            return
        moving = [cell for cell in fleet.plan.cells if moves(cell, len(fleet.of_class(cell.classes[0])), fleet.now)]
        due = deadlines(self.topology)
        for name, hardware in self.topology.hardware.items():
            here = Load.of(name, hardware, self._samples[name][-1], due, fleet, self.topology, jobs.get(name, 0.0))
            state = self._planned.setdefault(name, PlannedClass(hardware, here.devices, now))
            planned = fleet.plan.classes.get(name)
            if planned is not None:
                awaited = [cell.handover.devices for cell in moving if cell.handover and cell.classes[0] == name]
                self._by_plan[name] = state.use(planned, here, now, awaited=max(awaited, default=0))
            elif not moving:
                self._by_plan[name] = state.leave(here, now)

    def targets(self) -> Mapping[str, ScalingTarget]:
        """The scaling target of each class; empty before the first sample."""
        due = deadlines(self.topology)
        targets = {
            name: self._by_plan.get(name)
            or with_recent(
                replicas(hardware, due, self._samples[name]), [count for _, count in self._recent[name]], hardware
            )
            for name, hardware in self.topology.hardware.items()
            if name in self._samples
        }
        for name, (since, now) in self._short.items():
            if name in targets and now - since >= self.topology.hardware[name].scaling.start:
                targets[name] = replace(targets[name], lacks=targets[name].replicas - targets[name].devices)
        return targets


def deadlines(topology: Topology) -> tuple[float, ...]:
    """The shortest deadline of the services at each level, in seconds; infinite if none has one."""
    shortest = [math.inf] * LEVELS
    for service in topology.service.values():
        level = level_of(service.deadline, service.priority)
        shortest[level] = min(shortest[level], math.inf if service.deadline is None else service.deadline)
    return tuple(shortest)


def replicas(hardware: HardwareClass, due: Sequence[float], samples: Sequence[Sample]) -> ScalingTarget:
    """Devices for the load in one or more samples, oldest first; `due` is each level's deadline in seconds."""
    now = samples[-1]
    load = float(np.quantile(_arriving(samples), QUANTILE))
    steady = 0 if load < NEGLIGIBLE else math.ceil(load / hardware.target) + hardware.scaling.spare
    queued, level = max((_devices_needed(now.work, due, level, hardware), level) for level in range(LEVELS))
    least, most = hardware.scaling.minimum, hardware.scaling.maximum
    count = max(steady, queued, least)
    if most is not None and count > most:
        return ScalingTarget(most, now.devices, f"{most}, the maximum; {count} would be in time")
    if count == least:
        return ScalingTarget(count, now.devices, f"{least}, the minimum; the load needs no more")
    if count == steady:
        spare = f" and {hardware.scaling.spare} spare" if hardware.scaling.spare else ""
        return ScalingTarget(
            count, now.devices, f"{load:.3g} device seconds/s at {hardware.target:.0%} utilisation{spare}"
        )
    work = sum(now.work[: level + 1])
    return ScalingTarget(
        count, now.devices, f"{work:.3g} device seconds waiting, due in {_time_available(due, level, hardware):g} s"
    )


def with_recent(target: ScalingTarget, lately: Sequence[int], hardware: HardwareClass) -> ScalingTarget:
    """The target, or a larger one from within the time that a start takes.

    Ski rental: idling for as long as a start takes costs at most twice what perfect foresight would.
    """
    most = max(lately, default=0)
    if most <= target.replicas:
        return target
    start = hardware.scaling.start
    return ScalingTarget(
        most, target.devices, f"{most} were needed within the last {start:g} s, the time a start takes"
    )


def _window(hardware: HardwareClass) -> float:
    return min(max(2 * hardware.scaling.start, MIN_WINDOW), MAX_WINDOW)


def _waiting(fleet: FleetSnapshot, hardware_class: str) -> tuple[float, ...]:
    """Device seconds that the class has to serve: bound to it, and held for it."""
    none = (0.0,) * LEVELS
    pairs = zip(fleet.work.get(hardware_class, none), fleet.held.get(hardware_class, none), strict=True)
    return tuple(bound + held for bound, held in pairs)


def _arriving(samples: Sequence[Sample]) -> list[float]:
    """Device seconds that arrived per second between consecutive samples: what was served plus queue growth."""
    came = []
    for before, after in pairwise(samples):
        span = max(after.at - before.at, 1e-3)
        growth = (sum(after.work) - sum(before.work)) / span
        came.append(max((before.busy + after.busy) / 2 + growth, 0.0))
    return came or [samples[-1].busy]


def _devices_needed(work: Sequence[float], due: Sequence[float], level: int, hardware: HardwareClass) -> int:
    """The fewest devices that serve this level and the ones above it by its deadline, earliest deadline first."""
    ahead = sum(work[: level + 1])
    return 0 if ahead < NEGLIGIBLE else math.ceil(ahead / _time_available(due, level, hardware))


def _time_available(due: Sequence[float], level: int, hardware: HardwareClass) -> float:
    """Seconds that a level's work may wait: its deadline less a start, but at least a horizon."""
    return max(min(due[level], 1e6) - hardware.scaling.start, hardware.horizon, 1e-3)


@dataclass(frozen=True, slots=True)
class Load:
    """What a plan's rules read of a class: live devices, unfinished jobs, their `density`, and the least it must have.

    `used` says whether it has jobs, or its models have been asked for.

    The density is the sum over levels of the work there over the time that the level has (`scaling_rule.density`). The
    simulator sums over jobs, each with its own deadline and at most one device. Here the jobs of a level count with its
    tightest deadline, so that no job is read one by one: the sum is equal if all have that deadline, else larger.
    """

    devices: int
    jobs: int
    density: float
    least: int
    used: bool

    @classmethod
    def of(
        cls,
        name: str,
        hardware: HardwareClass,
        sample: Sample,
        due: Sequence[float],
        fleet: FleetSnapshot,
        topology: Topology,
        jobs: float,
    ) -> Load:
        """The load in a sample of a class, under the fleet's plan."""
        assert fleet.plan is not None
        cells = [cell for cell in fleet.plan.cells if cell.classes[0] == name]
        tightest = _tightest(cells, due, topology)
        density = sum(work / max(min(tightest[level], LONGEST), 1e-3) for level, work in enumerate(sample.work))
        queued = max(_devices_needed(sample.work, due, level, hardware) for level in range(LEVELS))
        asked = [cell for cell in cells if _rate(cell, fleet) >= TRICKLE]
        awake = any(cell.deadline is not None and cell.deadline < hardware.scaling.start for cell in asked)
        used = bool(asked) or jobs > 0 or density > 0
        return cls(sample.devices, round(jobs), density, max(queued, int(awake)), used)


class PlannedClass:
    """When each device of a class was needed, by a plan's rule or by the work that waits."""

    def __init__(self, hardware: HardwareClass, devices: int, now: float) -> None:
        scaling = hardware.scaling
        self._most = MOST if scaling.maximum is None else scaling.maximum
        self._minimum, self._start = scaling.minimum, scaling.start
        self._target = min(devices, self._most)
        self._need = Need(self._most, scaling.start)
        self._need.note(self._target, now)
        self._left = False
        self._worked = now
        self._polled = -math.inf

    def use(self, planned: ClassPlan, load: Load, now: float, *, awaited: int = 0) -> ScalingTarget:
        """The target by the plan's rule, but at least the plan's devices, and those that moving work waits for.

        A class that shrinks in a lull is late in the next burst, which the plan has seen. Source: the trials. It keeps
        none once its load has ended.
        """
        rule = planned.rule
        self._need.keep_alive = self._start if rule.keep is None else rule.keep
        if self._left or load.used or awaited:
            self._left, self._worked = False, now
        ended = now - self._worked >= max(planned.pause, self._need.keep_alive)
        if ended:
            self._need.forget()
        least = max(load.least, 0 if ended else planned.devices, awaited)
        want = devices_wanted(rule, load.density, load.jobs, minimum=self._minimum, count=self._most)
        due = not isinstance(rule, Depth) or now >= self._polled + rule.poll
        if due:
            self._polled = now
        grown = max(want if due else 0, least)
        return self._scale(grown, max(want, grown), load, now, _ruled(rule, load))

    def leave(self, load: Load, now: float) -> ScalingTarget:
        """The target of a class that the plan does not use: its minimum, unless work waits there."""
        self._need.keep_alive = self._start
        if not self._left:
            self._left, self._target = True, 0
            self._need.forget()
        return self._scale(load.least, load.least, load, now, "the plan does not use the class")

    def _scale(self, grown: int, wanted: int, load: Load, now: float, why: str) -> ScalingTarget:
        """Grow to `grown` devices, and keep those of which `wanted` were needed within the keep-alive time."""
        self._need.note(min(wanted, self._most), now)
        running = max(self._target, min(grown, self._most))
        needed = max(self._need.kept(running, now), min(running, wanted))
        self._target = min(max(needed, self._minimum), self._most)
        if self._target > max(wanted, self._minimum):
            why += f"; {self._target} were needed within the last {self._need.keep_alive:g} s"
        return ScalingTarget(self._target, load.devices, f"planned: {why}")


def _ruled(rule: Density | Depth, load: Load) -> str:
    if isinstance(rule, Density):
        return f"work fills {load.density:.3g} devices until it is due, at {rule.target:.0%} utilisation"
    return f"{load.jobs} unfinished jobs, one device for each {rule.jobs:g}"


def _tightest(cells: Sequence[Cell], due: Sequence[float], topology: Topology) -> list[float]:
    """The tightest deadline of each level's planned requests, in seconds; that of the level's services if none is."""
    tightest = [math.inf] * LEVELS
    for cell in cells:
        service = topology.service.get(cell.service)
        if service is not None:
            level = level_of(service.deadline, service.priority)
            deadline = service.deadline if cell.deadline is None else cell.deadline
            tightest[level] = min(tightest[level], math.inf if deadline is None else deadline)
    return [own if own < math.inf else other for own, other in zip(tightest, due, strict=True)]


def _rate(cell: Cell, fleet: FleetSnapshot) -> float:
    """How many requests a second the cell's model has."""
    return sum(rate for flow, rate in fleet.rates.items() if flow.rpartition("|")[2] == cell.model)
