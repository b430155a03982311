"""The router's rebalancer on simulated queues: each tick `router.decide.rebalance` decides from a router's view."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from router.decide.candidates import CandidateTable
from router.decide.classify import Needs
from router.decide.rebalance import Flows, Group, rebalance
from router.decide.working_snapshot import WorkingSnapshot
from router.upkeep.mover import backlogged, group_by_kind, magnitude, window_per_level
from simulator.policies.policy import Shift
from simulator.pool import Pool
from simulator.reader import Reader
from simulator.traces.workload import Job
from tasks.topology import Rebalance


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting job, as `router.upkeep.mover.Queued`."""

    queue: str
    level: int
    work: float
    kind: Hashable
    job: Job


class Mover:
    """`router.upkeep.mover.Mover` for simulated queues; `table_of` and `needs_of` give a job's table and needs."""

    def __init__(
        self,
        rules: Rebalance,
        reader: Reader,
        table_of: Callable[[Job, WorkingSnapshot], CandidateTable],
        needs_of: Callable[[Job, float], Needs],
    ) -> None:
        self._rules = rules
        self._reader = reader
        self._table_of = table_of
        self._needs_of = needs_of
        self._flows = Flows()
        self._moved: dict[int, int] = {}
        self._next = 0.0

    def tick(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """Evaluate once per tick, and move."""
        if now < self._next:
            return
        self._next = now + self._rules.tick
        self._flows.begin()
        working, rules = self._reader.working(pools, now), self._rules
        place = {pool.name: pool for pool in pools}
        busy = [place[name] for name in backlogged(working, rules.tick)]
        seen = _last_served(busy, working, rules.window)
        groups = self._groups(seen, working, now)
        work = {name: working.backlog.levels(name) for name in working.backlog.classes}
        depths = {pool.name: pool.waiting for pool in busy}
        decided = rebalance(groups, work, depths, rules, self._flows.closed(rules.still))
        self._flows.note(decided)
        jobs = {str(job.index): job for job, _ in seen} if decided else {}
        for move in decided:
            for name in move.jobs:
                job = jobs[name]
                self._moved[job.index] = self._moved.get(job.index, 0) + 1
                self._reader.move(job, move.target, move.work)
                yield Shift(job, place[move.source].index, place[move.target].index)

    def ended(self, job: Job) -> None:
        """A job has ended."""
        self._moved.pop(job.index, None)

    def _groups(self, seen: Sequence[tuple[Job, Pool]], working: WorkingSnapshot, now: float) -> list[Group]:
        waiting = (self._waiting(job, pool, now) for job, pool in seen)
        groups = (self._group(members, working, now) for members in group_by_kind(waiting, working.backlog))
        return [group for group in groups if group.jobs]

    def _waiting(self, job: Job, pool: Pool, now: float) -> Waiting:
        work = self._reader.work(job)
        kind = (pool.index, job.level, job.model, job.service, magnitude(work), magnitude(job.due - now))
        return Waiting(pool.name, job.level, work, kind, job)

    def _group(self, members: Sequence[tuple[Waiting, float]], working: WorkingSnapshot, now: float) -> Group:
        """The group of similar jobs, with the figures of the one served last."""
        last, ahead = members[0]
        most = self._rules.max_moves_per_job
        free = [one.job.index for one, _ in reversed(members) if self._moved.get(one.job.index, 0) < most]
        table = self._table_of(last.job, working)
        here = [candidate.hardware_class for candidate in table.candidates].index(last.queue)
        return Group(table, self._needs_of(last.job, now), here, ahead, tuple(map(str, free)))


def _last_served(pools: Sequence[Pool], working: WorkingSnapshot, window: int) -> list[tuple[Job, Pool]]:
    """The jobs that the pools' queues serve last, as a router inspects them."""
    most = window_per_level(window, [pool.name for pool in pools], working.backlog)
    return [(job, pool) for pool in pools for job in pool.back(most)]
