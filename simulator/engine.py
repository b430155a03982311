"""The event loop: a policy places arrivals, pools serve them, and all events happen in order of time.

Also the outcome of every request, and the figures that summarise them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain

import msgspec
import numpy as np

from simulator.device import SimulatedDevice
from simulator.fleet import SERVICES
from simulator.policies import policy as policies
from simulator.policies.policy import Held, Policy, Shift
from simulator.pool import Action, Pool
from simulator.traces import Column
from simulator.workload import SimulatedJob, Workload, jobs

SAMPLE_EVERY = 1.0
"""Seconds between two evaluations of the scaling rule."""

MOST_AT_ONCE = 100_000
"""Events at one instant, after which the simulation counts as stuck; devices and jobs have some of them each."""

_REPORT_EVERY = 4096

Progress = Callable[[int], None]
"""Called with the number of requests that have arrived so far."""


class StuckError(Exception):
    """The simulated time does not advance: an event schedules itself for the same instant, again and again."""


class EventQueue:
    """What happens next, in order of time; events of the same instant in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action, SimulatedDevice | None, int]] = []
        self._sequence = self._at_once = 0

    def at(self, time: float, action: Action, device: SimulatedDevice | None, version: int) -> None:
        """As `World.at`."""
        self._sequence += 1
        heappush(self._events, (time, self._sequence, action, device, version))

    def process_until(self, time: float) -> None:
        """Let everything happen up to a time."""
        while self._events and self._events[0][0] <= time:
            self.process_next()
        self.now = time

    def process_next(self) -> None:
        """Let the next event happen. Raises `StuckError` if there are too many at one instant."""
        time, _, action, device, version = heappop(self._events)
        self._at_once = self._at_once + 1 if time == self.now else 0
        if self._at_once > MOST_AT_ONCE:
            what = getattr(action, "__qualname__", repr(action))
            raise StuckError(f"the simulation does not advance: {MOST_AT_ONCE} events at {time:g} s, the last {what}")
        self.now = time
        action(device, version, time)


class Simulation(EventQueue):
    """One run of one policy over one workload. Deterministic: the same arguments give the same outcome."""

    pool_type: type[Pool] = Pool

    def __init__(self, workload: Workload, policy: Policy, *, seed: int) -> None:
        super().__init__()
        fleet, models = workload.fleet, workload.trace.models
        self.workload = workload
        self.policy = policy
        self.outcome = OutcomeColumns(len(workload))
        self.pools = [
            self.pool_type(index, name, fleet, models, self, yields=policy.yields, seed=seed, queue=policy.queue)
            for index, name in enumerate(fleet.classes)
        ]
        self._inside = 0
        self._held: dict[int, Pool] = {}

    def run(self, progress: Progress = lambda arrived: None) -> OutcomeColumns:
        """Play the whole trace, until the last request has ended and all devices are off."""
        self._begin()
        for job in jobs(self.workload):
            self.process_until(job.arrival)
            self._arrive(job, job.arrival)
            if job.index % _REPORT_EVERY == 0:
                progress(job.index)
        self.finish()
        for device in chain.from_iterable(pool.devices for pool in self.pools):
            if device.on_since is not None:
                device.switch_off(self.now)
        progress(len(self.workload))
        return self.outcome

    def finish(self) -> None:
        """Play until the last job has ended."""
        while self._inside:
            self.process_next()

    def end(self, job: SimulatedJob, pool: Pool, now: float, *, answered: bool) -> None:
        """As `World.end`."""
        self._inside -= 1
        self.policy.ended(job, pool, now - job.arrival)
        self.outcome.close(job.index, ANSWERED if answered else DROPPED, now - job.arrival)

    def _begin(self) -> None:
        for pool in self.pools:
            device = pool.device_class
            for _ in range(min(max(device.initial, device.minimum), pool.available)):
                pool.switch_on(0.0, after=0.0)
        self.at(SAMPLE_EVERY, self._tick, None, 0)
        if self.policy.beat < math.inf:
            self.at(self.policy.beat, self._look, None, 0)

    def _arrive(self, job: SimulatedJob, now: float) -> None:
        chosen = self.policy.choose(job, self.pools, now)
        if chosen == policies.REFUSED_JOB:
            self.outcome.close(job.index, REFUSED, math.nan)
            return
        self._inside += 1
        if isinstance(chosen, Held):
            self._held[job.index] = self.pools[chosen.pool]
            self._held[job.index].expect(job, now)
        else:
            self.pools[chosen].enqueue(job, now)

    def _look(self, device: SimulatedDevice | None, version: int, now: float) -> None:
        for shift in self.policy.look(self.pools, now):
            self._shift(shift, now)
        self.at(now + self.policy.beat, self._look, None, 0)

    def _shift(self, shift: Shift, now: float) -> None:
        if shift.source is None:
            self._held.pop(shift.job.index).forget(shift.job)
        else:
            self.pools[shift.source].remove(shift.job)
            self.outcome.moves += 1
        if shift.target is not None:
            self.pools[shift.target].enqueue(shift.job, now)
        else:
            self._inside -= 1
            self.outcome.close(shift.job.index, REFUSED, math.nan)

    def _tick(self, device: SimulatedDevice | None, version: int, now: float) -> None:
        for pool in self.pools:
            pool.tick(now)
        self.at(now + SAMPLE_EVERY, self._tick, None, 0)


def played(
    name: str, workload: Workload, policy: Policy, *, seed: int, progress: Progress = lambda arrived: None
) -> tuple[RunSummary, OutcomeColumns]:
    """The figures of `policy`, called `name`, over the workload, and how each request ended."""
    engine = Simulation(workload, policy, seed=seed)
    outcome = engine.run(progress)
    return summarise(name, workload, outcome, engine.pools), outcome


WAITING, ANSWERED, DROPPED, REFUSED = range(4)
"""States of a request: not ended, answered (in time or late), dropped past its deadline, refused."""


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's figures. Latencies are seconds of answered requests."""

    policy: str
    requests: int
    attainment: dict[str, float | None]
    """Share in time by service, dropped and refused requests counted as missed; null for an unused service."""
    cost_usd: float
    score: float
    """The cost plus the fleet's penalties for what was missed, in US dollars."""
    p50: float | None = None
    p99: float | None = None
    goodput: float | None = None
    """Answers in time per second of the trace."""
    moves: int = 0
    utilisation: dict[str, float] = {}
    """Busy over powered-on time, by class."""
    live_by_model: dict[str, float] = {}
    """`attainment` of live requests."""
    p99_by_service: dict[str, float | None] = {}
    # Parts of the cost: for devices that started, and for those without work
    starts_usd: float = 0.0
    idle_usd: float = 0.0
    refused: int = 0
    usd_by_class: dict[str, float] = {}
    """Cost of each class."""


class OutcomeColumns:
    """A column of states and one of latencies, written while the simulation runs; 5 bytes per request.

    `moves` counts how often a job moved from one class's queue to another's.
    """

    def __init__(self, count: int) -> None:
        self.state = np.zeros(count, np.int8)
        self.latency = np.full(count, np.nan, np.float32)
        self.moves = 0

    def close(self, index: int, state: int, latency: float) -> None:
        """Request `index` has ended."""
        assert self.state[index] == WAITING, "a request ends once"
        self.state[index] = state
        self.latency[index] = latency

    def in_time(self, workload: Workload) -> Column:
        """Which requests were answered by their deadline; shape (n,)."""
        met: Column = (self.state == ANSWERED) & (self.latency <= workload.trace.deadline * (1 + 1e-6))
        return met


def summarise(policy: str, workload: Workload, outcome: OutcomeColumns, pools: Sequence[Pool]) -> RunSummary:
    """The figures of a finished run, with all devices off."""
    trace = workload.trace
    timely, live = outcome.in_time(workload), trace.service == SERVICES.index("live")
    shares = {name: _mean(timely[trace.service == number]) for number, name in enumerate(SERVICES)}
    by_model = {name: _mean(timely[live & (trace.model == number)]) for number, name in enumerate(trace.models)}
    answered = outcome.state == ANSWERED
    powered = {pool.name: sum(device.powered for device in pool.devices) for pool in pools}
    busy = {pool.name: sum(device.busy for device in pool.devices) for pool in pools}
    paid = {pool.name: pool.dollars(lambda device: device.powered) + pool.metered for pool in pools}
    cost = sum(paid.values())
    starts = sum(pool.started * pool.start * pool.usd_per_second for pool in pools)
    used = sum(pool.dollars(lambda device: device.busy) + pool.metered for pool in pools)
    return RunSummary(
        policy=policy,
        requests=len(workload),
        attainment=shares,
        cost_usd=cost,
        score=cost + penalty(workload, shares),
        p50=_quantile(outcome.latency[answered], 0.5),
        p99=_quantile(outcome.latency[answered], 0.99),
        goodput=int(timely.sum()) / max(float(trace.arrival[-1]), 1e-9),
        moves=outcome.moves,
        utilisation={name: busy[name] / powered[name] if powered[name] else 0.0 for name in powered},
        live_by_model={name: share for name, share in by_model.items() if share is not None},
        p99_by_service={
            name: _quantile(outcome.latency[answered & (trace.service == number)], 0.99)
            for number, name in enumerate(SERVICES)
        },
        starts_usd=starts,
        idle_usd=cost - starts - used,
        refused=int((outcome.state == REFUSED).sum()),
        usd_by_class=paid,
    )


def penalty(workload: Workload, attainment: Mapping[str, float | None]) -> float:
    """US dollars for the shares of each service's requests that were missed, over the trace's length."""
    hours = float(workload.trace.arrival[-1]) / 3600
    missed = [1.0 - share if (share := attainment[name]) is not None else 0.0 for name in SERVICES]
    return hours * sum(dollars * share for dollars, share in zip(workload.fleet.penalties, missed, strict=True))


def _mean(chosen: Column) -> float | None:
    return float(chosen.mean()) if len(chosen) else None


def _quantile(values: Column, share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None
