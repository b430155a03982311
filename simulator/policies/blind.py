"""Policies that ignore load."""

from __future__ import annotations

import random
from collections.abc import Sequence

from simulator.policies.policy import ByLevel, able
from simulator.pool import Pool
from simulator.traces.workload import Job

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
