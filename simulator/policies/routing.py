"""The simulated fleet as a router sees and changes it.

Periodic snapshots are updated in between by placements and elapsed time. Held jobs and moves follow the router's own
rules (`router.decide`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from statistics import fmean

import numpy as np

from router.decide.candidates import CandidateTable
from router.decide.classify import Needs
from router.decide.facts import BEAT, Arrived, FleetFacts, arrived_since, work_from
from router.decide.fairness import FairOrder, HeldKind, Releasable
from router.decide.moves.rebalance import Flows, Group, rebalance
from router.decide.moves.waiting import Queued, backlogged, group_by_kind, magnitude, window_per_level
from router.decide.plan import Plan
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import TOLERANCE, WorkingSnapshot
from simulator.fleet import SERVICES, Fleet, Stepping
from simulator.policies.policy import Shift
from simulator.pool import Pool
from simulator.tuning.real_fleet import pace_of
from simulator.workload import Figures, SimulatedJob, Workload
from tasks.document import Size
from tasks.heartbeat import ANY, HEARTBEAT, DeviceFacts, EndpointFacts, variant_key
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import UNSURE, KnownProfile, ProfileBook
from tasks.models.tensor_spec import TensorSpec
from tasks.topology import HardwareClass, Rebalance, Scaling, Service, Topology
from taxiway.contract.keys import LEVELS, arrived_cell, held_cell, work_cell
from workers.decide.occupation import Track, begin, blocking_by_model, observe


@dataclass(frozen=True, slots=True)
class Count:
    """A job's part of the snapshot: its class, its model, and its device seconds there."""

    name: str
    model: str
    work: float


class SimulatedReader:
    """The simulation's counterpart of the router's `FleetReader`.

    Devices report what their workers learned in a heartbeat; only then are candidate tables rebuilt, with new rates.
    Work counts as unfinished for `path` seconds after its end, until the store shows it. `stray` gives a run's time
    over the one predicted.
    """

    def __init__(self, workload: Workload, *, path: float = 0.0, stray: Callable[[], float] = lambda: 1.0) -> None:
        fleet = workload.fleet
        self.models = [model_of(name) for name in workload.trace.models]
        self._topology = topology_of(fleet)
        self._book: ProfileBook = _Book()
        self._timings = [fleet.timings[name] for name in workload.trace.models]
        self._path, self._stray = path, stray
        self._tracks: defaultdict[tuple[str, str], Track] = defaultdict(lambda: begin(UNSURE))
        self._cells: defaultdict[str, float] = defaultdict(float)
        self._generating: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * LEVELS)
        self._counts: dict[int, Count] = {}
        self._ending: deque[tuple[float, str, float]] = deque()
        self._serving: tuple[int, ...] = ()
        self._arrived: Arrived | None = None
        self._working = WorkingSnapshot(self._topology, self._book, FleetSnapshot(stale=True))
        self._next = self._heartbeat = self._seen_at = 0.0
        self.plan: Plan | None = None

    def working(self, pools: Sequence[Pool], now: float) -> WorkingSnapshot:
        """The fleet at the last snapshot, with what was placed since."""
        if now >= self._next:
            self._read(pools, now)
        elif now - self._seen_at > TOLERANCE:
            self._working.advance(now - self._seen_at)
            self._seen_at = now
        return self._working

    @property
    def fleet(self) -> FleetSnapshot:
        """The fleet at the last snapshot."""
        return self._working.fleet

    def follow(self, plan: Plan | None) -> None:
        """Place requests by this plan, or by themselves if there is none, from the next snapshot on."""
        self.plan = plan
        self._next = self._heartbeat = 0.0

    def count(self, job: SimulatedJob, count: Count) -> None:
        """Record that a job was placed."""
        self._working.backlog.add(count.name, job.level, count.work)
        self._cells[work_cell(count.name, job.level)] += count.work
        self._cells[arrived_cell(count.name, count.model)] += 1
        self._counts[job.index] = count
        self._generate(job, count.name, count.work)

    def hold(self, job: SimulatedJob, count: Count) -> None:
        """Record that a job is held for a class."""
        self._working.held.add(count.name, job.level, count.work)
        self._cells[held_cell(count.name, job.level)] += count.work
        self._counts[job.index] = count
        self._generate(job, count.name, count.work)

    def release(self, job: SimulatedJob) -> None:
        """Record that a job leaves holding."""
        count = self._counts.pop(job.index)
        self._cells[held_cell(count.name, job.level)] -= count.work
        self._generate(job, count.name, -count.work)

    def move(self, job: SimulatedJob, name: str, work: float) -> None:
        """Move a waiting job to another class, where it takes `work` device seconds; visible in the next snapshot."""
        count = self._counts[job.index]
        self._cells[work_cell(count.name, job.level)] -= count.work
        self._cells[work_cell(name, job.level)] += work
        self._counts[job.index] = Count(name, count.model, work)
        self._generate(job, count.name, -count.work)
        self._generate(job, name, work)

    def work(self, job: SimulatedJob) -> float:
        """Device seconds that a job counts for in its present class."""
        return self._counts[job.index].work

    def generating(self, name: str, level: int) -> float:
        """Device seconds of generations in a class down to a level, beside which batches of other models run."""
        return sum(self._generating[name][: level + 1])

    def replace_work(self, pools: Sequence[Pool], now: float) -> WorkingSnapshot:
        """The fleet now, without the work that has ended since the snapshot."""
        working = self.working(pools, now)
        self._settle(now)
        working.replace_work(*work_from(self._cells))
        self._seen_at = now
        return working

    def ended(self, job: SimulatedJob, pool: Pool, now: float) -> None:
        """A job has ended, and its worker has learned by how much its run deviated from the prediction."""
        count = self._counts.pop(job.index)
        self._generate(job, count.name, -count.work)
        self._ending.append((now + self._path, work_cell(pool.name, job.level), count.work))
        ratio = pool.pace * self._stray()
        track = self._tracks[pool.name, count.model]
        self._tracks[pool.name, count.model] = observe(track, predicted=1.0, seconds=ratio, levels=(job.level,))

    def _generate(self, job: SimulatedJob, name: str, work: float) -> None:
        if any(isinstance(timing, Stepping) for timing in self._timings[job.model]):
            self._generating[name][job.level] += work

    def _settle(self, now: float) -> None:
        while self._ending and self._ending[0][0] <= now:
            _, cell, done = self._ending.popleft()
            self._cells[cell] -= done

    def _read(self, pools: Sequence[Pool], now: float) -> None:
        self._settle(now)
        self._seen_at, self._next = now, (now // BEAT + 1) * BEAT
        self._arrived = arrived_since(self._arrived, FleetFacts(now, {}, {}, self._cells))
        work, held = work_from(self._cells)
        serving = tuple(pool.serving for pool in pools)
        if now < self._heartbeat and serving == self._serving:
            self._working.replace_work(work, held)
            return
        self._serving, self._heartbeat = serving, now + HEARTBEAT
        devices = tuple(device for pool in pools for device in self._devices_of(pool, now))
        startable = tuple(pool.name for pool in pools if not pool.serving or pool.serving < pool.available)
        fleet = FleetSnapshot(
            devices=devices,
            work=work,
            held=held,
            rates=self._arrived.rates,
            startable=startable,
            plan=self.plan,
            now=now,
        )
        self._working = WorkingSnapshot(self._topology, self._book, fleet)
        for pool in pools:
            mine = fleet.own(pool.name)
            pool.learned = [pace_of(mine, variant_key(model.id, model.reference)) for model in self.models]

    def _devices_of(self, pool: Pool, now: float) -> list[DeviceFacts]:
        """The class's serving devices."""
        able = [model for model, row in zip(self.models, self._timings, strict=True) if row[pool.index] is not None]
        learned = {variant_key(model.id, model.reference): self._tracks[pool.name, model.id] for model in able}
        paces = {key: track.pace for key, track in learned.items() if track.batches}
        newest = ((began, self.models[model].id, seconds) for began, model, seconds in reversed(pool.batches))
        blocking = blocking_by_model(newest, now, pool.serving)
        allowed = pool.rates.allowed(now, max(pool.serving, 1))
        endpoint = EndpointFacts(state="closed", allowed=allowed) if pool.device_class.endpoint else None
        return [
            DeviceFacts(
                worker=f"{pool.name}.{number:03}",
                hardware_class=pool.name,
                device=f"cpu:{number}",
                kind="cpu",
                emulated=True,
                name=pool.name,
                memory_total=1,
                memory_free=1,
                runtimes=("echo",),
                warm=tuple(sorted(learned)),
                blocking=blocking,
                pace=paces | ({ANY: fmean(paces.values())} if paces else {}),
                drifted=tuple(sorted(key for key, track in learned.items() if track.drifted)),
                residual={key: track.residuals for key, track in learned.items()},
                endpoint=endpoint,
            )
            for number in range(pool.serving)
        ]


@dataclass(frozen=True, slots=True)
class _Book(ProfileBook):
    """Every job has its own seconds, so a profile says only how a device deviates from them."""

    def lookup(self, model: Model, variant: str, kind: str, name: str) -> KnownProfile:
        """As `ProfileBook.lookup`."""
        return KnownProfile(Profile(base=1.0, slope=0.0), UNSURE, 0)


def topology_of(fleet: Fleet) -> Topology:
    """The simulated fleet's classes and services as queues.yaml would define them."""
    hardware = {
        name: HardwareClass(
            device="cpu",
            runtimes=("echo",),
            max_batch=device.max_batch,
            max_wait=device.max_wait,
            max_run=device.max_run,
            horizon=device.horizon,
            price=device.price,
            capacity="spot" if device.spot else "on-demand",
            reclaims_per_hour=device.reclaims_per_hour,
            reserve_for=device.reserve_for,
            scaling=Scaling(start=device.start, maximum=device.count),
        )
        for name, device in fleet.classes.items()
    }
    services = {name: Service(preemptible=may) for name, may in zip(SERVICES, fleet.preemptible, strict=True)}
    return Topology(hardware=hardware, service=services, default_service=SERVICES[1])


def model_of(name: str) -> Model:
    """A stand-in for a model of the simulated fleet: the router reads only its name and that of its one variant."""
    tensor = TensorSpec("rows", "FP32", (-1,))
    variant = Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(0.0, 0.0)})
    return Model(
        name=name,
        version=1,
        summary="",
        licence="",
        pipeline="tensors",
        inputs=(tensor,),
        outputs=(tensor,),
        size_unit="tokens",
        variants={"default": variant},
        reference="default",
    )


class Holding:
    """One queue per tenant, model and service, earliest deadline first."""

    def __init__(self) -> None:
        self._queues: defaultdict[HeldKind, list[tuple[float, int, SimulatedJob]]] = defaultdict(list)
        self._order = FairOrder({})

    def add(self, kind: HeldKind, job: SimulatedJob) -> None:
        """Hold a job."""
        heappush(self._queues[kind], (job.due, job.index, job))

    def kinds(self) -> set[HeldKind]:
        """The kinds that have jobs here."""
        return {kind for kind, jobs in self._queues.items() if jobs}

    def set_present(self, kinds: Iterable[HeldKind]) -> None:
        """Only the tenants of these kinds have jobs here."""
        self._order.set_present(kind.tenant for kind in kinds)

    def next(self, kinds: Iterable[HeldKind]) -> HeldKind:
        """The one of these kinds that is released next."""
        first = ((kind, *self._queues[kind][0]) for kind in kinds)
        found = (Releasable(kind.queue, due, job.level, self.count(kind), kind) for kind, due, _, job in first)
        return self._order.next(found).kind

    def indices(self) -> list[int]:
        """The indices of the jobs here."""
        return [job.index for jobs in self._queues.values() for _, _, job in jobs]

    def first(self, kind: HeldKind) -> SimulatedJob:
        """The job of a kind with the earliest deadline."""
        return self._queues[kind][0][2]

    def count(self, kind: HeldKind) -> int:
        """The number of jobs of a kind."""
        return len(self._queues[kind])

    def release(self, kind: HeldKind, dollars: float) -> None:
        """Remove the first job of a kind, and charge its tenant this many US dollars of device time."""
        heappop(self._queues[kind])
        self._order.charge(kind.tenant, dollars)


@dataclass(frozen=True, slots=True)
class SimulatedWaiting(Queued):
    """A waiting job of a simulation."""

    job: SimulatedJob


@dataclass(slots=True, eq=False)
class SimulatedMover:
    """`router.upkeep.mover.Mover` for simulated queues; `table_of` and `needs_of` give a job's table and needs."""

    rules: Rebalance
    reader: SimulatedReader
    table_of: Callable[[SimulatedJob, WorkingSnapshot], CandidateTable]
    needs_of: Callable[[SimulatedJob, float], Needs]
    _flows: Flows = field(default_factory=Flows)
    _moved: dict[int, int] = field(default_factory=dict)
    _next: float = 0.0

    def tick(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """Evaluate once per tick, and move."""
        if now < self._next:
            return
        self._next = now + self.rules.tick
        self._flows.begin()
        working, rules = self.reader.working(pools, now), self.rules
        place = {pool.name: pool for pool in pools}
        busy = [place[name] for name in backlogged(working, rules.tick)]
        most = window_per_level(rules.window, [pool.name for pool in busy], working.backlog)
        seen = [(job, pool) for pool in busy for job in pool.back(most)]
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
                self.reader.move(job, move.target, move.work)
                yield Shift(job, place[move.source].index, place[move.target].index)

    def ended(self, job: SimulatedJob) -> None:
        """A job has ended."""
        self._moved.pop(job.index, None)

    def _groups(self, seen: Sequence[tuple[SimulatedJob, Pool]], working: WorkingSnapshot, now: float) -> list[Group]:
        waiting = (self._waiting(job, pool, now) for job, pool in seen)
        groups = (self._group(members, working, now) for members in group_by_kind(waiting, working.backlog))
        return [group for group in groups if group.jobs]

    def _waiting(self, job: SimulatedJob, pool: Pool, now: float) -> SimulatedWaiting:
        work = self.reader.work(job)
        kind = (pool.index, job.level, job.model, job.service, magnitude(work), magnitude(job.due - now))
        return SimulatedWaiting(pool.name, job.level, work, kind, job)

    def _group(self, members: Sequence[tuple[SimulatedWaiting, float]], working: WorkingSnapshot, now: float) -> Group:
        """The group of similar jobs, with the figures of the one served last."""
        last, ahead = members[0]
        most = self.rules.max_moves_per_job
        free = [one.job.index for one, _ in reversed(members) if self._moved.get(one.job.index, 0) < most]
        table = self.table_of(last.job, working)
        here = [candidate.hardware_class for candidate in table.candidates].index(last.queue)
        return Group(table, self.needs_of(last.job, now), here, ahead, tuple(map(str, free)))


MEMORY = 256
"""Approximate number of jobs that the mean covers."""


class ExpectedBatch:
    """Mean figures of each model's jobs, by class; infinite if it cannot run."""

    def __init__(self) -> None:
        self._means: dict[int, Figures] = {}

    def observe(self, job: SimulatedJob) -> None:
        """Include a job in the means."""
        new = np.array([job.alone, job.crowding])
        mean = self._means.setdefault(job.model, new)
        able, seen = np.isfinite(new), np.isfinite(mean)
        both = able & seen
        mean[both] += (new[both] - mean[both]) / MEMORY
        mean[able & ~seen] = new[able & ~seen]  # another service's jobs may run there

    def typical(self, model: int) -> Figures:
        """Seconds of the typical job by itself, and those that it adds to its batch; shape (2, classes).

        Requires at least one job of the model.
        """
        return self._means[model]
