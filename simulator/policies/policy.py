"""Policies: which hardware class a request goes to. Here: the interface, and simple policies.

A policy sees only pools and the job's figures, and the true output only if it declares itself clairvoyant. `taxiway`
has the router's own decision, and all policies by name.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from router.decide.plan import ScalingRule
from router.upkeep.releaser import RELEASE_TICK
from simulator.class_queue import Order
from simulator.fleet import SERVICES, Fleet
from simulator.pool import Pool
from simulator.workload import Job

REFUSED = -1
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

    job: Job
    source: int | None
    target: int | None


class Policy(Protocol):
    """Decides where a job runs. One instance serves one run."""

    @property
    def order(self) -> Order:
        """How the class queues are served."""

    @property
    def clairvoyant(self) -> bool:
        """Whether the jobs' figures are based on their true outputs."""

    @property
    def beat(self) -> float:
        """Seconds between two calls of `look`; infinite for a policy that decides once."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int | Held:
        """The index of a pool that runs the job, `REFUSED`, or `Held`. At least one pool can run it."""

    def look(self, pools: Sequence[Pool], now: float) -> Iterable[Shift]:
        """Changes for waiting jobs; each is applied before the next is requested."""

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """A job was answered, or dropped past its deadline, this many seconds after its arrival."""


class ByLevel:
    """Defaults of a policy: the product's queue, predicted outputs, one decision per job, and nothing learned."""

    order: Order = "level"
    clairvoyant = False
    beat = math.inf

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        return iter(())

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""


class ByDeadline(ByLevel):
    """The same with queues served by deadline."""

    order: Order = "deadline"


def able(job: Job, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that can run the job."""
    return [pool for pool in pools if pool.runs(job)]


LIVE, STANDARD = 0, 1


class Static(ByLevel):
    """A fixed class per service, as with Celery's `task_routes`.

    Live work goes to the fastest class, bulk to the cheapest, standard to the cheapest that takes at most twice the
    fastest's time.
    """

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        fastest = min(job.alone[pool.index] for pool in mine)
        if job.service == LIVE:
            mine = [pool for pool in mine if job.alone[pool.index] == fastest]
        elif job.service == STANDARD:
            mine = [pool for pool in mine if job.alone[pool.index] <= 2 * fastest]
        return min(mine, key=lambda pool: (pool.cost(job), pool.index)).index


class Random(ByLevel):
    """A uniformly random class."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return self._random.choice(able(job, pools)).index


class RoundRobin(ByLevel):
    """One class after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        self._turn += 1
        return mine[self._turn % len(mine)].index


class AlwaysFastest(ByLevel):
    """The class that would answer first if all were idle."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return job.alone.index(min(job.alone))


class AlwaysCheapest(ByLevel):
    """The class whose device seconds cost least."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return min(able(job, pools), key=lambda pool: (pool.cost(job), pool.index)).index


class JoinShortestQueue(ByLevel):
    """The class with the fewest jobs per device (Haight, 1958)."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return min(able(job, pools), key=_crowd).index


class LeastWork(ByLevel):
    """The class with the fewest device seconds ahead, including this job's (Harchol-Balter, 2013, chapter 24)."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return min(
            able(job, pools),
            key=lambda pool: ((pool.busy_seconds() + job.work[pool.index]) / pool.count, pool.index),
        ).index


class PowerOfTwo(ByLevel):
    """The shorter of two random queues (Mitzenmacher, 2001)."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        return min(self._random.sample(mine, min(2, len(mine))), key=_crowd).index


def _crowd(pool: Pool) -> tuple[float, int]:
    return ((pool.waiting + pool.running) / pool.count, pool.index)


THRESHOLD = 2.0
"""Device seconds that may wait per device before work spills."""


class ThresholdSpill(ByLevel):
    """The cheapest class whose queue is under a threshold, else the shortest (as autoscalers' spill rules do)."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = sorted(able(job, pools), key=lambda pool: (pool.cost(job), pool.index))
        ahead = [pool.busy_seconds() / max(pool.serving, 1) for pool in mine]
        under = [pool for pool, seconds in zip(mine, ahead, strict=True) if seconds <= THRESHOLD]
        return under[0].index if under else mine[ahead.index(min(ahead))].index


class InfaasLike(ByLevel):
    """The cheapest running and unsaturated class that meets the deadline by its profile.

    Else the cheapest that would meet it after a start; else the fastest. Queues are ignored. Source: after Romero et
    al., INFaaS, ATC 2021, section 4.
    """

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = sorted(able(job, pools), key=lambda pool: (pool.cost(job), pool.index))
        warm = [pool for pool in mine if pool.running < pool.serving * pool.slots and not pool.waiting]
        for pool in warm:
            if pool.run(job) <= job.deadline:
                return pool.index
        for pool in mine:
            if pool.start + job.alone[pool.index] <= job.deadline:
                return pool.index
        return min(warm or mine, key=lambda pool: (job.alone[pool.index], pool.index)).index


class DeadlineSpill(ByDeadline):
    """Queues by earliest deadline; the cheapest class expected to finish in time.

    If there is none, a class without devices is started that would be in time once it has some; else the earliest
    class. Source: after Patke et al., QLM, SoCC 2024, whose estimator is the same ratio of work ahead to throughput.
    """

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        ends = [pool.finish(job) for pool in mine]
        timely = [pool for pool, end in zip(mine, ends, strict=True) if end <= job.deadline]
        if min(ends) > job.deadline:
            timely = [pool for pool in mine if not pool.serving and job.alone[pool.index] <= job.deadline]
        if timely:
            return min(timely, key=lambda pool: (pool.cost(job), pool.index)).index
        return mine[ends.index(min(ends))].index


class ClairvoyantDeadline(DeadlineSpill):
    """`DeadlineSpill` with true outputs. It knows sizes but not future arrivals, so it does not bound attainment."""

    clairvoyant = True


DEPTH = 64
"""Jobs at the head of the queue considered for a free device: the first may be late on it, or cost more."""


class Central(ByLevel):
    """All jobs wait by deadline, and each is bound at the last moment.

    A job goes to the cheapest class that has capacity now and finishes it in time in a full batch, else to the fastest
    that has capacity and may finish it in time. Devices are kept for a job in the class that it would go to if all were
    idle. A class reserved for another service is not used.
    """

    beat = RELEASE_TICK

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, Job]] = []

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        if not self._queue and (pool := _taker(job, pools, now)) is not None:
            return pool.index
        heappush(self._queue, (job.due, job.index, job))
        return Held(_best(job, _open(job, pools), job.deadline).index)

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        kept: list[tuple[float, int, Job]] = []
        while self._queue and len(kept) < DEPTH and any(pool.free > 0 for pool in pools):
            entry = heappop(self._queue)
            job = entry[2]
            pool = _taker(job, pools, now)
            if job.due <= now:
                yield Shift(job, None, None)
            elif pool is None:
                kept.append(entry)
            else:
                yield Shift(job, None, pool.index)
        for entry in kept:
            heappush(self._queue, entry)


def _taker(job: Job, pools: Sequence[Pool], now: float) -> Pool | None:
    """The class that has capacity for the job now and may finish it in time."""
    left = job.due - now
    room = [pool for pool in _open(job, pools) if pool.free > 0 and pool.run(job) <= left]
    return _best(job, room, left) if room else None


def _best(job: Job, among: Sequence[Pool], left: float) -> Pool:
    """The cheapest class guaranteed to finish the job in time; if there is none, the fastest."""
    sure = [pool for pool in among if _full(job, pool) <= left]
    if sure:
        return min(sure, key=lambda pool: (pool.cost(job), pool.index))
    return min(among, key=lambda pool: (job.alone[pool.index], pool.index))


def _full(job: Job, pool: Pool) -> float:
    """Seconds that the job takes in a full batch."""
    return job.alone[pool.index] + (pool.slots - 1) * job.crowding[pool.index]


def _open(job: Job, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that run the job and are not reserved for another service; if there are none, all that run it."""
    mine = able(job, pools)
    return [pool for pool in mine if pool.device_class.reserve_for in (None, SERVICES[job.service])] or mine


Cell = tuple[int, int]
"""A model and a service, as numbers in the trace's models and in `SERVICES`."""


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The class of each cell, and the scaling rule of each class, both by the classes' place in the fleet file."""

    classes: Mapping[Cell, int]
    rules: tuple[ScalingRule, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal assignments."""
        return (tuple(sorted(self.classes.items())), self.rules)

    def used(self) -> set[int]:
        """The classes that some cell has."""
        return set(self.classes.values())


class Fixed(ByLevel):
    """Every job goes to its cell's class; no class has fewer than its number of `devices`."""

    def __init__(self, assignment: Assignment, devices: Sequence[int] | None = None) -> None:
        self._assignment = assignment
        self._devices = devices or (0,) * len(assignment.rules)
        self._began = False

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        if not self._began:
            self._began = True
            for pool, rule, devices in zip(pools, self._assignment.rules, self._devices, strict=True):
                pool.follow(rule, devices, now)
        return self._assignment.classes[job.model, job.service]


def able_classes(fleet: Fleet, models: Sequence[str]) -> dict[Cell, list[int]]:
    """The classes that each cell may run on, if there are any: only preemptible services use spot devices."""
    spot = [device.spot for device in fleet.classes.values()]
    able = {
        (model, service): [
            place
            for place, timing in enumerate(fleet.timings[name])
            if timing is not None and (terms.preemptible or not spot[place])
        ]
        for model, name in enumerate(models)
        for service, terms in enumerate(fleet.services)
    }
    return {cell: places for cell, places in able.items() if places}
