"""The fleet's twin: a window of arrivals, played under an assignment in a simulation of the fleet as it is now.

Under an assignment classes do not affect each other. So a play of an assignment replays only classes that have other
requests, or another rule, than in the plays before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from router.decide.candidates import SHARED_ROWS
from router.decide.plan import STALE, TARGET, Density, ScalingRule
from simulator.engine import SAMPLE_EVERY, EventQueue
from simulator.fleet import SERVICES, Fleet
from simulator.policies.policy import LIVE, Assignment, Cell
from simulator.pool import UNLIMITED, Pool
from simulator.traces import Column
from simulator.tuning.recall import BLOCK, Alike
from simulator.workload import SimulatedJob, Workload, jobs
from workers.decide.endpoints import EndpointRates

CHECKS = (0.25, 0.5, 0.75, 1.0)
"""Shares of a window at which a play is compared with the best one so far; the last is its end."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device that is on: the seconds until it serves, and the models that it has loaded, by number."""

    starts_in: float = 0.0
    loaded: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ClassState:
    """A class now: its devices that are on, those that serve first, and how many may be on.

    `rates` are what its endpoint allows, on a clock that is 0 now; None if all that queues.yaml says.
    """

    devices: tuple[DeviceState, ...]
    available: int
    rates: EndpointRates | None = None

    @classmethod
    def of(cls, pool: Pool, now: float) -> ClassState:
        """The state of a simulated class."""
        on = [
            DeviceState(0.0 if device.serving else since + pool.start - now, frozenset(device.resident))
            for device in pool.devices
            if (since := device.on_since) is not None
        ]
        rates = None if pool.rates is UNLIMITED else pool.rates.since(now)
        return cls(tuple(sorted(on, key=lambda one: one.starts_in)), pool.available, rates)

    def starting(self, devices: int, start: float) -> float:
        """Seconds of devices that are on without serving until so many serve."""
        left = [device.starts_in for device in self.devices[:devices]]
        return sum(left) + max(devices - len(left), 0) * start


class ClassFigures(NamedTuple):
    """What a class has `spent` by some time, what its unfinished work will cost, and what was late, by service."""

    spent: float
    left: float
    late: Column


class ClassReplay(EventQueue):
    """A class that is played piece by piece: from its state, but with so many `devices`, by a rule and a pause."""

    def __init__(
        self,
        workload: Workload,
        place: int,
        state: ClassState,
        devices: int,
        rule: ScalingRule,
        pause: float,
        arrivals: Sequence[SimulatedJob],
    ) -> None:
        super().__init__()
        fleet, models = workload.fleet, workload.trace.models
        self.pool = Pool(place, list(fleet.classes)[place], fleet, models, self, yields=True, seed=0)
        self.pool.available = min(state.available, self.pool.count)
        loaded = [device.loaded for device in state.devices]
        for number in range(min(devices, self.pool.available)):
            self.pool.switch_on(0.0, after=0.0, loaded=loaded[number] if number < len(loaded) else ())
        if state.rates is not None:
            self.pool.rates = state.rates
        self.pool.follow(rule, devices, pause)
        self.latency = np.full(len(workload), math.inf, np.float32)
        self.arrived = 0
        self._arrivals = arrivals
        self._inside = 0
        self.at(SAMPLE_EVERY, self._tick, None, 0)

    def end(self, job: SimulatedJob, pool: Pool, now: float, *, answered: bool) -> None:
        """As `World.end`."""
        self._inside -= 1
        if answered:
            self.latency[job.index] = now - job.arrival

    def play(self, until: float) -> None:
        """Play up to a time."""
        while self.arrived < len(self._arrivals) and self._arrivals[self.arrived].arrival <= until:
            job = self._arrivals[self.arrived]
            self.arrived += 1
            self.process_until(job.arrival)
            self._inside += 1
            job.written, job.cuts = 0.0, 0  # other plays had it too
            self.pool.enqueue(job, job.arrival)
        self.process_until(until)

    def finish(self) -> None:
        """Play until the last job has ended, unless no device may be on."""
        while self._inside and self.pool.available:
            self.process_next()

    def _tick(self, device: object, version: int, now: float) -> None:
        self.pool.tick(now)
        self.at(now + SAMPLE_EVERY, self._tick, None, 0)


class ClassPlay:
    """The figures of a class at each of `CHECKS`, as far as they were asked for.

    `rows` are its requests, and `timely` says of each whether it was in time, `powered` how many devices were on, both
    once its end was played. `effort` is what was played: requests, and seconds in which the class looks at its size.
    """

    def __init__(self, workload: Workload, span: float, rows: Column, begin: Callable[[], ClassReplay]) -> None:
        trace = workload.trace
        self._span, self._begin = span, begin
        self.rows = rows
        self._allowed = trace.deadline[rows] * (1 + 1e-6)
        self._due = trace.arrival[rows] + trace.deadline[rows]
        self._service = trace.service[rows]
        self._replay: ClassReplay | None = None
        self._figures: list[ClassFigures] = []
        self.timely: Column = np.zeros(len(rows), bool)
        self.powered = 0

    def at(self, number: int) -> ClassFigures:
        """Its figures at this of `CHECKS`. They are asked for in order."""
        if number == len(self._figures):
            self._replay = self._replay or self._begin()
            self._replay.play(CHECKS[number] * self._span)
            self._figures.append(self._now(self._replay))
            if number == len(CHECKS) - 1:
                self._end(self._replay)
        return self._figures[number]

    def rest(self) -> int:
        """Forget the state: the jobs are needed for other plays. Returns how many arrivals were played."""
        replay, self._replay = self._replay, None
        return replay.arrived if replay is not None else 0

    def _now(self, replay: ClassReplay) -> ClassFigures:
        pool, now, latency = replay.pool, replay.now, replay.latency[self.rows]
        late = (latency > self._allowed) & ((latency < math.inf) | (self._due < now))
        left = pool.usd_per_second * pool.busy_seconds()
        return ClassFigures(pool.spent(now), left, np.bincount(self._service[late], minlength=len(SERVICES)))

    def _end(self, replay: ClassReplay) -> None:
        self.powered = replay.pool.powered
        replay.finish()
        self.timely = replay.latency[self.rows] <= self._allowed


LIFE = 600.0
"""Seconds over which the starts that a plan needs are spread: plans are expected to last about that long."""

RETURNS = 0.25
"""The chance with which a pause is priced that the load comes back, when it has lasted as long as none before."""

MOST_ARRIVALS = 9000
"""Arrivals in a window: a play takes about 25 µs for each of them. At higher rates windows are sampled."""

PIECES, PIECE = 6, 30.0
"""Pieces of a window that is sampled at least, spread evenly; more of so many seconds where there are more."""

FLOOR, WEIGHT, FEW = 0.95, 1.0, 5
"""Share of each model's live requests to answer in time, and what is missing of it costs, in penalties of the service.

Without it a cheap plan starves the model that needs most devices. It is above what shall be attained, because bursts
that no window has seen are late too. So many requests more count as in time: of a model with few, chance decides."""


TwinConditions = Sequence[ClassState]
"""The fleet as it is, by class."""


def usual(fleet: Fleet, powered: Sequence[int]) -> TwinConditions:
    """The fleet with so many devices of each class; all devices of the fleet may be on."""
    both = zip(powered, fleet.classes.values(), strict=True)
    return tuple(ClassState((DeviceState(),) * on, device.count) for on, device in both)


@dataclass(frozen=True, slots=True)
class Window:
    """Arrivals of `span` seconds from 0 on, with the jobs that policies see; the first `waiting` ones wait at 0."""

    workload: Workload
    jobs: Sequence[SimulatedJob]
    span: float
    waiting: int = 0

    @classmethod
    def of(cls, workload: Workload, begin: float, end: float) -> Window:
        """The arrivals from `begin` to `end`."""
        arrival = workload.trace.arrival
        rows = slice(int(np.searchsorted(arrival, begin)), int(np.searchsorted(arrival, end)))
        return cls.all(workload.part(rows, arrival=arrival[rows] - begin), end - begin)

    @classmethod
    def latest(cls, workload: Workload, now: float, span: float, most: int = MOST_ARRIVALS) -> Window:
        """The arrivals of the last `span` seconds before `now`.

        More than `most` are sampled: pieces of equal length, spread evenly and the last one until `now`, follow each
        other. All arrivals of a piece are kept, because devices are needed for as many as come at once.
        """
        arrival = workload.trace.arrival
        begin = max(now - span, 0.0)
        rows = np.arange(int(np.searchsorted(arrival, begin)), int(np.searchsorted(arrival, now)))
        if len(rows) <= most:
            return cls.of(workload, begin, now)
        kept = (now - begin) * most / len(rows)
        pieces = max(PIECES, int(kept / PIECE))
        each, apart = kept / pieces, (now - begin) / pieces
        since = arrival[rows] - begin
        piece = np.minimum(since // apart, pieces - 1)
        inside = since - (piece + 1) * apart + each
        chosen = inside >= 0
        return cls.all(_rearranged(workload, rows[chosen], (piece * each + inside)[chosen]), kept)

    @classmethod
    def likely(cls, workload: Workload, now: float, span: float, alike: Alike | None) -> Window:
        """As `latest`; where an earlier time was more like now, its arrivals, followed by those since it is."""
        if alike is None:
            return cls.latest(workload, now, span)
        arrival = workload.trace.arrival
        begin, recent = alike.begin, now - alike.recent
        earlier = np.arange(*np.searchsorted(arrival, (begin, begin + span)))
        latest = np.arange(*np.searchsorted(arrival, (recent, now)))
        moved = np.concatenate([arrival[earlier] - begin, arrival[latest] - recent + span])
        whole = span + now - recent
        return cls.latest(_rearranged(workload, np.concatenate([earlier, latest]), moved), whole, whole)

    def behind(self, workload: Workload, waiting: Column, now: float) -> Window:
        """These arrivals after those of a workload that wait `now`, due when they are due."""
        trace = workload.trace.part(waiting)
        left = np.maximum(trace.arrival + trace.deadline - now, 0.0)
        return self._after(workload.part(waiting, arrival=0.0 * left, deadline=left))

    def _after(self, waiting: Workload) -> Window:
        if not len(waiting):
            return self
        return replace(Window.all(waiting.merged(self.workload), self.span), waiting=len(waiting))

    def redrawn(self, seed: int) -> Window:
        """Other arrivals of the same kind: for each model, blocks of seconds drawn from its own with replacement.

        They last as long as these. The same jobs wait.
        """
        return self._drawn(seed, 0.0)._after(self.workload.part(slice(self.waiting)))

    def _drawn(self, seed: int, span: float) -> Window:
        trace, random = self.workload.trace, np.random.default_rng(seed)
        count = max(int(self.span / BLOCK), 1)
        length = self.span / count
        places = max(count, math.ceil(span / length))
        block = np.minimum(trace.arrival // length, count - 1).astype(int)
        rows, arrivals = list[Column](), list[Column]()
        for model in range(len(trace.models)):
            mine = self.waiting + np.flatnonzero(trace.model[self.waiting :] == model)
            for place, drawn in enumerate(random.integers(count, size=places)):
                chosen = mine[block[mine] == drawn]
                rows.append(chosen)
                arrivals.append(trace.arrival[chosen] + (place - drawn) * length)
        return self.all(_rearranged(self.workload, np.concatenate(rows), np.concatenate(arrivals)), places * length)

    def extended(self, seed: int, span: float) -> Window:
        """These arrivals, followed by others of the same kind if they do not last for `span` seconds."""
        if self.span >= span:
            return self
        more = self._drawn(seed, span - self.span)
        later = more.workload.part(slice(None), arrival=more.workload.trace.arrival + self.span)
        whole = Window.all(self.workload.merged(later), self.span + more.span)
        return replace(whole, waiting=self.waiting)

    @classmethod
    def all(cls, workload: Workload, span: float) -> Window:
        """All arrivals of a workload."""
        return cls(workload, list(jobs(workload)), span)


def _rearranged(workload: Workload, rows: Column, arrival: Column) -> Workload:
    """These of a workload's requests, in order of their new times of arrival."""
    order = np.argsort(arrival, kind="stable")
    return workload.part(rows[order], arrival=arrival[order])


HOPELESS, PREPARES = 1.1, 0.025
"""A play ends early if its cost and penalties by then are `HOPELESS` times those of the assignment to improve.

It goes on while they exceed those by less than `PREPARES` of the whole window's: before a burst, the devices that it
needs only cost. A tenth of the whole window's kept so many plans that steady cost 3.65 US dollars instead of 3.12,
means of three seeds."""


class Played(NamedTuple):
    """What an assignment costs: `score` is US dollars an hour with penalties; `timely` is by request, shape (n,).

    `partial` are cost and penalties in US dollars by each of `CHECKS` but the end, and `powered` the devices of each
    class that are on at the window's end. A play that ended early has an infinite score.
    """

    score: float
    timely: Column
    partial: Sequence[float] = ()
    powered: tuple[int, ...] = ()


class Twin:
    """Plays assignments of one window under one set of conditions.

    `rows` are each cell's requests. `work` is their device seconds by class; `expected` the same by the jobs' figures,
    on which classes scale. `plays` is what was played, in plays of all classes.
    """

    def __init__(self, window: Window, now: TwinConditions) -> None:
        self.window = window
        self.conditions = now
        fleet = window.workload.fleet
        lasting = {
            name: msgspec.structs.replace(device, failures_per_hour=0.0, reclaims_per_hour=0.0)
            for name, device in fleet.classes.items()
        }
        self.fleet = replace(fleet, classes=lasting)
        self.plays = 0.0
        trace, cells = window.workload.trace, dict.fromkeys((job.model, job.service) for job in window.jobs)
        self.rows = {cell: np.flatnonzero((trace.model == cell[0]) & (trace.service == cell[1])) for cell in cells}
        """Each cell's requests, in order of arrival."""
        self.work, self.expected = _work_by_cell(window, self.rows)
        self._workload = replace(window.workload, fleet=self.fleet)
        self._counts = np.bincount(trace.service, minlength=len(SERVICES))
        self._bursts = Bursts(window)
        self._played: dict[object, ClassPlay] = {}

    def devices(self, assignment: Assignment) -> list[int]:
        """Devices that each class needs for the window's load."""
        return [
            self._needed(place, self._cells(assignment, place), rule) for place, rule in enumerate(assignment.rules)
        ]

    def pauses(self, assignment: Assignment, devices: Sequence[int]) -> list[float]:
        """For how many seconds without a job each class keeps its devices."""
        return [self._pause(place, self._cells(assignment, place), count) for place, count in enumerate(devices)]

    def play(self, assignment: Assignment, best: Played | None = None, hopeless: float = HOPELESS) -> Played:
        """Play the window from the devices that the assignment needs.

        It ends early once its cost and penalties are `hopeless` times those of `best`.
        """
        classes = [self._class(assignment, place) for place in range(len(self.fleet.classes))]
        try:
            return self._play(classes, self._starts(assignment), best, hopeless)
        finally:
            self.plays += sum(played.rest() for played in classes) / max(len(self.window.jobs), 1)

    def _play(self, classes: Sequence[ClassPlay], starts: float, best: Played | None, hopeless: float) -> Played:
        span, partial = self.window.span, list[float]()
        for number in range(len(CHECKS) - 1):
            figures = [played.at(number) for played in classes]
            missed = self._penalty(np.sum([each.late for each in figures], axis=0)) * span / 3600
            partial.append(_cost(figures) + starts * span / LIFE + missed)
            if best is not None and _is_hopeless(partial[-1], best.partial[number], best.partial[-1], hopeless):
                return Played(math.inf, np.zeros(0, bool), partial)
        cost = _cost([played.at(len(CHECKS) - 1) for played in classes])
        timely = np.zeros(len(self.window.jobs), bool)
        for played in classes:
            timely[played.rows] = played.timely
        per_hour = 3600 / span * cost + 3600 / LIFE * starts
        late = np.bincount(self._workload.trace.service[~timely], minlength=len(SERVICES))
        score = per_hour + self._penalty(late) + self._starved(timely)
        return Played(score, timely, partial, tuple(played.powered for played in classes))

    def in_time(self, played: Played) -> Mapping[Cell, float]:
        """The share of each cell's requests that were in time."""
        return {cell: float(played.timely[rows].mean()) for cell, rows in self.rows.items()}

    def _cells(self, assignment: Assignment, place: int) -> tuple[Cell, ...]:
        """The cells of a class that have requests."""
        return tuple(cell for cell in self.work if assignment.classes[cell] == place)

    def _class(self, assignment: Assignment, place: int) -> ClassPlay:
        """The play of a class, which is the same for all assignments that have the same for it."""
        cells, rule = self._cells(assignment, place), assignment.rules[place]
        known = self._played.get((place, cells, rule))
        if known is None:
            devices = self._needed(place, cells, rule)
            state, pause = self.conditions[place], self._pause(place, cells, devices)
            rows = self._rows(cells)
            arrivals = [self.window.jobs[row] for row in rows]
            begin = partial(ClassReplay, self._workload, place, state, devices, rule, pause, arrivals)
            known = self._played[place, cells, rule] = ClassPlay(self._workload, self.window.span, rows, begin)
        return known

    def _needed(self, place: int, cells: Sequence[Cell], rule: ScalingRule) -> int:
        """Devices of a class that these cells' load needs."""
        device = list(self.fleet.classes.values())[place]
        used = sum((self.work[cell][place] for cell in cells), 0.0)
        count = math.ceil(used / self.window.span / (rule.target if isinstance(rule, Density) else TARGET))
        return min(device.count, self.conditions[place].available, max(device.minimum, count))

    def _pause(self, place: int, cells: Sequence[Cell], devices: int) -> float:
        """For how many seconds without a job a class keeps its devices.

        At most twice the least cost for starting them again (ski rental), and a share of what is late meanwhile.
        """
        device = list(self.fleet.classes.values())[place]
        idle = devices * device.usd_per_second
        return (
            min(device.start + RETURNS * self._bursts.late(self._rows(cells), place) / idle, STALE) if idle else STALE
        )

    def _starts(self, assignment: Assignment) -> float:
        """US dollars for devices that do not serve yet, until they do."""
        on = zip(self.devices(assignment), self.conditions, self.fleet.classes.values(), strict=True)
        return sum(state.starting(count, device.start) * device.usd_per_second for count, state, device in on)

    def _rows(self, cells: Sequence[Cell]) -> Column:
        """The requests of these cells, in order of arrival."""
        return np.sort(np.concatenate([np.zeros(0, int), *(self.rows[cell] for cell in cells)]))

    def _penalty(self, late: Column) -> float:
        """US dollars an hour for so many late requests of each service."""
        return float(late / np.maximum(self._counts, 1) @ np.array(self.fleet.penalties))

    def _starved(self, timely: Column) -> float:
        """US dollars an hour for models whose live attainment is under the floor."""
        live = [timely[rows] for (_, service), rows in self.rows.items() if service == LIVE]
        return sum(starving(int((~mine).sum()), len(mine), self.fleet.penalties) for mine in live)


def _cost(figures: Sequence[ClassFigures]) -> float:
    """US dollars so far; work that is left costs what it will use."""
    return sum(each.spent for each in figures) + sum(each.left for each in figures) / TARGET


def _is_hopeless(spent: float, best: float, whole: float, hopeless: float) -> bool:
    """Whether what was spent by then is too much beside the best play's by then, and beside its `whole`."""
    return spent > hopeless * best and spent - best > PREPARES * whole


class Bursts:
    """What a class that has no devices when its load comes back is late with.

    `dollars` is what it costs that a request is late, `spare` the seconds that it may wait, by class; shapes (n,) and
    (n, classes). `starts` are the classes' seconds of a start.
    """

    def __init__(self, window: Window) -> None:
        trace, fleet = window.workload.trace, window.workload.fleet
        counts = np.bincount(trace.service, minlength=len(SERVICES))
        self._arrival = trace.arrival
        self._dollars = (np.array(fleet.penalties) / np.maximum(counts, 1))[trace.service] * window.span / 3600
        self._spare = trace.deadline[:, None] - np.array([job.alone for job in window.jobs])
        self._starts = [device.start for device in fleet.classes.values()]

    def late(self, rows: Column, place: int) -> float:
        """US dollars for what is late, on average of the recorded bursts, if these requests find no device."""
        if not len(rows):
            return 0.0
        arrival, start = self._arrival[rows], self._starts[place]
        first = np.concatenate([[True], np.diff(arrival) > start])
        since = arrival - arrival[first][np.cumsum(first) - 1]
        return float(self._dollars[rows][self._spare[rows, place] < start - since].sum() / first.sum())


def starving(late: int, ended: int, penalties: Sequence[float]) -> float:
    """US dollars an hour for a model of whose live requests too many are late."""
    return WEIGHT * penalties[LIVE] * max(late / (ended + FEW) - (1 - FLOOR), 0.0)


Work = Mapping[Cell, Sequence[float]]
"""Device seconds of each cell's requests, by class; infinite where they cannot run."""


def _work_by_cell(window: Window, rows_by_cell: Mapping[Cell, Column]) -> tuple[Work, Work]:
    """The work of requests with the outputs that they had, in full batches; and by the jobs' figures.

    Jobs expect a high quantile of outputs, and batches that a lull has: with floors by these, language models kept
    twice the devices that they needed.
    """
    trace, fleet = window.workload.trace, window.workload.fleet
    done, expected = dict[Cell, Sequence[float]](), dict[Cell, Sequence[float]]()
    for cell, rows in rows_by_cell.items():
        expected[cell] = np.sum([window.jobs[row].work for row in rows], axis=0).tolist()
        size, output = trace.size[rows].astype(np.float64), trace.output[rows].astype(np.float64)
        timings = zip(fleet.classes.values(), fleet.timings[trace.models[cell[0]]], strict=True)
        done[cell] = [
            float(timing.answer(size, output, full := min(SHARED_ROWS, device.max_batch)).sum()) / full
            if timing is not None and expected[cell][place] < math.inf
            else math.inf
            for place, (device, timing) in enumerate(timings)
        ]
    return done, expected
