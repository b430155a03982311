"""The outcome of every request, and the figures that summarise them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from simulator.fleet import SERVICES
from simulator.pool import Pool
from simulator.traces.trace import Column
from simulator.traces.workload import Workload

WAITING, ANSWERED, DROPPED, REFUSED = range(4)
"""States of a request: not ended, answered (in time or late), dropped past its deadline, refused."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's figures.

    Attainment counts dropped and refused requests as missed, and is null for an unused service. Latencies are seconds
    of answered requests. `goodput` is answers in time per second of the trace. `utilisation` is busy over powered-on
    time.
    """

    policy: str
    requests: int
    attainment: dict[str, float | None]
    cost_usd: float
    p50: float | None
    p99: float | None
    goodput: float | None
    moves: int
    utilisation: dict[str, float]


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
    timely = outcome.in_time(workload)
    service = workload.trace.service
    shares = {name: _mean(timely[service == number]) for number, name in enumerate(SERVICES)}
    answered = outcome.latency[outcome.state == ANSWERED]
    powered = {pool.name: sum(device.powered for device in pool.devices) for pool in pools}
    busy = {pool.name: sum(device.busy for device in pool.devices) for pool in pools}
    return Summary(
        policy=policy,
        requests=len(workload),
        attainment=shares,
        cost_usd=sum(powered[pool.name] * pool.usd_per_second for pool in pools),
        p50=float(np.quantile(answered, 0.5)) if len(answered) else None,
        p99=float(np.quantile(answered, 0.99)) if len(answered) else None,
        goodput=int(timely.sum()) / max(float(workload.trace.arrival[-1]), 1e-9),
        moves=outcome.moves,
        utilisation={name: busy[name] / powered[name] if powered[name] else 0.0 for name in powered},
    )


def _mean(chosen: Column) -> float | None:
    return float(chosen.mean()) if len(chosen) else None
