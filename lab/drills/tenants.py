"""Does one tenant's flood delay another's answers?

`python -m lab.drills.tenants` starts a router and a worker of one class, and lets two tenants send `paced` jobs
at random times, each for a third of the device's capacity. Then one of them sends ten times as much. For each service
it prints the other's p99 during the flood as a multiple of its p99 before, and the share of its jobs answered in time.
The exit status is 1 if a p99 is more than 1.5 times as long, or 1 % more jobs have no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import taxiway
from benchmarks.harness.measure import answer, percentile, say
from benchmarks.harness.processes import fleet
from taxiway.errors import DeadlineExceededError, OverloadedError

ROWS = 96
"""Rows of a job, three full batches: 25 ms of the device."""

CAPACITY = 1 / 0.0246
"""The device's capacity in jobs per second."""

QUEUES = """
hardware:
  cpu.batch: {device: cpu, runtimes: [echo], max_batch: 32, max_wait: 0.005, warm: [paced],
              price: {usd_per_hour: 0.05}}
service:
  live: {deadline: 0.25, priority: high}
  standard: {deadline: 5}
  bulk: {deadline: 3600, priority: low, preemptible: true}
default_service: standard
"""

SERVICES = ("live", "standard", "bulk")

SHARE = 1 / 3
"""Share of the device's time that a tenant requests before the flood."""

FLOOD = 10
"""Multiple of that load which the one tenant sends in the flood."""

TARGET = 1.5
"""Target: the other tenant's largest p99 in the flood, as a multiple of that before."""

MISSED = 0.01
"""Target: the largest share of its jobs that is answered before, and not in the flood."""

SEED = 7


def main() -> int:
    """Measure each service on a fleet of its own and print its line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.tenants", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the calm, and of the flood")
    parser.add_argument("--service", choices=SERVICES, action="append", help="measure only this; may be repeated")
    given = parser.parse_args()
    holds = [one_service(service, given.seconds) for service in given.service or SERVICES]
    return 0 if all(holds) else 1


def one_service(service: str, seconds: float) -> bool:
    """Measure and print; whether the target is met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "queues.yaml").write_text(QUEUES)
        with fleet(folder, folder / "queues.yaml", [["--class", "cpu.batch", "--device", "cpu:0"]]) as interfaces:
            (calm, _), (flood, used) = asyncio.run(phases(interfaces.broker, service, seconds))
    before, during = (percentile([one for one in taken if one < math.inf], 99) for taken in (calm, flood))
    calmly, answered = (sum(one < math.inf for one in taken) / len(taken) for taken in (calm, flood))
    holds = during <= TARGET * before and answered >= calmly - MISSED
    question = f"{service} work while another tenant floods: p99 to that before"
    times = {"before_ms": round(1000 * before, 1), "during_ms": round(1000 * during, 1)}
    shares = {"answered": round(answered, 4), "answered_before": round(calmly, 4), "device_used": round(used, 3)}
    say(answer(question, [during / before], target=TARGET, holds=holds, **shares, **times))
    return holds


Phase = tuple[list[float], float]
"""The other tenant's latencies in seconds, infinite without an answer, and the device time in use."""


async def phases(broker: str, service: str, seconds: float) -> tuple[Phase, Phase]:
    """Measure before the flood, then during it."""
    async with taxiway.AsyncClient(broker) as client:

        async def phase(seconds: float, load: float) -> Phase:
            done: list[float] = []
            flooding = asyncio.create_task(sent(client, service, "flooding", seconds, load, done))
            taken = await sent(client, service, "other", seconds, SHARE, done)
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
            return taken, len(done) / (CAPACITY * seconds)

        await phase(seconds / 4, SHARE)
        return await phase(seconds, SHARE), await phase(seconds, FLOOD * SHARE)


async def sent(
    client: taxiway.AsyncClient, service: str, tenant: str, seconds: float, load: float, done: list[float]
) -> list[float]:
    """Send jobs at random times for some seconds, at `load` times the device's capacity; returns their latencies.

    `done` gets those of answered jobs.
    """

    async def ask(number: int) -> float:
        began = time.perf_counter()
        with contextlib.suppress(OverloadedError, DeadlineExceededError):
            await client.infer("paced", [f"{number}"] * ROWS, service=service, tenant=tenant)
            done.append(time.perf_counter() - began)
            return done[-1]
        return math.inf

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        asked = []
        for number, moment in enumerate(arrivals(f"{tenant} {load}", seconds, load * CAPACITY)):
            await asyncio.sleep(max(moment - (time.perf_counter() - began), 0.0))
            asked.append(group.create_task(ask(number)))
    return [task.result() for task in asked]


def arrivals(stream: str, seconds: float, rate: float) -> Iterator[float]:
    """Times of a Poisson process, reproducible per stream."""
    moments, now = random.Random(f"{SEED} {stream}"), 0.0
    while (now := now + moments.expovariate(rate)) < seconds:
        yield now


if __name__ == "__main__":
    sys.exit(main())
