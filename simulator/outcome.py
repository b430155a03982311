"""The outcome of every request, and the figures that summarise them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from simulator.fleet import SERVICES
from simulator.pool import Pool
from simulator.traces.trace import Column
from simulator.traces.workload import Figures, Workload

WAITING, ANSWERED, DROPPED, REFUSED = range(4)
"""States of a request: not ended, answered (in time or late), dropped past its deadline, refused."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's figures.

    Attainment counts dropped and refused requests as missed, and is null for an unused service; `live_by_model` is that
    of live requests. `score` is the cost plus the fleet's penalties for what was missed, in US dollars; of the cost,
    `starts_usd` is for devices that started and `idle_usd` for those without work. `usd_by_class` is the cost of each
    class. Latencies are seconds of answered requests. `goodput` is answers in time per second of the trace.
    `utilisation` is busy over powered-on time.
    """

    policy: str
    requests: int
    attainment: dict[str, float | None]
    cost_usd: float
    score: float
    p50: float | None = None
    p99: float | None = None
    goodput: float | None = None
    moves: int = 0
    utilisation: dict[str, float] = {}
    live_by_model: dict[str, float] = {}
    p99_by_service: dict[str, float | None] = {}
    starts_usd: float = 0.0
    idle_usd: float = 0.0
    refused: int = 0
    usd_by_class: dict[str, float] = {}


class Outcome:
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


def summarise(policy: str, workload: Workload, outcome: Outcome, pools: Sequence[Pool]) -> Summary:
    """The figures of a finished run, with all devices off."""
    trace = workload.trace
    timely, live = outcome.in_time(workload), trace.service == SERVICES.index("live")
    shares = {name: _mean(timely[trace.service == number]) for number, name in enumerate(SERVICES)}
    by_model = {name: _mean(timely[live & (trace.model == number)]) for number, name in enumerate(trace.models)}
    answered = outcome.state == ANSWERED
    powered = {pool.name: sum(device.powered for device in pool.devices) for pool in pools}
    busy = {pool.name: sum(device.busy for device in pool.devices) for pool in pools}
    paid = {pool.name: powered[pool.name] * pool.usd_per_second for pool in pools}
    cost = sum(paid.values())
    starts = sum(pool.started * pool.start * pool.usd_per_second for pool in pools)
    used = sum(busy[pool.name] * pool.usd_per_second for pool in pools)
    return Summary(
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


def fines(workload: Workload) -> Figures:
    """US dollars for one missed request of each service; shape (services,)."""
    trace = workload.trace
    asked = np.bincount(trace.service, minlength=len(SERVICES))
    each: Figures = np.array(workload.fleet.penalties) * float(trace.arrival[-1]) / 3600 / np.maximum(asked, 1)
    return each


def _mean(chosen: Column) -> float | None:
    return float(chosen.mean()) if len(chosen) else None


def _quantile(values: Column, share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None
