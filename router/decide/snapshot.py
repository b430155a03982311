"""The frozen picture of the fleet that every decision is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeVar

import msgspec
import numpy as np

from router.decide.plan import Plan
from tasks.heartbeat import ANY, DeviceFacts, dollars_per_hour
from tasks.topology import HardwareClass
from taxiway.contract.keys import LEVELS


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All queues and live devices at one instant."""

    devices: tuple[DeviceFacts, ...] = ()
    work: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Queued and running device seconds of each class by level, most urgent first; `occupied` is included."""
    held: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The same of jobs in holding, by the class that is expected to take them."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Rows per second of each model's traffic to a class (`keys.flow`)."""
    shadow: Mapping[str, float] = field(default_factory=dict)
    """Each class's shadow price, in US dollars per device second."""
    startable: tuple[str, ...] = ()
    """Classes whose devices are started on demand."""
    draining: bool = False
    """The site hands its work to other fleets, as far as they offer to take it."""
    stale: bool = False
    """It could not be read in time: decisions use queues.yaml alone, and say so."""
    occupied: Mapping[str, float] = field(default_factory=dict)
    """Seconds that devices still spend on cancelled or expired work."""
    now: float = 0.0
    """Seconds of the store's clock."""
    plan: Plan | None = None
    unplanned: str = ""
    """What is wrong with the stored plan, if no `plan` can be followed."""

    def of_class(self, hardware_class: str) -> tuple[DeviceFacts, ...]:
        """The live devices that serve a class, its own and those retargeted to it, by name."""
        return tuple(sorted((d for d in self.devices if hardware_class in d.classes), key=lambda d: d.worker))

    def serving(self, hardware_class: str) -> int:
        """How many live devices surely serve what waits for a class: it may be for a model that an endpoint lacks."""
        return sum(d.endpoint is None or not d.unavailable for d in self.devices if hardware_class in d.classes)

    def own(self, hardware_class: str) -> tuple[DeviceFacts, ...]:
        """A class's own live devices that are not draining, whatever they serve now, by name."""
        own = (d for d in self.devices if d.hardware_class == hardware_class and not d.draining)
        return tuple(sorted(own, key=lambda d: d.worker))

    def spending(self, name: str, hardware: HardwareClass) -> float:
        """What a class's own devices cost, in US dollars an hour."""
        own = self.own(name)
        return sum(dollars_per_hour(own, name, hardware)) if own else 0.0


def with_hosts(devices: Sequence[DeviceFacts]) -> tuple[DeviceFacts, ...]:
    """The devices, each CPU that lacks what is learned of `ANY` with what others learned on the same machine.

    They share its cores, and so are slowed by whatever else runs there: engines, and processes that are not ours.
    """
    cpus = [one for one in devices if one.kind == "cpu" and one.host]
    new = {one.worker: one for one in cpus if not (ANY in one.pace and ANY in one.loading and ANY in one.residual)}
    mates = {host: [one for one in cpus if one.host == host] for host in {one.host for one in new.values()}}
    return tuple(_like(one, mates[one.host]) if one.worker in new else one for one in devices)


def _like(device: DeviceFacts, mates: Sequence[DeviceFacts]) -> DeviceFacts:
    return msgspec.structs.replace(
        device,
        pace=_with_common(device.pace, [mate.pace for mate in mates], fmean),
        loading=_with_common(device.loading, [mate.loading for mate in mates], fmean),
        residual=_with_common(device.residual, [mate.residual for mate in mates], _widest),
    )


Figure = TypeVar("Figure")


def _with_common(
    own: dict[str, Figure], others: Iterable[Mapping[str, Figure]], common: Callable[[Sequence[Figure]], Figure]
) -> dict[str, Figure]:
    """What a device learned, and what it lacks for `ANY` as others have it."""
    found = [other[ANY] for other in others if ANY in other]
    return {ANY: common(found), **own} if found else own


def _widest(residuals: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The largest of each level; a report's last one holds for the levels after it."""
    return tuple(max(one[min(level, len(one) - 1)] for one in residuals) for level in range(LEVELS))


def occupied_by(devices: Iterable[DeviceFacts], ages: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each class's devices still spend on cancelled or expired work.

    `ages` are the seconds since each device's report, by worker.
    """
    occupied: dict[str, float] = {}
    for device in devices:
        left = device.occupied - ages.get(device.worker, 0.0)
        if left > 0 and not device.draining:
            occupied[device.busy_for] = occupied.get(device.busy_for, 0.0) + left
    return occupied


def with_occupied(
    work: Mapping[str, tuple[float, ...]], occupied: Mapping[str, float]
) -> Mapping[str, tuple[float, ...]]:
    """Each class's work plus what occupies its devices, at the first level: a running batch is not preempted."""
    added = dict(work)
    for name, seconds in occupied.items():
        first, *rest = work.get(name, (0.0,) * LEVELS)
        added[name] = (first + seconds, *rest)
    return added


class Backlog:
    """The work of every class as one array, so that each placement in a burst counts the ones before it.

    `seconds` has shape (classes, LEVELS): device seconds queued and running, by class in `classes` order and by level.
    """

    def __init__(self, classes: tuple[str, ...], work: Mapping[str, tuple[float, ...]]) -> None:
        self.classes = classes
        self._row = {name: row for row, name in enumerate(classes)}
        self.seconds = np.zeros((len(classes), LEVELS))
        for name, levels in work.items():
            if name in self._row:
                self.seconds[self._row[name], : len(levels)] = levels

    def add(self, hardware_class: str, level: int, work: float) -> None:
        """Add `work` device seconds to a class."""
        self.seconds[self._row[hardware_class], level] += work

    def serve(self, seconds: np.ndarray) -> float:
        """Subtract the device seconds that each class has served, shape (classes,): first levels first, down to zero.

        Returns the total subtracted.
        """
        if not self.seconds.any():
            return 0.0
        before = self.seconds.cumsum(axis=1) - self.seconds  # of the levels that are served first
        done = np.minimum(self.seconds, np.maximum(seconds[:, np.newaxis] - before, 0.0))
        self.seconds -= done
        return float(done.sum())

    def levels(self, hardware_class: str) -> tuple[float, ...]:
        """A class's device seconds, one figure per level."""
        return tuple(self.seconds[self._row[hardware_class]].tolist())
