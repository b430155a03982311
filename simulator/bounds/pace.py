"""How fast a class's devices work over time, as multiples of their profile's pace, and how many of them there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from simulator.fleet import Event, Fleet
from simulator.timing import Stepping, Whole
from simulator.traces.workload import Figures, Workload


@dataclass(frozen=True, slots=True)
class Pace:
    """A class's speed and number of devices from each of these moments on, the first at 0.

    What was begun before a change may still run at the speed before it, for at most `carried` seconds.
    """

    moments: tuple[float, ...]
    speeds: tuple[float, ...]
    counts: tuple[float, ...]
    carried: float

    @classmethod
    def of(cls, workload: Workload, column: int) -> Pace:
        """The class in this column of the workload's figures."""
        fleet = workload.fleet
        name, device = list(fleet.classes.items())[column]
        moments, speeds, counts = [0.0], [1.0], [float(device.count)]
        for event in _events(fleet, name):
            moments.append(event.at)
            speeds.append(speeds[-1] if event.slower is None else 1 / event.slower)
            counts.append(counts[-1] if event.available is None else min(event.available, device.count))
        carried = _carried(workload, column) / min(speeds) if len(set(speeds)) > 1 else 0.0
        return cls(tuple(moments), tuple(speeds), tuple(counts), carried)

    @property
    def changes(self) -> set[float]:
        """When the speed or the number of devices changes."""
        after = set(self.moments[1:])
        return after | {moment + self.carried for moment in after}

    def fastest(self, begin: Figures, end: Figures) -> Figures:
        """The highest speed in each of these periods."""
        return self._highest(self.speeds, begin, end)

    def most(self, begin: Figures, end: Figures) -> Figures:
        """The highest number of devices in each of these periods."""
        return self._highest(self.counts, begin, end)

    def _highest(self, values: Iterable[float], begin: Figures, end: Figures) -> Figures:
        found = np.zeros(len(begin))
        for value, since, until in zip(values, self.moments, (*self.moments[1:], np.inf), strict=True):
            found = np.where((begin < until) & (end >= since), np.maximum(found, value), found)
        return found


def is_lasting(fleet: Fleet, name: str) -> bool:
    """Whether a class's devices are on until they are switched off: they do not fail, and none is taken away."""
    device = fleet.classes[name]
    fails = device.failures_per_hour or (device.spot and device.reclaims_per_hour)
    return not fails and all(event.slower is not None for event in _events(fleet, name))


def _events(fleet: Fleet, name: str) -> list[Event]:
    return [event for event in fleet.events if event.hardware_class == name]


def _carried(workload: Workload, column: int) -> float:
    """Seconds of the most that a device can have begun: a whole batch, and the prompts of full generating batches."""
    trace, fleet = workload.trace, workload.fleet
    rows = list(fleet.classes.values())[column].max_batch
    whole, prompts = 0.0, 0.0
    for number, name in enumerate(trace.models):
        timing, total = fleet.timings[name][column], (trace.size + trace.output)[trace.model == number]
        size = float(total.max(initial=0))
        if isinstance(timing, Whole):
            whole = max(whole, timing.load + timing.batch(rows, rows * size))
        elif isinstance(timing, Stepping):
            prompts += timing.load + rows * timing.prefill(size)
    return whole + prompts
