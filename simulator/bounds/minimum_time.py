"""The minimum device seconds of answering a request in time on a hardware class, however it is scheduled.

Seconds are those of the profile; `pace` has what events do to them. Spot devices serve preemptible services only.

A batch's time is `base` per step, independent of its rows, plus what each row adds: its prompt, and its own tokens read
once per step (`Stepping`), or its size (`Whole`). The second part is the request's own. Of the first, rows have shares
that sum to one in each step, by one of two rules:

- *by row*: equal shares, so each row bears at least 1 / `max_batch` of it;
- *by load*: in proportion to the tokens or sizes that the rows hold. A batch holds no more than the memory and its most
rows allow. While a request with a deadline runs, it holds still less: reading what all rows hold takes time in each
step, and the request must end in time. Its share is least if the batch holds equally much for each token of its own
(Cauchy and Schwarz).

Both hold for every batch, so the rule that charges more in total is chosen for each class and model.

Left out, so that nothing is charged that a schedule could avoid: waiting, loading, delays from the prompts of others,
compute-bound steps, and a `Whole` batch's floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.bounds.pace import Pace
from simulator.fleet import USABLE, DeviceClass
from simulator.timing import Stepping, Timing, Whole
from simulator.traces.workload import Figures, Workload, barred

SLACK = 1 + 2e-6
"""Factor on deadlines within which an answer counts as in time: latencies are float32 (`Outcome.in_time`)."""

_NONE = 1e-12


@dataclass(frozen=True, slots=True)
class _Run:
    """Requests' runs: seconds of the prompt, steps, seconds of a step's base and of each unit that a step holds.

    `own` is the units that the request itself holds, summed over its steps; `root` is the square of the sum of their
    roots; `room` is the most units that a batch holds. Shapes: (n,), or one figure for all.
    """

    prompt: Figures
    steps: Figures
    base: float
    per_unit: float
    own: Figures
    root: Figures
    room: float

    @classmethod
    def of(cls, timing: Timing, device: DeviceClass, size: Figures, output: Figures) -> _Run:
        """Requests of one model on a class."""
        total = size + output
        most = float(total.max()) * device.max_batch
        if isinstance(timing, Whole):
            return cls(np.zeros_like(total), np.ones_like(total), timing.base, timing.slope, total, total, most)
        assert isinstance(timing, Stepping)
        return cls(
            prompt=np.maximum(size * (timing.per_token + timing.per_pair * size), timing.reading) + timing.overhead,
            steps=output,
            base=timing.reading + timing.overhead,
            per_unit=timing.per_cached,
            own=output * (size + output / 2),
            root=((2 / 3) * (total**1.5 - size**1.5)) ** 2,
            room=min(most, (device.memory * USABLE - timing.memory) / timing.cache),
        )

    def work(self, most: int, deadline: Figures) -> Figures:
        """Minimum device seconds in batches of at most `most` rows; infinite if it cannot be in time."""
        alone = self.prompt + self.steps * self.base
        able = alone + self.per_unit * self.own <= deadline
        in_time = np.where(able, deadline - alone, 0.0) / max(self.per_unit, _NONE)
        held = np.maximum(np.minimum(in_time, self.steps * self.room), np.maximum(self.own, _NONE))
        by_row, by_load = self.steps / most, self.root / held
        share = by_row if by_row[able].sum() > by_load[able].sum() else by_load
        return np.where(able, self.prompt + self.per_unit * self.own + self.base * share, np.inf)


def least_work(workload: Workload, paces: Sequence[Pace]) -> Figures:
    """Minimum seconds of each request on each class at its profile's pace; infinite if it would be late.

    Shape: (n, classes).
    """
    trace, fleet = workload.trace, workload.fleet
    work = np.full((len(trace), len(fleet.classes)), np.inf)
    for number, name in enumerate(trace.models):
        rows = np.flatnonzero(trace.model == number)
        size, output = trace.size[rows].astype(np.float64), trace.output[rows].astype(np.float64)
        for column, (device, timing) in enumerate(zip(fleet.classes.values(), fleet.timings[name], strict=True)):
            if timing is not None and len(rows):
                run = _Run.of(timing, device, size, output)
                deadline = trace.deadline[rows] * SLACK
                fastest = paces[column].fastest(trace.arrival[rows], trace.arrival[rows] + deadline)
                work[rows, column] = run.work(device.max_batch, deadline * fastest)
    work[barred(trace, fleet)] = np.inf
    return work
