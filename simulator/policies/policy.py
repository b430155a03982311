"""Policies: which hardware class a request goes to. Here: the interface, and simple policies.

A policy sees only pools and the job's figures, which are of its predicted output. `taxiway` has the router's own
decision, and the policies by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.decide.plan import ScalingRule
from simulator.class_queue import SimulatedQueue
from simulator.fleet import Fleet
from simulator.pool import Pool
from simulator.workload import SimulatedJob

REFUSED_JOB = -1
"""Returned by `Policy.choose` for a job that it refuses."""


@dataclass(frozen=True, slots=True)
class Held:
    """Returned by `Policy.choose` for a job that is not bound to a class yet; devices are kept for it in `pool`."""

    pool: int


@dataclass(frozen=True, slots=True)
class Shift:
    """A waiting job that moves to another pool's queue: from that of `source`, or from holding.

    Without a `target` a held job is refused.
    """

    job: SimulatedJob
    source: int | None
    target: int | None


class Policy:
    """Decides where a job runs; one instance serves one run. Unless it says otherwise, it decides once.

    With `yields`, running generations yield to more urgent ones; a class's jobs wait in a `queue`.
    """

    queue: type[SimulatedQueue] = SimulatedQueue
    yields: bool = False
    beat: float = math.inf
    """Seconds between two calls of `look`; infinite for a policy that decides once."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int | Held:
        """The index of a pool that runs the job, `REFUSED_JOB`, or `Held`. At least one pool can run it."""
        raise NotImplementedError

    def look(self, pools: Sequence[Pool], now: float) -> Iterable[Shift]:
        """Changes for waiting jobs; each is applied before the next is requested."""
        return ()

    def ended(self, job: SimulatedJob, pool: Pool, seconds: float) -> None:
        """A job was answered, or dropped past its deadline, this many seconds after its arrival."""


def able(job: SimulatedJob, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that can run the job."""
    return [pool for pool in pools if pool.runs(job)]


LIVE, STANDARD = 0, 1


class Static(Policy):
    """A fixed class per service, as with Celery's `task_routes`.

    Live work goes to the fastest class, bulk to the cheapest, standard to the cheapest that takes at most twice the
    fastest's time.
    """

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        fastest = min(job.alone[pool.index] for pool in mine)
        if job.service == LIVE:
            mine = [pool for pool in mine if job.alone[pool.index] == fastest]
        elif job.service == STANDARD:
            mine = [pool for pool in mine if job.alone[pool.index] <= 2 * fastest]
        return min(mine, key=lambda pool: (pool.cost(job), pool.index)).index


class LeastWork(Policy):
    """The class with the fewest device seconds ahead, including this job's (Harchol-Balter, 2013, chapter 24)."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return min(
            able(job, pools), key=lambda pool: ((pool.busy_seconds() + job.work[pool.index]) / pool.count, pool.index)
        ).index


Cell = tuple[int, int]
"""A model and a service, as numbers in the trace's models and in `SERVICES`."""


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The class of each cell, and the scaling rule of each class, both by the classes' place in the fleet."""

    classes: Mapping[Cell, int]
    rules: tuple[ScalingRule, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal assignments."""
        return (tuple(sorted(self.classes.items())), self.rules)

    def used(self) -> set[int]:
        """The classes that some cell has."""
        return set(self.classes.values())


class Fixed(Policy):
    """Every job goes to its cell's class, which scales by the assignment's rule."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._began = False

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        if not self._began:
            self._began = True
            for pool, rule in zip(pools, self._assignment.rules, strict=True):
                pool.follow(rule, now=now)
        return self._assignment.classes[job.model, job.service]


def able_classes(fleet: Fleet, models: Sequence[str]) -> dict[Cell, list[int]]:
    """The classes that each cell may run on, if there are any: only preemptible services use spot devices."""
    spot = [device.spot for device in fleet.classes.values()]
    able = {
        (model, service): [
            place
            for place, timing in enumerate(fleet.timings[name])
            if timing is not None and (preemptible or not spot[place])
        ]
        for model, name in enumerate(models)
        for service, preemptible in enumerate(fleet.preemptible)
    }
    return {cell: places for cell, places in able.items() if places}
