"""One class of the twin under some cells' requests. Under an assignment classes do not affect each other.

So a play of an assignment replays only classes that have other requests, or another rule, than in the plays before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from router.decide.plan import ScalingRule
from simulator.engine import SAMPLE_EVERY, EventQueue
from simulator.fleet import SERVICES
from simulator.pool import UNLIMITED, Pool
from simulator.traces import Column
from simulator.workload import SimulatedJob, Workload
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


@dataclass(frozen=True, slots=True)
class ClassTerms:
    """How a class begins a replay: its state, but with these `devices`; its rule, and its longest pause."""

    place: int
    state: ClassState
    devices: int
    rule: ScalingRule
    pause: float


class ClassFigures(NamedTuple):
    """What a class has `spent` by some time, what its unfinished work will cost, and what was late, by service."""

    spent: float
    left: float
    late: Column


class ClassReplay(EventQueue):
    """A class that is played piece by piece."""

    def __init__(self, workload: Workload, terms: ClassTerms, arrivals: Sequence[SimulatedJob]) -> None:
        super().__init__()
        fleet, models = workload.fleet, workload.trace.models
        name = list(fleet.classes)[terms.place]
        self.pool = Pool(terms.place, name, fleet, models, self, order="level", yields=True, seed=0)
        self.pool.available = min(terms.state.available, self.pool.count)
        loaded = [device.loaded for device in terms.state.devices]
        for number in range(min(terms.devices, self.pool.available)):
            self.pool.switch_on(0.0, after=0.0, loaded=loaded[number] if number < len(loaded) else ())
        if terms.state.rates is not None:
            self.pool.rates = terms.state.rates
        self.pool.follow(terms.rule, terms.devices, terms.pause)
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
