"""One central queue: a job is bound only when a device has capacity for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from router.upkeep.releaser import TICK
from simulator.fleet import SERVICES
from simulator.policies.policy import ByLevel, Held, Shift, able
from simulator.pool import Pool
from simulator.traces.workload import Job

DEPTH = 64
"""Jobs at the head of the queue considered for a free device: the first may be late on it, or cost more."""


class Central(ByLevel):
    """All jobs wait by deadline, and each is bound at the last moment.

    A job goes to the cheapest class that has capacity now and finishes it in time in a full batch, else to the fastest
    that has capacity and may finish it in time. Devices are kept for a job in the class that it would go to if all were
    idle. A class reserved for another service is not used.
    """

    beat = TICK

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
