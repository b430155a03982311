"""The router's own decision, from what the router would know of the simulated fleet; and the policies by name.

`TunedPolicy` adds its tuner: a plan from the fleet's twin, and per-request placement where there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from router.decide.candidates import CandidateTable, billed
from router.decide.classify import Constraints, Needs
from router.decide.cost import has_capacity
from router.decide.fairness import RELEASE_TICK, HeldKind
from router.decide.placement import Placement, choose
from router.decide.plan import Density, Plan
from router.decide.working_snapshot import WorkingSnapshot
from simulator.fleet import SERVICES, USABLE, Fleet, Stepping
from simulator.policies.policy import LIVE, REFUSED_JOB, Fixed, Held, LeastWork, Policy, Shift, Static
from simulator.policies.routing import Count, ExpectedBatch, Holding, SimulatedMover, SimulatedReader, model_of
from simulator.pool import Pool
from simulator.traces import Column
from simulator.tuning.opponents import pinned, tuned_split
from simulator.tuning.prior import all_alike, displaces, guess
from simulator.tuning.real_fleet import paces
from simulator.tuning.recall import alike
from simulator.tuning.search import SLACK
from simulator.tuning.tuner import (
    ALARM_WINDOW,
    PLAYED_WINDOW,
    REST,
    SHORTEST_PLAY,
    TUNE_EVERY,
    Decision,
    Trust,
    Tuner,
    TuningWatch,
    lacking,
    plan_of,
)
from simulator.tuning.twin import ClassState, TwinConditions, Window
from simulator.workload import SimulatedJob, Workload
from tasks.history import LAG
from taxiway.errors import OverloadedError, UnplaceableError

_NO_DEADLINE = 1e9


class Taxiway(Policy):
    """`router.decide.placement.choose` on a working snapshot, read four times a second and updated in between.

    Held jobs are released, and waiting jobs moved, as the router does. A class without devices can be started: if live
    work would be late and there is no plan, it goes to the cheapest class that is fast enough, which starts if it is
    off. What the router refuses is refused.
    """

    beat = RELEASE_TICK
    yields = True

    def __init__(self, workload: Workload, reader: SimulatedReader | None = None) -> None:
        fleet = workload.fleet
        self._reader = reader or SimulatedReader(workload)
        self._place = {name: place for place, name in enumerate(fleet.classes)}
        self._stepping = [
            any(isinstance(timing, Stepping) for timing in fleet.timings[name]) for name in workload.trace.models
        ]
        self._tokens = [_cached_tokens(fleet, name) for name in workload.trace.models]
        self._constraints = [_constraints(fleet, name) for name in workload.trace.models]
        self._batch = max(device.max_batch for device in fleet.classes.values())
        self._expected_batch = ExpectedBatch()
        self._holding = Holding()
        self._predicted = workload.trace.predicted
        self._mover = SimulatedMover(fleet.rebalance, self._reader, self._table, self._needs)

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        working = self._reader.working(pools, now)
        self._expected_batch.observe(job)
        table = self._table(job, working)
        try:
            placement = choose(table, self._needs(job, now), working.ahead(), seed=job.index)
        except UnplaceableError:
            return REFUSED_JOB
        except OverloadedError:
            placement = None
        plan = self._reader.plan
        if job.service == LIVE and (plan is None or plan.guessed) and (placement is None or _late(placement)):
            fit = [pools[self._place[candidate.hardware_class]] for candidate in table.candidates]
            least = min(job.alone[pool.index] for pool in fit)
            timely = [pool for pool in fit if job.alone[pool.index] <= max(job.deadline / SLACK, least)]
            cheapest = min(timely, key=lambda pool: (pool.cost(job), pool.index))
            if not cheapest.serving:
                self._reader.count(job, self._count(job, cheapest, None))
                return cheapest.index
        return REFUSED_JOB if placement is None else self._bind(job, pools, placement)

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        yield from self._release(pools, now)
        yield from self._mover.tick(pools, now)

    def ended(self, job: SimulatedJob, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        self._reader.ended(job, pool, job.arrival + seconds)
        self._mover.ended(job)

    def _bind(self, job: SimulatedJob, pools: Sequence[Pool], placement: Placement) -> int | Held:
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
            job, expected_batch = self._holding.first(kind), min(self._holding.count(kind), self._batch)
            placement = self._place_again(job, working, now, expected_batch)
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

    def _may_leave(self, job: SimulatedJob, working: WorkingSnapshot, now: float) -> bool:
        return job.due <= now or has_capacity(self._table(job, working), job.level, working.ahead(released=True))

    def _place_again(
        self, job: SimulatedJob, working: WorkingSnapshot, now: float, expected_batch: int
    ) -> Placement | None:
        """A held job's placement now; None if it is refused."""
        if job.due <= now:
            return None
        needs = replace(self._needs(job, now), expected_batch=expected_batch)
        try:
            return choose(self._table(job, working), needs, working.ahead(released=True), seed=job.index)
        except OverloadedError:
            return None

    def _needs(self, job: SimulatedJob, now: float) -> Needs:
        return Needs(job.due - now, job.level, 1, 1.0, constraints=self._constraints[job.model][job.service])

    def _kind(self, job: SimulatedJob) -> HeldKind:
        return HeldKind(job.tenant, self._reader.models[job.model].id, self._constraints[job.model][job.service])

    def _table(self, job: SimulatedJob, working: WorkingSnapshot) -> CandidateTable:
        """The model's candidate table with the job's own seconds, because sizes differ in two ways, prompt and output.

        A generating model's rows join a running batch: the job's expected batch is as many typical jobs as are
        unfinished, at most those whose caches fit, and its own size counts only for itself. Device seconds are those of
        a full batch, because jobs wait only then. Batches of other models run between the steps of generations, and so
        do not wait for these.
        """
        table = self._metered(
            job, working.table(self._reader.models[job.model], self._constraints[job.model][job.service])
        )
        places = [self._place[candidate.hardware_class] for candidate in table.candidates]
        pace, alone = table.base, table.base * [job.alone[place] for place in places]
        if not self._stepping[job.model]:
            each = pace * [job.crowding[place] for place in places]
            beside = [self._reader.generating(one.hardware_class, job.level) for one in table.candidates]
            return replace(table, base=alone - each, slope=each, concurrent=table.concurrent + beside / table.servers)
        usual, each = pace * self._expected_batch.typical(job.model)[:, places]
        fitting = np.floor(self._tokens[job.model][places] / (job.size + job.predicted))
        limit = np.minimum(table.limit, np.maximum(fitting, 1.0))
        work = (usual - each) / table.limit + each
        expected_batch = working.backlog.seconds.sum(axis=1)[table.queue] / table.servers / work
        return replace(
            table,
            base=alone - each,
            slope=each,
            concurrent=table.limit * work,
            billed=billed(table.limit),
            limit=np.minimum(expected_batch + 1.0, limit),
            max_run=np.full_like(table.max_run, np.inf),  # the expected batch is already running
            rates=np.full_like(table.rates, _NO_DEADLINE),
        )

    def _metered(self, job: SimulatedJob, table: CandidateTable) -> CandidateTable:
        """The table whose prices and limits of tokens are those of the whole job, as its size counts as 1 there."""
        if table.metered is None and table.allowed is None:
            return table
        read, written = float(job.size), float(self._predicted[job.index])
        metered, allowed = table.metered, table.allowed
        if metered is not None:
            whole = metered[0] + metered[1] * read + metered[2] * written
            metered = np.stack([whole, np.zeros_like(whole), np.zeros_like(whole)])
        if allowed is not None:
            allowed = allowed / np.array([1.0, max(read + written, 1.0)])[:, None, None]
        return replace(table, metered=metered, allowed=allowed)

    def _count(self, job: SimulatedJob, pool: Pool, placement: Placement | None) -> Count:
        if placement is not None and not self._stepping[job.model]:
            work = placement.work
        else:
            work = job.alone[pool.index] / pool.slots + job.crowding[pool.index] * (1 - 1 / pool.slots)
        return Count(pool.name, self._reader.models[job.model].id, work)


def _constraints(fleet: Fleet, model: str) -> list[Constraints]:
    """A model's constraints by service: it runs on the classes that have a timing for it."""
    able = tuple(name for name, timing in zip(fleet.classes, fleet.timings[model], strict=True) if timing is not None)
    return [
        Constraints(service=name, preemptible=preemptible, classes=able)
        for name, preemptible in zip(SERVICES, fleet.preemptible, strict=True)
    ]


def _cached_tokens(fleet: Fleet, model: str) -> Column:
    """Tokens that a device's memory holds beside the model, by class: they bound the rows of a batch."""
    both = zip(fleet.classes.values(), fleet.timings[model], strict=True)
    return np.array(
        [(d.memory * USABLE - t.memory) / t.cache if isinstance(t, Stepping) and t.cache else np.inf for d, t in both]
    )


def _states(pools: Sequence[Pool], now: float) -> TwinConditions:
    """The classes as they are."""
    return tuple(ClassState.of(pool, now) for pool in pools)


def _late(placement: Placement) -> bool:
    deadline = placement.needs.deadline
    return deadline is not None and bool(placement.figures.finish[placement.index] > deadline)


class TunedPolicy(Taxiway):
    """`Taxiway` under a plan that is tuned while the trace runs; the first one is for what is expected."""

    def __init__(self, workload: Workload, *, seed: int = 0) -> None:
        super().__init__(workload)
        self._recorded, self._earlier, self._before = workload, 0.0, 0  # seconds and arrivals from before the trace
        self._fleet = workload.fleet
        self._tuner = Tuner(seed)
        self._watch = TuningWatch()
        self._next_look = 0.0
        self._handed_over, self._played = 0.0, 0.0
        self._live: deque[tuple[float, bool]] = deque()
        self._trim = False
        self._trust = Trust()
        self.decisions: list[tuple[float, Decision]] = []

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        chosen = super().choose(job, pools, now)
        if chosen == REFUSED_JOB:
            self._trust.note((job.model, job.service), timely=False)
        return chosen

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        self._tune(pools, now)
        yield from super().look(pools, now)
        if self._trim and now > self._handed_over and self._tuner.assignment is not None:
            self._trim = False
            decision, used = self.decisions[-1][1], self._tuner.assignment.used()
            for pool in pools:
                pool.release(decision.begin[pool.index] if pool.index in used else 0, now)

    def ended(self, job: SimulatedJob, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        self._trust.note((job.model, job.service), timely=seconds <= job.deadline)
        if job.service == LIVE:
            self._live.append((job.arrival + seconds, seconds <= job.deadline))
        super().ended(job, pool, seconds)

    def _tune(self, pools: Sequence[Pool], now: float) -> None:
        """Make or renew the plan if that is due, as often and by records as old as those of the fleet's tuner."""
        if now < self._next_look:
            return
        self._next_look = now + REST
        known = now - LAG
        while self._live and self._live[0][0] < known - ALARM_WINDOW:
            self._live.popleft()
        live = [timely for at, timely in self._live if at < known]
        pace = paces(self._reader.fleet, self._fleet.classes)
        until = known + self._earlier
        recalls = alike(self._recorded.trace, until, PLAYED_WINDOW, self._played) is not None
        if not self._watch.due(now, pace, live, recalls=recalls):
            return
        if self._tuner.assignment is not None and self._fails(pools, now):
            self._watch = TuningWatch(now, TUNE_EVERY, pace)
            return
        recorded = replace(self._recorded, fleet=self._as_learned(pools))
        window, plays = self._window(recorded, until)
        if pause := lacking(len(window.jobs), window.span, self._reader.plan):
            self._next_look = now + pause
            if self._reader.plan is None and displaces(self._fleet):
                self._guess(pools, now)
            return
        waiting = [index for pool in pools for index in pool.queue.indices()] + self._holding.indices()
        window = window.behind(recorded, np.sort(np.array(waiting, int) + self._before), now + self._earlier)
        self._watch = TuningWatch(now, window.span, pace)
        decision = self._tuner.tune(window, _states(pools, now), now, plays=plays)
        self._adopt(decision, pools, now)
        self._reader.follow(self._plan_of(decision, window, now))

    def _guess(self, pools: Sequence[Pool], now: float) -> None:
        """Follow a guess before anything has arrived; it gives way to the first plan."""
        window = Window.latest(all_alike(self._recorded), SHORTEST_PLAY, SHORTEST_PLAY)
        plan = self._plan_of(self._tuner.tune(window, _states(pools, now), now), window, now)
        self._reader.follow(guess(plan))
        self._tuner.assignment = None

    def _plan_of(self, decision: Decision, window: Window, now: float) -> Plan:
        plan = plan_of(decision, window.workload.fleet, window, number=len(self.decisions), made=now)
        cells = tuple(msgspec.structs.replace(cell, model=model_of(cell.model).id) for cell in plan.cells)
        return msgspec.structs.replace(plan, cells=cells)

    def _window(self, recorded: Workload, until: float) -> tuple[Window, int | None]:
        """The arrivals to play, and how many plays there may be."""
        earlier = alike(recorded.trace, until, PLAYED_WINDOW)
        self._played = until - PLAYED_WINDOW if earlier is None else earlier.begin
        return Window.likely(recorded, until, PLAYED_WINDOW, earlier), None

    def _as_learned(self, pools: Sequence[Pool]) -> Fleet:
        """The fleet with the timings that its devices have learned."""
        timings = {
            name: tuple(
                timing and timing.slower(pool.learned[number])
                for pool, timing in zip(pools, self._fleet.timings[name], strict=True)
            )
            for number, name in enumerate(self._recorded.trace.models)
        }
        return replace(self._fleet, timings=timings)

    def _fails(self, pools: Sequence[Pool], now: float) -> bool:
        """Whether the plan did not keep what it promised: it is dropped then."""
        spent = sum(pool.spent(now) for pool in pools)
        decision = self.decisions[-1][1]
        over = now - self._trust.since >= TUNE_EVERY
        if not over or not self._trust.is_lost(now, spent, self._fleet.penalties, decision.predicted):
            return False
        self._trust.begin(now, spent)
        self._tuner.assignment = None
        self._reader.follow(None)
        for pool in pools:
            pool.follow(Density())
        return True

    def _adopt(self, decision: Decision, pools: Sequence[Pool], now: float) -> None:
        """Follow the decision; an assignment that is kept may need other numbers of devices by now."""
        self.decisions.append((now, decision))
        if decision.adopted:
            self._trim = True
            self._trust.begin(now, sum(pool.spent(now) for pool in pools))
            self._handed_over = max((move.latest for move in decision.moves.values()), default=now)
        floors = zip(pools, decision.assignment.rules, decision.devices, decision.pauses, strict=True)
        used = decision.assignment.used()
        for pool, rule, devices, pause in floors:
            pool.follow(rule if pool.index in used else Density(), devices, pause, now)
            if decision.adopted:  # devices that start yet for what was placed before are not awaited
                pool.release(max(pool.serving, decision.begin[pool.index]), now)
            for _ in range(min(devices, pool.available) - pool.powered):
                pool.switch_on(now, after=pool.start)


Maker = Callable[[Workload, int], Policy]
"""Makes a policy for one run, from the workload (its fleet and models) and a seed."""


def taxiway(workload: Workload, seed: int) -> Policy:
    """The router with its tuner; without penalties there is nothing to tune for."""
    if not any(workload.fleet.penalties):
        return Taxiway(workload)
    return TunedPolicy(workload, seed=seed)


POLICIES: Mapping[str, Maker] = {
    "taxiway": taxiway,
    "per-request": lambda workload, seed: Taxiway(workload),
    "tuned-split": lambda workload, seed: Fixed(tuned_split(workload, seed)),
    "pinned": lambda workload, seed: Fixed(pinned(workload, seed)),
    "static": lambda workload, seed: Static(),
    "least-work": lambda workload, seed: LeastWork(),
}
"""taxiway with its plans and without, what an operator would tune, and what needs no tuning."""
