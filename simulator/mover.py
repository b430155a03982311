"""The router's rebalancer on simulated queues: `router.decide.rebalance` decides each tick from a router's view."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from router.decide.candidates import Board
from router.decide.classify import Needs
from router.decide.groups import Group
from router.decide.rebalance import Flows, rebalance
from router.decide.working_snapshot import Outlook
from router.upkeep.waiting import alike, backlogged, magnitude, most_of_each
from simulator.policies.policy import Shift
from simulator.pool import Pool
from simulator.reader import Reader
from simulator.traces.workload import Job
from tasks.topology import Rebalance


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting job, as `router.upkeep.waiting.Queued`."""

    queue: str
    level: int
    work: float
    kind: Hashable
    job: Job


class Mover:
    """`router.upkeep.mover.Mover` for simulated queues; `board_of` gives a job's board, `needs_of` its needs."""

    def __init__(
        self,
        rules: Rebalance,
        reader: Reader,
        board_of: Callable[[Job, Outlook], Board],
        needs_of: Callable[[Job, float], Needs],
    ) -> None:
        self._rules = rules
        self._reader = reader
        self._board_of = board_of
        self._needs_of = needs_of
        self._flows = Flows()
        self._moved: dict[int, int] = {}
        self._next = 0.0

    def tick(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """Look once a tick, and move."""
        if now < self._next:
            return
        self._next = now + self._rules.tick
        self._flows.begin()
        outlook, rules = self._reader.outlook(pools, now), self._rules
        place = {pool.name: pool for pool in pools}
        looked = [place[name] for name in backlogged(outlook, rules.tick)]
        seen = _seen(looked, outlook, rules.window)
        groups = self._groups(seen, outlook, now)
        work = {name: outlook.backlog.levels(name) for name in outlook.backlog.classes}
        depths = {pool.name: pool.waiting for pool in looked}
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
        """A job is over."""
        self._moved.pop(job.index, None)

    def _groups(self, seen: Sequence[tuple[Job, Pool]], outlook: Outlook, now: float) -> list[Group]:
        waiting = (self._waiting(job, pool, now) for job, pool in seen)
        groups = (self._group(members, outlook, now) for members in alike(waiting, outlook.backlog))
        return [group for group in groups if group.jobs]

    def _waiting(self, job: Job, pool: Pool, now: float) -> Waiting:
        work = self._reader.work(job)
        kind = (pool.index, job.level, job.model, job.service, magnitude(work), magnitude(job.due - now))
        return Waiting(pool.name, job.level, work, kind, job)

    def _group(self, members: Sequence[tuple[Waiting, float]], outlook: Outlook, now: float) -> Group:
        """The group of jobs alike, by the figures of the one that is served last."""
        last, ahead = members[0]
        most = self._rules.max_moves_per_job
        free = [one.job.index for one, _ in reversed(members) if self._moved.get(one.job.index, 0) < most]
        board = self._board_of(last.job, outlook)
        here = [candidate.hardware_class for candidate in board.candidates].index(last.queue)
        return Group(board, self._needs_of(last.job, now), here, ahead, tuple(map(str, free)))


def _seen(pools: Sequence[Pool], outlook: Outlook, window: int) -> list[tuple[Job, Pool]]:
    """The jobs that the pools' queues serve last, as a router looks at them."""
    most = most_of_each(window, [pool.name for pool in pools], outlook.backlog)
    return [(job, pool) for pool in pools for job in pool.back(most)]
