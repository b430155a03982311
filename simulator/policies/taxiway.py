"""The router's own decision, from what the router would know of the simulated fleet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from router.decide.candidates import CandidateTable, billed
from router.decide.capacity import has_capacity
from router.decide.classify import Constraints, Needs
from router.decide.fairness import HeldKind
from router.decide.placement import Placement, choose
from router.decide.working_snapshot import WorkingSnapshot
from router.upkeep.releaser import TICK
from simulator.expected_batch import ExpectedBatch
from simulator.fleet import SERVICES, Fleet
from simulator.holding import Holding
from simulator.mover import Mover
from simulator.policies.blind import LIVE
from simulator.policies.policy import REFUSED, ByLevel, Held, Shift
from simulator.pool import Pool
from simulator.reader import Count, Reader, Surroundings
from simulator.timing import Stepping
from simulator.traces.workload import Job, Workload
from taxiway.errors import OverloadedError, UnplaceableError

_ENDLESS = 1e9


class Taxiway(ByLevel):
    """`router.decide.placement.choose` on a working snapshot, read four times a second and updated in between.

    Held jobs are released, and waiting jobs moved, as the router does. A class without devices can be started: if live
    work would be late and its fastest class is off, it goes there and so starts it. What the router refuses is refused.
    """

    beat = TICK

    def __init__(self, workload: Workload, surroundings: Surroundings | None = None, *, seed: int = 0) -> None:
        fleet = workload.fleet
        self._reader = Reader(workload, surroundings or Surroundings(), seed=seed)
        self._place = {name: place for place, name in enumerate(fleet.classes)}
        self._stepping = [
            any(isinstance(timing, Stepping) for timing in fleet.timings[name]) for name in workload.trace.models
        ]
        self._constraints = [_constraints(fleet, name) for name in workload.trace.models]
        self._batch = max(device.max_batch for device in fleet.classes.values())
        self._expected_batch = ExpectedBatch(len(workload.trace.models))
        self._holding = Holding()
        self._mover = Mover(fleet.rebalance, self._reader, self._table, self._needs)

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        working = self._reader.working(pools, now)
        self._expected_batch.observe(job)
        table = self._table(job, working)
        try:
            placement = choose(table, self._needs(job, now), working.ahead(), seed=job.index)
        except UnplaceableError:
            return REFUSED
        except OverloadedError:
            placement = None
        if job.service == LIVE and not self._planned(now) and (placement is None or _late(placement)):
            fit = [self._place[candidate.hardware_class] for candidate in table.candidates]
            fastest = min((pools[place] for place in fit), key=lambda pool: (job.alone[pool.index], pool.index))
            if not fastest.serving:
                self._reader.count(job, self._count(job, fastest, None))
                return fastest.index
        return REFUSED if placement is None else self._bind(job, pools, placement)

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        yield from self._release(pools, now)
        yield from self._mover.tick(pools, now)

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        self._reader.ended(job, pool, job.arrival + seconds)
        self._mover.ended(job)

    def _planned(self, now: float) -> bool:
        """Whether a plan says which classes are started."""
        return False

    def _bind(self, job: Job, pools: Sequence[Pool], placement: Placement) -> int | Held:
        pool = pools[self._place[placement.candidate.hardware_class]]
        count = self._count(job, pool, placement)
        if not placement.held:
            self._reader.count(job, count)
            return pool.index
        self._reader.hold(job, count)
        self._holding.add(self._kind(job), job)
        return Held(pool.index)

    def _release(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """Place held jobs while queues have capacity for them."""
        kinds = self._holding.kinds()
        if not kinds:
            return
        self._holding.set_present(kinds)
        working = self._reader.replace_work(pools, now)
        ready = {kind for kind in kinds if self._may_leave(self._holding.first(kind), working, now)}
        while ready:
            kind = self._holding.next(ready)
            job, company = self._holding.first(kind), min(self._holding.count(kind), self._batch)
            placement = self._place_again(job, working, now, company)
            if placement is not None and placement.held:
                ready.discard(kind)
                continue
            self._holding.release(kind, placement.device_dollars if placement is not None else 0.0)
            self._reader.release(job)
            if placement is None:
                yield Shift(job, None, None)
            else:
                bound = pools[self._place[placement.candidate.hardware_class]]
                self._reader.count(job, self._count(job, bound, placement))
                yield Shift(job, None, bound.index)
            ready &= self._holding.kinds()

    def _may_leave(self, job: Job, working: WorkingSnapshot, now: float) -> bool:
        return job.due <= now or has_capacity(self._table(job, working), job.level, working.ahead(released=True))

    def _place_again(self, job: Job, working: WorkingSnapshot, now: float, company: int) -> Placement | None:
        """A held job's placement now; None if it is refused."""
        if job.due <= now:
            return None
        needs = replace(self._needs(job, now), company=company)
        try:
            return choose(self._table(job, working), needs, working.ahead(released=True), seed=job.index)
        except OverloadedError:
            return None

    def _needs(self, job: Job, now: float) -> Needs:
        return Needs(job.due - now, job.level, 1, 1.0, constraints=self._constraints[job.model][job.service])

    def _kind(self, job: Job) -> HeldKind:
        return HeldKind(job.tenant, self._reader.models[job.model].id, self._constraints[job.model][job.service])

    def _table(self, job: Job, working: WorkingSnapshot) -> CandidateTable:
        """The model's candidate table with the job's own seconds, because sizes differ in two ways, prompt and output.

        A generating model's rows join a running batch: the job's expected batch is as many typical jobs as are
        unfinished, and its own size counts only for itself. Device seconds are those of a full batch, because jobs wait
        only then.
        """
        table = working.table(self._reader.models[job.model], self._constraints[job.model][job.service])
        places = [self._place[candidate.hardware_class] for candidate in table.candidates]
        pace, alone = table.base, table.base * [job.alone[place] for place in places]
        if not self._stepping[job.model]:
            each = pace * [job.crowding[place] for place in places]
            return replace(table, base=alone - each, slope=each)
        usual, each = (
            pace * self._expected_batch.alone(job.model)[places],
            pace * self._expected_batch.crowding(job.model)[places],
        )
        work = (usual - each) / table.limit + each
        company = working.backlog.seconds.sum(axis=1)[table.queue] / table.servers / work
        return replace(
            table,
            base=alone - each,
            slope=each,
            concurrent=table.limit * work,
            billed=billed(table.limit),
            limit=np.minimum(company + 1.0, table.limit),
            max_run=np.full_like(table.max_run, np.inf),  # the expected batch is already running
            rates=np.full_like(table.rates, _ENDLESS),
        )

    def _count(self, job: Job, pool: Pool, placement: Placement | None) -> Count:
        if placement is not None and not self._stepping[job.model]:
            work = placement.work
        else:
            work = job.alone[pool.index] / pool.slots + job.crowding[pool.index] * (1 - 1 / pool.slots)
        return Count(pool.name, self._reader.models[job.model].id, work)


def _constraints(fleet: Fleet, model: str) -> list[Constraints]:
    """A model's constraints by service: it runs on the classes that have a timing for it."""
    able = tuple(name for name, timing in zip(fleet.classes, fleet.timings[model], strict=True) if timing is not None)
    return [
        Constraints(service=name, preemptible=service.preemptible, classes=able)
        for name, service in zip(SERVICES, fleet.services, strict=True)
    ]


def _late(placement: Placement) -> bool:
    deadline = placement.needs.deadline
    return deadline is not None and bool(placement.figures.finish[placement.index] > deadline)
