"""Policies that balance load and ignore prices."""

from __future__ import annotations

import random
from collections.abc import Sequence

from simulator.policies.policy import ByLevel, able
from simulator.pool import Pool
from simulator.traces.workload import Job


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
