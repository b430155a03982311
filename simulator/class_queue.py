"""The queue of a hardware class in the simulation, and which running generations yield to urgent ones in it.

These are chosen by the router's own function.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from router.decide.moves.preempt import Occupant, Waiter, Yielding, penalty, preempt
from simulator.device import SimulatedDevice
from simulator.fleet import Fleet, Stepping
from simulator.workload import SimulatedJob
from taxiway.contract.keys import LEVELS

Place = tuple[float, int]
"""A job's level or deadline, and its number in order of joining."""


Entry = tuple[Place, SimulatedJob]


class SimulatedQueue:
    """Jobs that wait for a class. Models do not wait for each other: each has its own queue.

    It is served as the product's, by level and first come, first served within each.
    """

    def __init__(self) -> None:
        self._lines: dict[int, list[Entry]] = {}
        self._places: dict[int, Place] = {}
        self._joined = 0

    def __len__(self) -> int:
        return len(self._places)

    def indices(self) -> list[int]:
        """The indices of the jobs here, by when they joined."""
        return list(self._places)

    def order(self, job: SimulatedJob) -> float:
        """What jobs are served by, least first."""
        return job.level

    def push(self, job: SimulatedJob) -> None:
        """Add a job."""
        self._joined += 1
        place = (self.order(job), self._joined)
        self._places[job.index] = place
        insort(self._lines.setdefault(job.model, []), (place, job))

    def take(self, job: SimulatedJob) -> None:
        """Remove a job at any position."""
        line = self._lines[job.model]
        del line[bisect_left(line, (self._places.pop(job.index),))]
        if not line:
            del self._lines[job.model]

    def first(self, model: int) -> SimulatedJob | None:
        """The model's job that is served next."""
        line = self._lines.get(model)
        return line[0][1] if line else None

    def heads(self) -> list[SimulatedJob]:
        """The first job of each model that has any, in serving order."""
        firsts = [line[0] for line in self._lines.values()]
        if len(firsts) > 1:
            firsts.sort()
        return [job for _, job in firsts]

    def front(self, model: int, most: int) -> list[SimulatedJob]:
        """Up to `most` jobs of a model, in serving order."""
        return [job for _, job in self._lines.get(model, ())[:most]]

    def count(self, model: int) -> int:
        """How many jobs of a model wait."""
        return len(self._lines.get(model, ()))

    def back(self, most: int) -> Iterator[SimulatedJob]:
        """Up to `most` jobs of each level, last served first. Requires an order by level."""
        return chain.from_iterable(self._last(level, most) for level in range(LEVELS))

    def _last(self, level: int, most: int) -> list[SimulatedJob]:
        """Up to `most` jobs of a level, last served first."""
        found: list[Entry] = []
        for line in self._lines.values():
            first, end = bisect_left(line, ((level, 0),)), bisect_left(line, ((level + 1, 0),))
            found += line[max(first, end - most) : end]
        return [job for _, job in sorted(found, reverse=True)[:most]]


@dataclass(frozen=True, slots=True)
class YieldTerms:
    """What yields of a class depend on: its place in the fleet, its price, and the services' terms."""

    place: int
    usd_per_second: float
    late_rates: Sequence[float]
    """US dollars an hour when all of a service is late."""
    preemptible: Sequence[bool]
    """Of each service."""
    most: int
    """Cuts of one job after which it does not yield; 0: none does."""

    @classmethod
    def of(cls, fleet: Fleet, place: int, usd_per_second: float, *, yields: bool) -> YieldTerms:
        """The terms of a class; `yields` says whether its generations yield."""
        preemptible = fleet.preemptible
        most = fleet.rebalance.max_moves_per_job if yields else 0
        return cls(place, usd_per_second, fleet.penalties, preemptible, most)

    def decide(
        self,
        waiting: Sequence[SimulatedJob],
        devices: Iterable[SimulatedDevice],
        timing: Stepping,
        asked: Collection[int],
        now: float,
    ) -> list[Yielding]:
        """The generations that yield now to these jobs of their model, unless `asked`; tokens are devices' indices."""
        running = (one for device in devices for one in self._occupants(device, waiting[0].model, timing, now))
        occupants = [one for one in running if int(one.job) not in asked]
        waiters = [self._waiter(job, timing, now) for job in waiting] if occupants else []
        return preempt(waiters, occupants, most=self.most)

    def _occupants(self, device: SimulatedDevice, model: int, timing: Stepping, now: float) -> Iterator[Occupant]:
        if device.run is None:
            return
        step = device.run.step
        for job, written in device.run.written(now):
            if job.model == model and self.preemptible[job.service]:
                left = step * job.tokens_left(written)
                yield Occupant(
                    job=str(job.index),
                    token=str(device.index),
                    left=left,
                    redo=timing.prefill(job.size + written),
                    due=job.due - now,
                    penalty=penalty(self.late_rates[job.service], timing.prefill(job.size) + step * written + left),
                    price=self.usd_per_second,
                    cuts=job.cuts,
                )

    def _waiter(self, job: SimulatedJob, timing: Stepping, now: float) -> Waiter:
        tokens = job.size + job.written
        run = timing.prefill(tokens) + job.tokens_left(job.written) * timing.step(1, tokens)
        return Waiter(str(job.index), job.due - now, run, penalty(self.late_rates[job.service], job.work[self.place]))
