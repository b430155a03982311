"""The measurements of one running contestant: idle, saturated, and at half of its throughput."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness.measure import cpu_seconds, percentile
from benchmarks.suite.callers import Caller
from benchmarks.suite.load import arriving, one_by_one, saturated
from benchmarks.suite.workloads import Workload

LEAST = 5
"""Least number of idle requests."""

TIMEOUT = 90.0
"""Longest visit in seconds, in addition to ten times its loops: a slow contestant's answers are awaited."""

WARM_UP = 0.2
"""Seconds of warm-up with a batch's worth of outstanding requests, after each was answered once."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A visit's results: items per second, the requests' latencies, and processor seconds per item by process."""

    rate: float
    idle: list[float]
    half: list[float]
    cpu: Mapping[str, float]

    def measures(self) -> dict[str, tuple[str, float]]:
        """Each measure's unit and figure by its name."""
        times = {f"{name} p{share}": 1000 * percentile(taken, share) for name, taken, share in self._asked()}
        return {
            "saturated": ("items/s", self.rate),
            **{name: ("ms", taken) for name, taken in times.items()},
            **{f"cpu {role}": ("µs/item", 1e6 * seconds) for role, seconds in self.cpu.items()},
        }

    def _asked(self) -> list[tuple[str, list[float], int]]:
        loops = {"idle": self.idle, "half load": self.half}
        return [(name, taken, share) for (name, taken), share in itertools.product(loops.items(), (50, 99)) if taken]


async def visit(
    caller: Caller, processes: Mapping[str, list[int]], workload: Workload, *, seconds: float, seed: int
) -> Figures:
    """Measure a running contestant.

    Raises:
        UnreliableError: too many requests failed.
        TimeoutError: it took many times the expected time.
    """
    spent = seconds
    async with asyncio.timeout(TIMEOUT + 10 * spent), caller:
        await saturated(caller.ask, outstanding=workload.max_batch, seconds=WARM_UP, mark=lambda: None)
        idle = await one_by_one(caller.alone, seconds=spent / 2, least=LEAST)
        gc.collect()
        gc.freeze()
        clocks: list[dict[str, float]] = []
        requests, window = await saturated(
            caller.ask, outstanding=workload.outstanding, seconds=spent, mark=lambda: clocks.append(_clocks(processes))
        )
        items = window.items(requests)
        rate = items / window.seconds
        items_each = sum(r.items for r in requests) / len(requests)
        half = await arriving(caller.ask, rate=rate / items_each / 2, seconds=spent, seed=seed)
    cpu = {name: (clocks[1][name] - clocks[0][name]) / items for name in clocks[0]}
    return Figures(rate, [r.seconds for r in idle], [r.seconds for r in half], cpu)


def _clocks(processes: Mapping[str, list[int]]) -> dict[str, float]:
    return {"client": time.process_time(), **{name: sum(map(cpu_seconds, pids)) for name, pids in processes.items()}}
