"""The router's own decision, from what the router would know of the simulated fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from router.board import Board
from router.classify import Constraints, Needs
from router.outlook import Outlook
from router.placement import Placement, choose
from simulator.fleet import SERVICES
from simulator.policies.blind import LIVE
from simulator.policies.policy import REFUSED, ByLevel
from simulator.pool import Pool
from simulator.reader import Count, Reader, Surroundings
from simulator.timing import Stepping
from simulator.workload import Job, Workload
from taxiway.errors import OverloadedError, UnplaceableError

_ENDLESS = 1e9


class Taxiway(ByLevel):
    """`router.placement.choose` on the router's outlook: four readings a second, and between them what it placed.

    A class without devices counts as cold, with its start as the load time. Where live work would be late and the class
    that is fastest for it is off, it goes there and so wakes it. What the router refuses is refused; what it would hold
    waits in the queue of the class that it would be held for.
    """

    def __init__(self, workload: Workload, surroundings: Surroundings | None = None, *, seed: int = 0) -> None:
        fleet = workload.fleet
        self._reader = Reader(workload, surroundings or Surroundings(), seed=seed)
        self._place = {name: place for place, name in enumerate(fleet.classes)}
        self._stepping = [
            any(isinstance(timing, Stepping) for timing in fleet.timings[name]) for name in workload.trace.models
        ]
        self._constraints = [
            Constraints(service=name, preemptible=service.preemptible)
            for name, service in zip(SERVICES, fleet.services, strict=True)
        ]

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        outlook = self._reader.outlook(pools, now)
        needs = Needs(job.deadline, job.level, 1, 1.0, constraints=self._constraints[job.service])
        board = self._board(job, outlook)
        try:
            placement = choose(board, needs, outlook.backlog.seconds, seed=job.index)
        except UnplaceableError:
            return REFUSED
        except OverloadedError:
            placement = None
        chosen = REFUSED if placement is None else self._place[placement.candidate.hardware_class]
        if job.service == LIVE and (placement is None or _late(placement)):
            fit = [pools[self._place[candidate.hardware_class]] for candidate in board.candidates]
            chosen = _woken(job, fit, chosen)
        if chosen != REFUSED:
            self._count(job, pools[chosen], placement)
        return chosen

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        self._reader.ended(job, pool, job.arrival + seconds)

    def _board(self, job: Job, outlook: Outlook) -> Board:
        """The model's board with the job's own seconds: sizes differ in two ways, prompt and output.

        A generating model's rows join a running batch, so that the company that a job finds is all that is unfinished;
        its device seconds are those of a full batch, for only then does anybody wait.
        """
        board = outlook.board(self._reader.models[job.model], self._constraints[job.service])
        places = [self._place[candidate.hardware_class] for candidate in board.candidates]
        pace, each = board.base, board.base * [job.crowding[place] for place in places]
        alone = pace * [job.alone[place] for place in places] - each
        if not self._stepping[job.model]:
            return replace(board, base=alone, slope=each)
        work = alone / board.limit + each
        company = outlook.backlog.seconds.sum(axis=1)[board.queue] / board.servers / work
        return replace(
            board,
            base=alone,
            slope=each,
            beside=board.limit * work,
            limit=np.minimum(company + 1.0, board.limit),
            rates=np.full_like(board.rates, _ENDLESS),
        )

    def _count(self, job: Job, pool: Pool, placement: Placement | None) -> None:
        if placement is not None and not self._stepping[job.model]:
            work = placement.work
        else:
            work = job.alone[pool.index] / pool.slots + job.crowding[pool.index] * (1 - 1 / pool.slots)
        self._reader.count(job, Count(pool.name, self._reader.models[job.model].id, work))


def _late(placement: Placement) -> bool:
    deadline = placement.needs.deadline
    return deadline is not None and bool(placement.figures.finish[placement.index] > deadline)


def _woken(job: Job, fit: Sequence[Pool], otherwise: int) -> int:
    fastest = min(fit, key=lambda pool: (job.alone[pool.index], pool.index))
    return otherwise if fastest.serving else fastest.index
