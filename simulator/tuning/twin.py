"""The fleet's twin: a window of arrivals, played under an assignment in a simulation of the fleet as it is now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np

from router.decide.scaling_rule import TARGET, Density
from simulator.device import Device
from simulator.engine import Engine
from simulator.fleet import SERVICES, Fleet
from simulator.policies.fixed import Assignment, Cell, Fixed
from simulator.timing import Timing
from simulator.traces.trace import Column
from simulator.traces.workload import Job, Workload, jobs

LIFE = 600.0
"""Seconds over which the starts that a plan needs are spread: plans are expected to last about that long."""

FLOOR = 0.9
"""Share of each model's live requests to answer in time; what is missing of it costs as much as a service's penalty.

Without it a cheap plan starves the model that needs most devices."""

SLOWER = 1.1
"""A class whose work takes this many times its profile's seconds, or more, is modelled as slow."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """The fleet as it is: for each class the devices that are on, those that may be, and its pace."""

    powered: tuple[int, ...]
    available: tuple[int, ...]
    pace: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Arrivals of `span` seconds, the first at 0, with the jobs that policies see."""

    workload: Workload
    jobs: Sequence[Job]
    span: float

    @classmethod
    def of(cls, workload: Workload, begin: float, end: float) -> Window:
        """The arrivals from `begin` to `end`."""
        arrival = workload.trace.arrival
        rows = slice(int(np.searchsorted(arrival, begin)), int(np.searchsorted(arrival, end)))
        part = workload.trace.part(rows)
        shifted = replace(part, arrival=part.arrival - begin)
        return cls.all(replace(workload, trace=shifted, level=workload.level[rows]), end - begin)

    @classmethod
    def all(cls, workload: Workload, span: float) -> Window:
        """All arrivals of a workload."""
        return cls(workload, list(jobs(workload, clairvoyant=False)), span)

    @property
    def cells(self) -> set[Cell]:
        """The cells that have requests."""
        trace = self.workload.trace
        return set(zip(trace.model.tolist(), trace.service.tolist(), strict=True))


class Played(NamedTuple):
    """What an assignment costs: `score` is US dollars an hour with penalties; `timely` is by request, shape (n,)."""

    score: float
    timely: Column


class Twin:
    """Plays assignments of one window under one set of conditions."""

    def __init__(self, fleet: Fleet, window: Window, now: Conditions) -> None:
        self.window = window
        self.conditions = now
        self.fleet = replace(fleet, timings=_slowed(fleet, now.pace), events=())
        self.plays = 0
        self._work = _work_by_cell(window)
        self._shares = _Shares.of(window.workload)

    def devices(self, assignment: Assignment) -> list[int]:
        """Devices that each class needs for the window's load."""
        used = [0.0] * len(self.fleet.classes)
        for cell, place in assignment.classes.items():
            if cell in self._work:
                used[place] += self._work[cell][place] * self.conditions.pace[place]
        needed = []
        for place, (device, rule) in enumerate(zip(self.fleet.classes.values(), assignment.rules, strict=True)):
            target = rule.target if isinstance(rule, Density) else TARGET
            count = math.ceil(used[place] / self.window.span / target)
            needed.append(min(device.count, self.conditions.available[place], max(device.minimum, count)))
        return needed

    def play(self, assignment: Assignment) -> Played:
        """Play the window from the devices that the assignment needs."""
        self.plays += 1
        devices = self.devices(assignment)
        classes = {
            name: msgspec.structs.replace(device, initial=count, failures_per_hour=0.0, reclaims_per_hour=0.0)
            for (name, device), count in zip(self.fleet.classes.items(), devices, strict=True)
        }
        workload = replace(self.window.workload, fleet=replace(self.fleet, classes=classes))
        replay = Replay(workload, assignment, self.conditions.available)
        cost = replay.play(self.window.jobs, self.window.span)
        timely = replay.outcome.in_time(workload)
        starts = sum(
            max(0, count - on) * device.start * device.usd_per_second
            for count, on, device in zip(devices, self.conditions.powered, classes.values(), strict=True)
        )
        per_hour = 3600 / self.window.span * cost + 3600 / LIFE * starts
        return Played(per_hour + self._shares.penalty(timely, self.fleet.penalties), timely)


class Replay(Engine):
    """An engine that begins with the devices that are needed, and counts the cost up to the window's end."""

    def __init__(self, workload: Workload, assignment: Assignment, available: Sequence[int]) -> None:
        super().__init__(workload, Fixed(assignment), seed=0)
        self._cost: float | None = None
        for pool, count in zip(self.pools, available, strict=True):
            pool.available = min(count, pool.count)

    def play(self, waiting: Sequence[Job], span: float) -> float:
        """US dollars from the window's beginning to its end; work that is left then costs what it will use."""
        self._begin()
        self.at(span, self._end, None, 0)
        for job in waiting:
            self._process_until(job.arrival)
            self._arrive(job, job.arrival)
        while self._inside or self._cost is None:
            self._process_next()
        return self._cost

    def _end(self, device: Device | None, version: int, now: float) -> None:
        on = sum(pool.usd_per_second * pool.powered_seconds(now) for pool in self.pools)
        left = sum(pool.usd_per_second * pool.busy_seconds() for pool in self.pools)
        self._cost = on + left / TARGET


class _Shares:
    """Which requests count for which penalty."""

    def __init__(self, services: Sequence[Column], live: Sequence[Column]) -> None:
        self._services = services
        self._live = live

    @classmethod
    def of(cls, workload: Workload) -> _Shares:
        trace = workload.trace
        services = [np.flatnonzero(trace.service == number) for number in range(len(SERVICES))]
        live = [np.flatnonzero((trace.service == 0) & (trace.model == model)) for model in range(len(trace.models))]
        return cls(services, [rows for rows in live if len(rows)])

    def penalty(self, timely: Column, penalties: Sequence[float]) -> float:
        """US dollars an hour for what was missed, and for models whose live attainment is under the floor."""
        missed = [float(1 - timely[rows].mean()) if len(rows) else 0.0 for rows in self._services]
        starved = sum(max(FLOOR - float(timely[rows].mean()), 0.0) for rows in self._live)
        return sum(p * share for p, share in zip(penalties, missed, strict=True)) + penalties[0] * starved


def _work_by_cell(window: Window) -> dict[Cell, list[float]]:
    """Device seconds of each cell's jobs, by class; infinite where they cannot run."""
    work: dict[Cell, list[float]] = {}
    for job in window.jobs:
        cell = work.setdefault((job.model, job.service), [0.0] * len(job.work))
        for place, seconds in enumerate(job.work):
            cell[place] += seconds
    return work


def _slowed(fleet: Fleet, pace: Sequence[float]) -> dict[str, tuple[Timing | None, ...]]:
    return {
        model: tuple(
            timing.slower(pace[place]) if timing is not None and pace[place] > SLOWER else timing
            for place, timing in enumerate(row)
        )
        for model, row in fleet.timings.items()
    }
