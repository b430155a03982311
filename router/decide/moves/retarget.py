"""Which idle devices also serve a starved class for a while, and when they return to their own.

A retargeted device still takes jobs from its own class first, so retargeting costs that class at most the batch that is
running. Work that an idle device's own class can run is moved there instead (`rebalance`). Retargeting is for work that
can run only in its present class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from router.decide.scaling import NEGLIGIBLE
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import HEARTBEAT, DeviceFacts, dollars_per_hour, lacking, unfit_for
from tasks.topology import Topology

IDLE = 0.05
"""A device that runs and holds nothing is idle below this utilisation."""

SETTLED = 3 * HEARTBEAT
"""Seconds after a command until its worker is considered again: by then its heartbeat shows the effect."""


class Action(StrEnum):
    """A command to a worker; the values are Celery's command names."""

    LEND = "add_consumer"
    RETURN = "cancel_consumer"


@dataclass(frozen=True, slots=True)
class Retarget:
    """A worker starts, or stops, serving one more class."""

    worker: str
    hardware_class: str
    action: Action
    reason: str


@dataclass(slots=True)
class RetargetConditions:
    """When each condition began, in seconds of the caller's clock: the state that one tick passes to the next.

    Classes that are `starving`, `relieved` (their own devices are enough) or `calm` (could spare a device), `idle`
    devices by worker, and when a worker was `notified` about a class.
    """

    starving: dict[str, float] = field(default_factory=dict)
    relieved: dict[str, float] = field(default_factory=dict)
    calm: dict[str, float] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    notified: dict[tuple[str, str], float] = field(default_factory=dict)

    def observe(self, fleet: FleetSnapshot, topology: Topology, now: float) -> None:
        """Update every condition from the fleet as it is at `now`."""
        classes = topology.hardware
        starving = [name for name in classes if _is_starved(name, fleet, topology, len(fleet.of_class(name)))]
        relieved = [name for name in classes if not _is_starved(name, fleet, topology, len(fleet.own(name)))]
        _update_condition(self.starving, starving, now)
        _update_condition(self.relieved, relieved, now)
        home = _at_home(fleet.devices)
        _update_condition(self.calm, [name for name in classes if _suffice(name, fleet, topology, home[name] - 1)], now)
        idle = [d.worker for d in fleet.devices if d.utilisation < IDLE and not d.running and not d.held]
        _update_condition(self.idle, idle, now)
        self.notified = {key: at for key, at in self.notified.items() if now - at < SETTLED}

    def note(self, decided: Iterable[Retarget], now: float) -> None:
        """Record that these commands were sent."""
        self.notified.update({(one.worker, one.hardware_class): now for one in decided})


def retarget(fleet: FleetSnapshot, topology: Topology, conditions: RetargetConditions, now: float) -> list[Retarget]:
    """The commands to send now. Workers that were sent one recently, or whose class is not in queues.yaml, get none.

    `conditions` has been updated from the same fleet at `now`.
    """
    if topology.rebalance.retarget is None:
        return []
    settling = {worker for worker, _ in conditions.notified}
    settled = [d for d in fleet.devices if d.worker not in settling and d.hardware_class in topology.hardware]
    tick = _Tick(fleet, topology, conditions, settled, now - topology.rebalance.retarget)
    return [*tick.returns(), *tick.loans()]


@dataclass(frozen=True, slots=True)
class _Tick:
    """One evaluation. Conditions that began by `since` are acted on; only `settled` devices may be sent a command."""

    fleet: FleetSnapshot
    topology: Topology
    conditions: RetargetConditions
    settled: Collection[DeviceFacts]
    since: float

    def returns(self) -> Iterator[Retarget]:
        """Devices that leave an additional class. One that an operator took off its own class is left unchanged."""
        home = _at_home(self.fleet.devices)
        for device in self.settled:
            own, *others = device.classes or ("",)
            for name in others if own == device.hardware_class else ():
                reason = unfit_for(name, device, self.topology)
                if not _suffice(own, self.fleet, self.topology, home[own]):
                    reason = f"{own} has work of its own"
                elif self._persists(self.conditions.relieved, name):
                    reason = f"{name} serves what waits without it"
                if reason is not None:
                    yield Retarget(device.worker, name, Action.RETURN, reason)

    def loans(self) -> Iterator[Retarget]:
        """Devices that join a starved class: the longest wait first, served by the cheapest idle devices that fit."""
        home = _at_home(self.settled)
        free = [
            d
            for d in self.settled
            if d.classes == (d.hardware_class,) and self._persists(self.conditions.idle, d.worker)
        ]
        free.sort(
            key=lambda d: (dollars_per_hour([d], d.hardware_class, self.topology.hardware[d.hardware_class]), d.worker)
        )
        starved = [name for name in self.conditions.starving if self._persists(self.conditions.starving, name)]
        for name in sorted(starved, key=lambda name: (-self._wait(name), name)):
            missing = self._missing(name)
            for device in tuple(free):
                own = device.hardware_class
                if missing <= 0:
                    break
                if self._can_spare(own, home[own]) and self._fits(name, device):
                    free.remove(device)
                    home[own] -= 1
                    missing -= 1
                    yield Retarget(device.worker, name, Action.LEND, self._why(name))

    def _persists(self, condition: Mapping[str, float], name: str) -> bool:
        return condition.get(name, math.inf) <= self.since

    def _can_spare(self, own: str, home: int) -> bool:
        """Whether the class has had so little work for long enough that one of its `home` devices may go."""
        return self._persists(self.conditions.calm, own) and _suffice(own, self.fleet, self.topology, home - 1)

    def _fits(self, name: str, device: DeviceFacts) -> bool:
        """Whether the device runs all that the class's own devices run; without any, all that queues.yaml names."""
        if name == device.hardware_class or unfit_for(name, device, self.topology) is not None:
            return False
        runtimes, own = set(self.topology.hardware[name].runtimes), self.fleet.own(name)
        if own:
            runtimes &= {runtime for one in own for runtime in one.runtimes}
        instructions = {known for one in own for known in one.instruction_sets}
        return runtimes <= set(device.runtimes) and not lacking(instructions, device.instruction_sets)

    def _serving(self, name: str) -> int:
        """The number of devices that serve the class, including those just retargeted to it."""
        serving = {device.worker for device in self.fleet.of_class(name)}
        return len(serving | {worker for worker, hardware_class in self.conditions.notified if hardware_class == name})

    def _missing(self, name: str) -> int:
        """How many more devices the class needs to serve its backlog within its horizon."""
        span = max(self.topology.hardware[name].horizon, self.topology.rebalance.tick)
        return math.ceil(_backlog(name, self.fleet) / span) - self._serving(name)

    def _wait(self, name: str) -> float:
        """Seconds until the class's devices have served its backlog; infinite if there are none."""
        serving = self._serving(name)
        return _backlog(name, self.fleet) / serving if serving else math.inf

    def _why(self, name: str) -> str:
        backlog, serving = _backlog(name, self.fleet), self._serving(name)
        return f"{backlog:.3g} device seconds wait for {name} ({serving} devices serve it)"


def _backlog(name: str, fleet: FleetSnapshot) -> float:
    """Device seconds of work that is bound to the class or held for it."""
    return sum(fleet.work.get(name, ())) + sum(fleet.held.get(name, ()))


def _is_starved(name: str, fleet: FleetSnapshot, topology: Topology, devices: int) -> bool:
    """Whether the class's backlog exceeds what this many devices serve within its horizon."""
    span = topology.hardware[name].horizon * devices
    return _backlog(name, fleet) > max(span, NEGLIGIBLE)


def _suffice(name: str, fleet: FleetSnapshot, topology: Topology, devices: int) -> bool:
    """Whether this many devices serve the class's backlog within a tick; 0 devices do only if it is empty."""
    span = min(topology.rebalance.tick, topology.hardware[name].horizon) * devices
    return _backlog(name, fleet) <= max(span, NEGLIGIBLE)


def _at_home(devices: Iterable[DeviceFacts]) -> Counter[str]:
    """The number of devices in each class that serve only their own class."""
    return Counter(device.hardware_class for device in devices if device.classes == (device.hardware_class,))


def _update_condition(condition: dict[str, float], names: Collection[str], now: float) -> None:
    """Continue the condition for these names, start it for new ones and end it for all others."""
    for name in condition.keys() - set(names):
        del condition[name]
    for name in names:
        condition.setdefault(name, now)
