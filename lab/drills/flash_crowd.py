"""What does a flash crowd cost, with the rebalancer and without?

`python -m lab.drills.flash_crowd` starts a router, two workers of a cheap class and one of a dear class that is
reserved for live work, and sends `paced` jobs of 25 ms at random times, the same in both runs: bulk work for 70 % of
the fleet and live work for 5 %, which is ten times as much for 30 s. It prints the share of live jobs answered in time,
and the bulk throughput of the two minutes from its start against the two minutes before. The exit status is 1
if less than 99 % of the live jobs are in time, or bulk loses more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import taxiway
from benchmarks.harness.measure import CHARTS, answer, say
from benchmarks.harness.processes import fleet
from lab.drills.lines import Line, Panel, write_lines
from taxiway.errors import DeadlineExceededError, OverloadedError

ROWS = 96
"""Rows of a job, three full batches: 25 ms of a device."""

CAPACITY = 3 / 0.0246
"""The capacity of the three devices in jobs per second."""

DEADLINE = 0.25
"""Of live jobs, in seconds."""

QUEUES = f"""
hardware:
  gpu.realtime: {{device: cuda, runtimes: [echo], max_batch: 32, max_wait: 0.002, horizon: 1, warm: [paced],
                 price: {{usd_per_hour: 0.71}}, reserve_for: live, target: 0.65}}
  cpu.batch: {{device: cpu, runtimes: [echo], max_batch: 32, max_wait: 0.005, horizon: 10, warm: [paced],
              price: {{usd_per_hour: 0.05}}}}
service:
  live: {{deadline: {DEADLINE}, priority: high}}
  bulk: {{deadline: 3600, priority: low, preemptible: true}}
default_service: live
"""

WITHOUT = "rebalance: {max_moves_per_job: 0}\n"
"""Configuration that disables moves."""

WORKERS = (
    ("--class", "cpu.batch", "--device", "cpu:0"),
    ("--class", "cpu.batch", "--device", "cpu:1"),
    ("--class", "gpu.realtime", "--device", "cuda:0", "--emulate"),
)

BULK, LIVE, SURGE = 0.7, 0.05, 10
"""Loads, as shares of the fleet; and the live load in the surge, as a multiple of that before."""

CALM, BURST, AFTER = 30.0, 30.0, 120.0
"""Seconds before the surge, of the surge, and from its first moment to the end."""

IN_TIME, LOSES = 0.99, 0.1
"""The least share of live work in time, and the most that bulk may lose."""

STEP = 3.0
"""Seconds of a point in the chart."""

SEED = 7


@dataclass(frozen=True, slots=True)
class Asked:
    """A job: when it was sent and when it was answered (None if it was not), in seconds since the start."""

    sent: float
    answered: float | None

    @property
    def in_time(self) -> bool:
        """Whether a live job was answered in time."""
        return self.answered is not None and self.answered - self.sent <= DEADLINE


@dataclass(frozen=True, slots=True)
class Run:
    """All jobs of one run."""

    live: Sequence[Asked]
    bulk: Sequence[Asked]

    def attained(self, begin: float, end: float) -> float:
        """The share of live jobs sent in this time that were answered in time."""
        asked = [one for one in self.live if begin <= one.sent < end]
        return sum(one.in_time for one in asked) / max(len(asked), 1)

    def done(self, begin: float, end: float) -> float:
        """Bulk jobs answered per second in this time."""
        return sum(begin <= (one.answered or -1.0) < end for one in self.bulk) / (end - begin)

    @property
    def lost(self) -> float:
        """The share of bulk throughput lost in the two minutes, relative to what was sent in them."""
        sent = sum(one.sent >= CALM for one in self.bulk) / AFTER
        return 1 - self.done(CALM, CALM + AFTER) / sent


def main() -> int:
    """Measure both ways, print the lines and draw the chart; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.flash_crowd", description=__doc__)
    parser.add_argument("--chart", type=Path, default=CHARTS / "flash_crowd.svg", help="where the chart is written")
    given = parser.parse_args()
    runs = {"with the rebalancer": one_run(QUEUES), "without it": one_run(QUEUES + WITHOUT)}
    for name, run in runs.items():
        attained = run.attained(CALM, CALM + BURST)
        question = f"flash crowd of {SURGE} times the live load, {name}"
        say(answer(f"{question}: share of live work in time", [attained], target=IN_TIME, holds=attained >= IN_TIME))
        say(answer(f"{question}: share of bulk throughput lost", [run.lost], target=LOSES, holds=run.lost <= LOSES))
    write_lines(given.chart, list(panels(runs)), band=(CALM, CALM + BURST, f"live load × {SURGE}"))
    own = next(iter(runs.values()))
    return 0 if own.attained(CALM, CALM + BURST) >= IN_TIME and own.lost <= LOSES else 1


def one_run(queues: str) -> Run:
    """One run on a fleet of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "queues.yaml").write_text(queues)
        with fleet(folder, folder / "queues.yaml", WORKERS) as interfaces:
            return asyncio.run(surge(interfaces.broker))


async def surge(broker: str) -> Run:
    """Send everything; returns the outcomes at the end."""
    async with taxiway.AsyncClient(broker) as client:
        began = time.perf_counter()

        async def sent(service: str, moments: Sequence[float]) -> list[Asked]:
            return await asking(client, service, moments, began)

        live = sorted([*arrivals("live", 0, CALM + AFTER, LIVE), *arrivals("surge", CALM, BURST, (SURGE - 1) * LIVE)])
        bulk = list(arrivals("bulk", 0, CALM + AFTER, BULK))
        return Run(*await asyncio.gather(sent("live", live), sent("bulk", bulk)))


async def asking(client: taxiway.AsyncClient, service: str, moments: Sequence[float], began: float) -> list[Asked]:
    """Send requests at these times; what has no answer by the end counts as unanswered."""

    async def ask(due: float) -> Asked:
        with contextlib.suppress(OverloadedError, DeadlineExceededError):
            await client.infer("paced", ["x"] * ROWS, service=service)
            return Asked(due, time.perf_counter() - began)
        return Asked(due, None)

    asked = []
    for moment in moments:
        await asyncio.sleep(max(moment - (time.perf_counter() - began), 0.0))
        asked.append(asyncio.create_task(ask(moment)))
    done, left = await asyncio.wait(asked, timeout=max(CALM + AFTER - (time.perf_counter() - began), 0.0) + DEADLINE)
    for task in left:
        task.cancel()
    return [task.result() if task in done else Asked(due, None) for due, task in zip(moments, asked, strict=True)]


def arrivals(stream: str, begin: float, seconds: float, load: float) -> Iterator[float]:
    """Times of a Poisson process for a share of the fleet's capacity, reproducible per stream."""
    moments, now = random.Random(f"{SEED} {stream}"), 0.0
    while (now := now + moments.expovariate(load * CAPACITY)) < seconds:
        yield begin + now


def panels(runs: dict[str, Run]) -> Iterator[Panel]:
    """Live work in time and bulk throughput over time."""
    bins = [place * STEP for place in range(int((CALM + AFTER) / STEP))]

    def lines(figure: str, scale: float) -> list[Line]:
        return [
            Line(name, [(at + STEP / 2, scale * getattr(run, figure)(at, at + STEP)) for at in bins], own=not place)
            for place, (name, run) in enumerate(runs.items())
        ]

    yield Panel("live jobs answered in time, %", lines("attained", 100))
    yield Panel("bulk jobs answered, a second", lines("done", 1))


if __name__ == "__main__":
    sys.exit(main())
