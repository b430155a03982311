"""The frozen picture of the fleet that every decision is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tasks.heartbeat import DeviceFacts
from taxiway.contract.keys import LEVELS


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All queues and live devices at one instant.

    `work` maps each hardware class to its queued and running device seconds, one figure a priority level, highest
    first, and the seconds that devices still spend on what nobody waits for any more, which are `occupied`; `held` the
    same for what waits in holding until the class can take it; `rates` each model's traffic to a
    class (`keys.flow`) to its rows a second; `shadow` each class to its shadow price in US dollars a device second. Of
    `startable` classes somebody starts devices when there should be some. A `stale` snapshot could not be read in time:
    decisions then use queues.yaml alone, and say so.
    """

    devices: tuple[DeviceFacts, ...] = ()
    work: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    held: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    shadow: Mapping[str, float] = field(default_factory=dict)
    startable: tuple[str, ...] = ()
    stale: bool = False
    occupied: Mapping[str, float] = field(default_factory=dict)

    def of_class(self, hardware_class: str) -> tuple[DeviceFacts, ...]:
        """The live devices that serve a class, its own and those lent to it, by name."""
        return tuple(sorted((d for d in self.devices if hardware_class in d.classes), key=lambda d: d.worker))

    def own(self, hardware_class: str) -> tuple[DeviceFacts, ...]:
        """The live devices of a class that stay, whatever they serve now, by name."""
        own = (d for d in self.devices if d.hardware_class == hardware_class and not d.draining)
        return tuple(sorted(own, key=lambda d: d.worker))

    def ahead(self, hardware_class: str, level: int) -> float:
        """Seconds of device time that a class serves before a new job of `level`."""
        return sum(self.work.get(hardware_class, ())[: level + 1])


def occupied_by(devices: Iterable[DeviceFacts], ages: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each class's devices still spend on what nobody waits for any more.

    `ages` are the seconds since each device said so, by worker.
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
    """The work of each class with what occupies its devices before all else: a batch that runs lets nothing pass."""
    added = dict(work)
    for name, seconds in occupied.items():
        first, *rest = work.get(name, (0.0,) * LEVELS)
        added[name] = (first + seconds, *rest)
    return added


class Backlog:
    """The work of every class as one array, so that a burst of placements counts what each of them adds.

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
        """Count `work` device seconds more in a class."""
        self.seconds[self._row[hardware_class], level] += work

    def serve(self, seconds: np.ndarray) -> float:
        """Take off the device seconds that each class has had, shape (classes,): first levels first, down to zero.

        Returns how many were taken off in all.
        """
        if not self.seconds.any():
            return 0.0
        left = seconds.copy()
        for level in range(LEVELS):
            done = np.minimum(self.seconds[:, level], left)
            self.seconds[:, level] -= done
            left -= done
        return float((seconds - left).sum())

    def levels(self, hardware_class: str) -> tuple[float, ...]:
        """A class's device seconds, one figure a level."""
        return tuple(self.seconds[self._row[hardware_class]].tolist())
