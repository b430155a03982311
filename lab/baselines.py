"""Policies to compare placement with that no user chooses: each ignores something that matters, or knows too much."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from lab.changes import simulate
from router.decide.fairness import RELEASE_TICK
from simulator.class_queue import SimulatedQueue
from simulator.engine import RunSummary
from simulator.fleet import SERVICES
from simulator.policies.policy import Assignment, Fixed, Held, Policy, Shift, able
from simulator.policies.taxiway import POLICIES, Maker
from simulator.pool import Pool
from simulator.tuning.opponents import PLAYS, first_assignment, known_half
from simulator.workload import SimulatedJob, Workload


class Random(Policy):
    """A uniformly random class."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return self._random.choice(able(job, pools)).index


class RoundRobin(Policy):
    """One class after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        self._turn += 1
        return mine[self._turn % len(mine)].index


class AlwaysFastest(Policy):
    """The class that would answer first if all were idle."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return job.alone.index(min(job.alone))


class AlwaysCheapest(Policy):
    """The class whose device seconds cost least."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return min(able(job, pools), key=lambda pool: (pool.cost(job), pool.index)).index


class JoinShortestQueue(Policy):
    """The class with the fewest jobs per device (Haight, 1958)."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        return min(able(job, pools), key=_crowd).index


class DeadlineOrder(SimulatedQueue):
    """Jobs that are served by deadline alone."""

    def order(self, job: SimulatedJob) -> float:
        """As `SimulatedQueue.order`."""
        return job.due


class ByDeadline(Policy):
    """The same with queues served by deadline."""

    queue = DeadlineOrder


class PowerOfTwo(Policy):
    """The shorter of two random queues (Mitzenmacher, 2001)."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        return min(self._random.sample(mine, min(2, len(mine))), key=_crowd).index


def _crowd(pool: Pool) -> tuple[float, int]:
    return ((pool.waiting + pool.running) / pool.count, pool.index)


THRESHOLD = 2.0
"""Device seconds that may wait per device before work spills."""


class ThresholdSpill(Policy):
    """The cheapest class whose queue is under a threshold, else the shortest (as autoscalers' spill rules do)."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = sorted(able(job, pools), key=lambda pool: (pool.cost(job), pool.index))
        ahead = [pool.busy_seconds() / max(pool.serving, 1) for pool in mine]
        under = [pool for pool, seconds in zip(mine, ahead, strict=True) if seconds <= THRESHOLD]
        return under[0].index if under else mine[ahead.index(min(ahead))].index


class InfaasLike(Policy):
    """The cheapest running and unsaturated class that meets the deadline by its profile.

    Else the cheapest that would meet it after a start; else the fastest. Queues are ignored. Source: after Romero et
    al., INFaaS, ATC 2021, section 4.
    """

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
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

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        mine = able(job, pools)
        ends = [pool.finish(job) for pool in mine]
        timely = [pool for pool, end in zip(mine, ends, strict=True) if end <= job.deadline]
        if min(ends) > job.deadline:
            timely = [pool for pool in mine if not pool.serving and job.alone[pool.index] <= job.deadline]
        if timely:
            return min(timely, key=lambda pool: (pool.cost(job), pool.index)).index
        return mine[ends.index(min(ends))].index


DEPTH = 64
"""Jobs at the head of the queue considered for a free device: the first may be late on it, or cost more."""


class Central(Policy):
    """All jobs wait by deadline, and each is bound at the last moment.

    A job goes to the cheapest class that has capacity now and finishes it in time in a full batch, else to the fastest
    that has capacity and may finish it in time. Devices are kept for a job in the class that it would go to if all were
    idle. A class reserved for another service is not used.
    """

    beat = RELEASE_TICK

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, SimulatedJob]] = []

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        if not self._queue and (pool := _taker(job, pools, now)) is not None:
            return pool.index
        heappush(self._queue, (job.due, job.index, job))
        return Held(_best(job, _open(job, pools), job.deadline).index)

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        kept: list[tuple[float, int, SimulatedJob]] = []
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


def _taker(job: SimulatedJob, pools: Sequence[Pool], now: float) -> Pool | None:
    """The class that has capacity for the job now and may finish it in time."""
    left = job.due - now
    room = [pool for pool in _open(job, pools) if pool.free > 0 and pool.run(job) <= left]
    return _best(job, room, left) if room else None


def _best(job: SimulatedJob, among: Sequence[Pool], left: float) -> Pool:
    """The cheapest class guaranteed to finish the job in time; if there is none, the fastest."""
    sure = [pool for pool in among if _full(job, pool) <= left]
    if sure:
        return min(sure, key=lambda pool: (pool.cost(job), pool.index))
    return min(among, key=lambda pool: (job.alone[pool.index], pool.index))


def _full(job: SimulatedJob, pool: Pool) -> float:
    """Seconds that the job takes in a full batch."""
    return job.alone[pool.index] + (pool.slots - 1) * job.crowding[pool.index]


def _open(job: SimulatedJob, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that run the job and are not reserved for another service; if there are none, all that run it."""
    mine = able(job, pools)
    return [pool for pool in mine if pool.device_class.reserve_for in (None, SERVICES[job.service])] or mine


def tuned_plan(workload: Workload, seed: int) -> Assignment:
    """Classes and scaling rules together, by the search of the product's tuner on the first half of the trace."""
    known, search = known_half(workload, seed)
    return search.find(None, PLAYS).assignment if len(known) else first_assignment(search)


CLAIRVOYANT = "clairvoyant-edf"
"""`DeadlineSpill` that knows true outputs, but not future arrivals: so it does not bound attainment."""


def as_seen(workload: Workload, policy: str) -> Workload:
    """The workload as a policy sees it: the clairvoyant one takes true outputs for predicted ones."""
    if policy != CLAIRVOYANT:
        return workload
    return replace(workload, trace=replace(workload.trace, predicted=workload.trace.output))


BASELINES: Mapping[str, Maker] = {
    "tuned-plan": lambda workload, seed: Fixed(tuned_plan(workload, seed)),
    "random": lambda workload, seed: Random(seed),
    "round-robin": lambda workload, seed: RoundRobin(),
    "join-shortest-queue": lambda workload, seed: JoinShortestQueue(),
    "power-of-two": lambda workload, seed: PowerOfTwo(seed),
    "always-fastest": lambda workload, seed: AlwaysFastest(),
    "always-cheapest": lambda workload, seed: AlwaysCheapest(),
    "threshold-spill": lambda workload, seed: ThresholdSpill(),
    "infaas-like": lambda workload, seed: InfaasLike(),
    "deadline-spill": lambda workload, seed: DeadlineSpill(),
    "central-queue": lambda workload, seed: Central(),
    CLAIRVOYANT: lambda workload, seed: DeadlineSpill(),
}


def run(name: str, make: Maker, workload: Workload, seed: int) -> RunSummary:
    """One run of one policy."""
    seen = as_seen(workload, name)
    return simulate(name, seen, make(seen, seed), seed=seed)


EVERY_POLICY: Mapping[str, Maker] = {**POLICIES, **BASELINES}
"""Those that `taxiway simulate` has, then those of the laboratory."""
