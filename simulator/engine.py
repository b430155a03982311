"""The event loop: a policy places arrivals, pools serve them, and all events happen in order of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush

from simulator.device import Device
from simulator.fleet import Event
from simulator.outcome import ANSWERED, DROPPED, REFUSED, Outcome, Summary, summarise
from simulator.policies import policy as seam
from simulator.policies.policy import Held, Policy, Shift
from simulator.pool import Action, Pool
from simulator.traces.workload import Job, Workload, jobs

TICK = 1.0
"""Seconds between two evaluations of the scaling rule."""

_REPORT_EVERY = 4096

Progress = Callable[[int], None]
"""Called with the number of requests that have arrived so far."""


class Engine:
    """One run of one policy over one workload. Deterministic: the same arguments give the same outcome."""

    def __init__(self, workload: Workload, policy: Policy, *, seed: int) -> None:
        fleet, models = workload.fleet, workload.trace.models
        self.workload = workload
        self.policy = policy
        self.outcome = Outcome(len(workload))
        self.pools = [
            Pool(index, name, fleet, models, self, order=policy.order, seed=seed)
            for index, name in enumerate(fleet.classes)
        ]
        self.now = 0.0
        self._events: list[tuple[float, int, Action, Device | None, int]] = []
        self._sequence = 0
        self._inside = 0
        self._held: dict[int, Pool] = {}

    def run(self, progress: Progress = lambda arrived: None) -> Outcome:
        """Play the whole trace, until the last request has ended and all devices are off."""
        self._begin()
        for job in jobs(self.workload, clairvoyant=self.policy.clairvoyant):
            self._process_until(job.arrival)
            self._arrive(job, job.arrival)
            if job.index % _REPORT_EVERY == 0:
                progress(job.index)
        while self._inside:
            self._process_next()
        for pool in self.pools:
            pool.switch_all_off(self.now)
        progress(len(self.workload))
        return self.outcome

    def at(self, time: float, action: Action, device: Device | None, version: int) -> None:
        """As `World.at`."""
        self._sequence += 1
        heappush(self._events, (time, self._sequence, action, device, version))

    def end(self, job: Job, pool: Pool, now: float, *, answered: bool) -> None:
        """As `World.end`."""
        self._inside -= 1
        self.policy.ended(job, pool, now - job.arrival)
        self.outcome.close(job.index, ANSWERED if answered else DROPPED, now - job.arrival)

    def _begin(self) -> None:
        for pool in self.pools:
            device = pool.device_class
            for _ in range(max(device.initial, device.minimum)):
                pool.switch_on(0.0, after=0.0)
        for event in self.workload.fleet.events:
            self.at(event.at, partial(self._change, event), None, 0)
        self.at(TICK, self._tick, None, 0)
        if self.policy.beat < math.inf:
            self.at(self.policy.beat, self._look, None, 0)

    def _change(self, event: Event, device: Device | None, version: int, now: float) -> None:
        pool = next(pool for pool in self.pools if pool.name == event.hardware_class)
        if event.slower is not None:
            pool.slow_down(event.slower, now)
        elif event.available is not None:
            pool.limit(event.available, now)
        else:
            pool.reclaim(now)

    def _arrive(self, job: Job, now: float) -> None:
        chosen = self.policy.choose(job, self.pools, now)
        if chosen == seam.REFUSED:
            self.outcome.close(job.index, REFUSED, math.nan)
            return
        self._inside += 1
        if isinstance(chosen, Held):
            self._held[job.index] = self.pools[chosen.pool]
            self._held[job.index].expect(job, now)
        else:
            self.pools[chosen].enqueue(job, now)

    def _look(self, device: Device | None, version: int, now: float) -> None:
        for shift in self.policy.look(self.pools, now):
            self._shift(shift, now)
        self.at(now + self.policy.beat, self._look, None, 0)

    def _shift(self, shift: Shift, now: float) -> None:
        if shift.source is None:
            self._held.pop(shift.job.index).forget(shift.job)
        else:
            self.pools[shift.source].withdraw(shift.job)
            self.outcome.moves += 1
        if shift.target is not None:
            self.pools[shift.target].enqueue(shift.job, now)
        else:
            self._inside -= 1
            self.outcome.close(shift.job.index, REFUSED, math.nan)

    def _process_until(self, time: float) -> None:
        while self._events and self._events[0][0] <= time:
            self._process_next()
        self.now = time

    def _process_next(self) -> None:
        time, _, action, device, version = heappop(self._events)
        self.now = time
        action(device, version, time)

    def _tick(self, device: Device | None, version: int, now: float) -> None:
        for pool in self.pools:
            pool.tick(now)
        self.at(now + TICK, self._tick, None, 0)


def simulate(
    name: str, workload: Workload, policy: Policy, *, seed: int, progress: Progress = lambda arrived: None
) -> Summary:
    """The figures of `policy`, called `name`, over the workload."""
    engine = Engine(workload, policy, seed=seed)
    outcome = engine.run(progress)
    return summarise(name, workload, outcome, engine.pools)
