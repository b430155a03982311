"""Policies that prefer cheap classes and leave them under load."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.policies.policy import ByDeadline, ByLevel, able
from simulator.pool import Pool
from simulator.traces.workload import Job

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
