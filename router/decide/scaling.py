"""How many devices each class should have: `plan.ClassSize` for the work that the fleet has, as in the simulator.

A class that a plan uses follows the plan's rule, the others a density. KEDA, Prometheus and the local autoscaler all
get the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from router.decide.classify import level_of
from router.decide.plan import DONE_WITHIN, TARGET, Cell, ClassSize, Density, Plan, moves
from router.decide.snapshot import FleetSnapshot
from tasks.topology import HardwareClass, Topology
from taxiway.contract.keys import LEVELS

NEGLIGIBLE = 1e-9
"""Device seconds (per second, or of work) below which a sum counts as zero: rounding errors."""

MOST_DEVICES = 1000
"""Devices of a class that has no `scaling.maximum`."""

TRICKLE = 0.01
"""Rows per second from which a class counts as in use: about one within the last 25 s (`RATE_MEMORY` 5 s)."""


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
    """The scaling targets of all classes, and what they depend on of what was before."""

    topology: Topology
    targets: Mapping[str, ScalingTarget] = field(default_factory=dict)
    """By class; empty before the first look."""
    _sizes: dict[str, ClassSize] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)  # the targets without spare devices
    _begun: dict[str, tuple[float, bool]] = field(default_factory=dict)  # when the plan was adopted; without handovers
    _short: dict[str, float] = field(default_factory=dict)  # since when a class lacks devices

    def observe(self, fleet: FleetSnapshot, now: float, jobs: Mapping[str, float]) -> None:
        """Scale for the fleet at `now`, in seconds of any monotonic clock; `jobs` are the unfinished ones by class.

        A plan that is a guess says nothing of devices.
        """
        if fleet.plan is not None and fleet.plan.guessed:
            fleet = replace(fleet, plan=None)
        cells = fleet.plan.cells if fleet.plan is not None else ()
        moving = any(moves(cell, len(fleet.of_class(cell.classes[0])), fleet.now) for cell in cells)
        due = deadlines(self.topology)
        targets = {}
        for name, hardware in self.topology.hardware.items():
            load = Load.of(name, fleet, due, self.topology, jobs.get(name, 0.0))
            size = self._sizes.setdefault(name, ClassSize(hardware.scaling.start, hardware.scaling.minimum))
            if name not in self._counts:
                size.need(load.devices, now)
            if fleet.plan is None:
                size.follow(Density())
                self._begun.pop(name, None)
            else:
                self._follow(name, size, fleet.plan, load.devices, now, moving=moving)
            count = _resized(hardware, size, load, self._counts.get(name, load.devices), now)
            self._counts[name] = count
            targets[name] = self._lacking(name, _target(hardware, size, load, count, fleet.plan, now), now)
        self.targets = targets

    def _follow(self, name: str, size: ClassSize, plan: Plan, live: int, now: float, *, moving: bool) -> None:
        """Scale by the plan's rule, and begin one that is adopted with the devices that it would have by now.

        What starts for more than that is not awaited; what lives stays until no work moves any more.
        """
        first, planned = 0, plan.classes.get(name)
        if planned is None:
            size.follow(Density())
        else:
            first = planned.begin
            size.follow(planned.rule, planned.devices, planned.pause, now)
        if self._begun.get(name) not in ((plan.adopted, True), (plan.adopted, not moving)):
            self._begun[name] = (plan.adopted, not moving)
            size.release(max(live, first) if moving else first, now)

    def _lacking(self, name: str, target: ScalingTarget, now: float) -> ScalingTarget:
        """The target, which lacks nothing yet where that has been missing for less time than a start takes."""
        if target.replicas <= target.devices:
            self._short.pop(name, None)
            return target
        since = self._short.setdefault(name, now)
        return target if now - since >= self.topology.hardware[name].scaling.start else replace(target, lacks=0)


def _most(hardware: HardwareClass) -> int:
    return MOST_DEVICES if hardware.scaling.maximum is None else hardware.scaling.maximum


def _resized(hardware: HardwareClass, size: ClassSize, load: Load, before: int, now: float) -> int:
    """The devices that the class should have, without spare ones, after it had so many."""
    if load.jobs:
        size.use(now)
    most = _most(hardware)
    grown = size.grown(min(before, most), load.density, load.jobs, now, most)
    return size.kept(grown, load.density, load.jobs, now, most)


def _target(
    hardware: HardwareClass, size: ClassSize, load: Load, count: int, plan: Plan | None, now: float
) -> ScalingTarget:
    """`count` devices and why, with spare ones where no plan has counted what a burst needs."""
    most, wanted = _most(hardware), size.wanted(load.density, load.jobs, now)
    spare = hardware.scaling.spare if plan is None and count else 0
    why = _ruled(size, load)
    if wanted > most:
        why += f"; {most} is the maximum, {wanted} would be in time"
    elif count > wanted:
        why += f"; {count} were needed within the last {size.keep_alive:g} s"
    elif count == size.floor(now) > load.density:
        why += f"; {count} at least"
    if spare:
        why += f"; {spare} spare"
    planned = "planned: " if plan is not None else ""
    lacks = max(min(wanted + spare, most) - load.devices, 0) if wanted else 0  # without those that are only kept
    return ScalingTarget(min(count + spare, most), load.devices, planned + why, lacks)


def deadlines(topology: Topology) -> tuple[float, ...]:
    """The shortest deadline of the services at each level, in seconds; infinite if none has one."""
    shortest = [math.inf] * LEVELS
    for service in topology.service.values():
        level = level_of(service.deadline, service.priority)
        shortest[level] = min(shortest[level], math.inf if service.deadline is None else service.deadline)
    return tuple(shortest)


@dataclass(frozen=True, slots=True)
class Load:
    """What the rules read of a class: live devices, unfinished jobs, and their `density` (`plan.density`).

    A class that has been asked for lately has one job at least: some are over between two looks.

    The simulator sums the density over jobs, each with its own deadline and at most one device. Here the jobs of a
    level count with its tightest deadline, so that no job is read one by one: the sum is equal if all have that
    deadline, else larger, up to one device a job.
    """

    devices: int
    jobs: int
    density: float

    @classmethod
    def of(cls, name: str, fleet: FleetSnapshot, due: Sequence[float], topology: Topology, jobs: float) -> Load:
        """The load of a class with so many `jobs`; `due` are the levels' deadlines where no plan says them."""
        cells = [cell for cell in fleet.plan.cells if cell.classes[0] == name] if fleet.plan is not None else []
        tightest = _tightest(cells, due, topology)
        bound, held = (_density(work.get(name, ()), tightest) for work in (fleet.work, fleet.held))
        density = min(bound, max(jobs, 1.0)) + held
        asked = sum(rate for each, rate in fleet.rates.items() if each.rpartition("|")[0] == name) >= TRICKLE
        return cls(len(fleet.own(name)), max(round(jobs), int(asked or density > NEGLIGIBLE)), density)


def coming(name: str, topology: Topology, fleet: FleetSnapshot) -> int:
    """Devices that a class which starts them on demand lacks for its work without a plan."""
    if fleet.plan is not None or name not in fleet.startable:
        return 0
    due = deadlines(topology)
    density = sum(_density(work.get(name, ()), due) for work in (fleet.work, fleet.held))
    return max(min(math.ceil(density / TARGET), _most(topology.hardware[name])) - len(fleet.own(name)), 0)


def _density(work: Sequence[float], tightest: Sequence[float]) -> float:
    """Devices for the seconds of work at each level, due then."""
    return sum(seconds / max(min(due, DONE_WITHIN), 1e-3) for seconds, due in zip(work, tightest, strict=False))


def _ruled(size: ClassSize, load: Load) -> str:
    rule = size.rule
    if isinstance(rule, Density):
        return f"work fills {round(load.density, 2):g} devices until it is due, at {rule.target:.0%} utilisation"
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
