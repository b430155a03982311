"""Are live requests in time behind simulations that each hold a device for longer than their deadline?

`python -m lab.drills.mixed_sizes` starts a router and two CPU workers with the shipped queues.yaml and models,
and submits simulations of 4,000 sweeps (about half a second each) to an idle fleet, as bulk. A stream of live
sentiment requests follows at once, until all simulations have ended. A request is in time if its caller has the answer
within the deadline of the service `live`. The exit status is 1 if less than 99 % are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import taxiway
from benchmarks.harness.measure import answer, percentile, say
from benchmarks.harness.processes import fleet
from tasks.settings import TREE
from tasks.topology import load_topology
from taxiway.errors import TaxiwayError

QUEUES = TREE / "queues.yaml"
WORKERS = [["--class", "cpu.batch", "--device", f"cpu:{number}"] for number in range(2)]

SWEEPS = 4_000
"""Sweeps of a simulation."""

LIVE, BULK = "live", "bulk"

TARGET = 0.99
"""The least share of live requests in time."""

SEED = 7

TEXT = "The crew was kind and the landing smooth."


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds until each live request's answer (None without one), and until each simulation's."""

    live: list[float | None]
    bulk: list[float]
    deadline: float

    @property
    def attained(self) -> float:
        """The share of live requests in time."""
        return sum(seconds is not None and seconds <= self.deadline for seconds in self.live) / len(self.live)


def main() -> int:
    """Measure, and print one JSON line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.mixed_sizes", description=__doc__)
    parser.add_argument("--simulations", type=int, default=10, help="simulations that run before and beside")
    parser.add_argument("--rate", type=float, default=40.0, help="live requests a second")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each on a fleet of its own")
    given = parser.parse_args()
    runs = [one_run(given.simulations, given.rate) for _ in range(given.rounds)]
    attained = [run.attained for run in runs]
    answered = [seconds for run in runs for seconds in run.live if seconds is not None]
    holds = sum(run.attained * len(run.live) for run in runs) >= TARGET * sum(len(run.live) for run in runs)
    say(
        answer(
            f"share of live requests in time behind {given.simulations} simulations of {SWEEPS:,} sweeps, 2 workers",
            attained,
            target=TARGET,
            holds=holds,
            live=sum(len(run.live) for run in runs),
            unanswered=sum(seconds is None for run in runs for seconds in run.live),
            live_p50=round(percentile(answered, 50), 4),
            live_p99=round(percentile(answered, 99), 4),
            bulk_seconds=round(max(max(run.bulk) for run in runs), 2),
            load=round(os.getloadavg()[0], 1),
        )
    )
    return 0 if holds else 1


def one_run(simulations: int, rate: float) -> Run:
    """One round on a fleet of its own."""
    deadline = load_topology(QUEUES).service[LIVE].deadline
    assert deadline is not None
    with tempfile.TemporaryDirectory() as name, fleet(Path(name), QUEUES, WORKERS) as interfaces:
        live, bulk = asyncio.run(mixed(interfaces.broker, simulations, rate))
    return Run(live, bulk, deadline)


async def mixed(broker: str, simulations: int, rate: float) -> tuple[list[float | None], list[float]]:
    """Submit the simulations, and send live requests until they have ended."""
    async with taxiway.AsyncClient(broker) as client:
        await asked(client, LIVE)  # warms up the client
        jobs = [asyncio.create_task(simulated(client, seed)) for seed in range(simulations)]
        requests = []
        for pause in pauses(rate):
            await asyncio.sleep(pause)
            if all(job.done() for job in jobs):
                break
            requests.append(asyncio.create_task(asked(client, LIVE)))
        return list(await asyncio.gather(*requests)), list(await asyncio.gather(*jobs))


async def simulated(client: taxiway.AsyncClient, seed: int) -> float:
    """Seconds until a simulation's answer."""
    began = time.perf_counter()
    inputs = {"size": 16, "temperature": 2.0, "sweeps": SWEEPS, "seed": seed}
    await client.infer("ising", inputs, service=BULK)
    return time.perf_counter() - began


async def asked(client: taxiway.AsyncClient, service: str) -> float | None:
    """Seconds until a sentiment request's answer; None if it was refused or expired."""
    began = time.perf_counter()
    try:
        await client.infer("sentiment", TEXT, service=service)
    except TaxiwayError:
        return None
    return time.perf_counter() - began


def pauses(rate: float) -> Iterator[float]:
    """Seconds between the requests of a Poisson process."""
    numbers = random.Random(SEED)
    while True:
        yield numbers.expovariate(rate)


if __name__ == "__main__":
    sys.exit(main())
