"""Does the simulator predict a real fleet? The same trace through real workers and through the simulator.

`python -m benchmarks.validation` starts a router and a worker for each of two hardware classes, sends a seeded trace of
bursts for `paced` (an emulated accelerator, the same on any machine) in real time, and simulates the same trace with
the same curves, prices and batching. Every round uses a new fleet that has learned nothing. The simulator has no model
of a request's overhead, so it is measured on that fleet before the trace: the median latency of `echo` under the
trace's initial load (idle processes answer later than in the closed loop of `benchmarks.idle_round_trip`), and a
batch's overhead on a busy device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

import taxiway
from benchmarks.measure import machine, percentile, summary
from benchmarks.processes import fleet
from simulator.engine import Engine
from simulator.fleet import SERVICES, Fleet, parse_fleet
from simulator.outcome import ANSWERED
from simulator.policies.taxiway import Taxiway
from simulator.reader import Surroundings
from simulator.traces.synthetic import synthetic_trace
from simulator.traces.trace import Column, Trace
from simulator.traces.workload import Workload, prepare
from tasks.models.catalogue import Profile, load_catalogue
from tasks.settings import TREE
from tasks.topology import Topology, load_topology
from taxiway.contract.job import RunReport
from taxiway.errors import DeadlineExceededError, OverloadedError

QUEUES = TREE / "benchmarks" / "validation.yaml"

WORKERS = (
    ("--class", "cpu.batch", "--device", "cpu:0"),
    ("--class", "gpu.realtime", "--device", "cuda:0", "--emulate"),
)

SHARES = {"live": 0.3, "standard": 0.4, "bulk": 0.3}
"""Of the trace's requests."""

TRACE = "mmpp:low=40,high=160,stay=5,size=1,output=0,spread=0"
"""Lulls of 40 requests per second and bursts of 160; a paced device that takes one at a time answers 196."""

SEED = 7

ATTAINMENT_WITHIN = 3.0
"""Tolerance in points of the share answered in time."""

LATENCY_WITHIN = 20.0
"""Tolerance in percent of a latency."""

BEGINNING = 400
"""Requests of the trace that are first sent to `echo`."""

BURST = 128
"""Concurrent requests in the measurement of a batch's overhead."""


@dataclass(frozen=True, slots=True)
class Run:
    """One round: seconds per request, NaN without an answer, of shape (n,); then the constants."""

    workload: Workload
    real: Column
    simulated: Column
    trip: float
    turn: float
    pace: float

    def attained(self, taken: Column, service: int) -> float:
        """Percentage of a service's requests answered in time."""
        trace = self.workload.trace
        return 100 * float((taken <= trace.deadline)[trace.service == service].mean())


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of each round, real and simulated; `relative` ones are compared in percent."""

    what: str
    real: Sequence[float]
    simulated: Sequence[float]
    relative: bool

    @property
    def difference(self) -> float:
        """The simulated median minus the real one."""
        real, simulated = statistics.median(self.real), statistics.median(self.simulated)
        return 100 * (simulated / real - 1) if self.relative else simulated - real

    @property
    def within(self) -> float:
        """The target."""
        return LATENCY_WITHIN if self.relative else ATTAINMENT_WITHIN

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return abs(self.difference) <= self.within


def main() -> None:
    """Measure, print every figure, and whether the simulator is accurate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__)
    parser.add_argument("--seconds", type=int, default=180, help="length of the trace")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of each figure counts")
    parser.add_argument("--json", action="store_true", help="print JSON lines, not sentences")
    given = parser.parse_args()
    runs = [one_round(given.seconds) for _ in range(given.rounds)]
    compared = comparisons(runs)
    about = {**machine(), "trace": f"{TRACE},duration={given.seconds},seed={SEED}"}
    for line in (*map(line_of, compared), *constants_of(runs), verdict(compared)):
        text = msgspec.json.encode({**line, **about}).decode() if given.json else sentence(line)
        sys.stdout.write(text + "\n")


def simulated_fleet(topology: Topology, curve: Profile, *, turn: float, pace: float) -> Fleet:
    """One device of each class, always on, whose batches take `pace` times the curve's seconds plus the overhead."""
    classes = {
        name: {
            "count": 1,
            "minimum": 1,
            "initial": 1,
            "price": msgspec.to_builtins(hardware.price),
            "memory": "1GiB",
            "start": 0,
            "max_batch": hardware.max_batch,
            "max_wait": hardware.max_wait,
            "max_run": hardware.max_run,
            "horizon": hardware.horizon,
            "curves": {"paced": {"base": pace * curve.base + turn, "slope": pace * curve.slope, "load": curve.load}},
        }
        for name, hardware in topology.hardware.items()
    }
    services = {
        name: {"share": SHARES[name], "deadline": service.deadline, "priority": service.priority}
        for name, service in topology.service.items()
    }
    document = {"default_model": "paced", "classes": classes, "services": services}
    return parse_fleet(json.dumps(document), str(QUEUES))


def one_round(seconds: int) -> Run:
    """Run the trace on a new fleet and in the simulator."""
    topology, model = load_topology(QUEUES), load_catalogue(TREE / "models").resolve("paced")
    curve = model.variants[model.reference].profiles["cpu"]
    trace = synthetic_trace(f"{TRACE},duration={seconds},seed={SEED}", model="paced")
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder), QUEUES, WORKERS) as doors:
        turn, ratios = asyncio.run(turn_and_ratios(doors.broker, curve))
        pace = float(ratios.mean())
        workload = prepare(trace, simulated_fleet(topology, curve, turn=turn, pace=pace), seed=SEED)
        trip = float(np.nanmedian(asyncio.run(replayed(doors.broker, "echo", workload.trace.part(slice(BEGINNING))))))
        real = asyncio.run(replayed(doors.broker, "paced", workload.trace))
    around = Surroundings(path=trip - turn, strays=ratios / pace)
    return Run(workload, real, simulated_seconds(workload, around), trip, turn, pace)


def simulated_seconds(workload: Workload, around: Surroundings) -> Column:
    """As `replayed`, by the simulator."""
    outcome = Engine(workload, Taxiway(workload, around, seed=SEED), seed=SEED).run()
    return np.where(outcome.state == ANSWERED, outcome.latency, math.nan) + around.path


async def turn_and_ratios(url: str, curve: Profile) -> tuple[float, Column]:
    """Seconds between two batches on a busy device, and run times over the curve's, of shape (BURST,).

    Between batches the device's thread claims, prepares and reports; a late wake-up lengthens a batch. Measured while
    a device always has work: between the first and the last answer of a burst of bulk work, which all goes to the
    cheapest class.
    """
    async with taxiway.AsyncClient(url) as client:

        async def answer(number: int) -> tuple[float, RunReport]:
            result = await client.infer("paced", f"burst {number}", service="bulk")
            return time.perf_counter(), result.report

        answers = await asyncio.gather(*map(answer, range(BURST)))
    moments, reports = zip(*answers, strict=True)
    batches = sum(1 / report.batch for report in reports)
    ran = sum(report.run_time / report.batch for report in reports) / batches
    ratios = np.array([report.run_time / curve.latency(report.batch, 1) for report in reports])
    return (max(moments) - min(moments)) / (batches - 1) - ran, ratios


async def replayed(url: str, model: str, trace: Trace) -> Column:
    """Seconds of each request of the trace, sent to `model`; NaN if it failed. Shape (n,)."""
    async with taxiway.AsyncClient(url) as client:

        async def seconds(service: str, index: int) -> float:
            began = time.perf_counter()
            try:
                await client.infer(model, f"request {index}", service=service)
            except (OverloadedError, DeadlineExceededError):
                return math.nan
            return time.perf_counter() - began

        began, asked = time.perf_counter(), []
        for index, arrival in enumerate(trace.arrival.tolist()):
            await asyncio.sleep(max(arrival - (time.perf_counter() - began), 0.0))
            asked.append(asyncio.create_task(seconds(SERVICES[trace.service[index]], index)))
        return np.array(await asyncio.gather(*asked))


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Attainment of each service in percent, then p50 and p90 of answers in milliseconds."""

    def compared(what: str, figure: Callable[[Run, Column], float], *, relative: bool) -> Comparison:
        real, simulated = ([figure(run, getattr(run, column)) for run in runs] for column in ("real", "simulated"))
        return Comparison(what, real, simulated, relative)

    def attained(number: int) -> Callable[[Run, Column], float]:
        return lambda run, taken: run.attained(taken, number)

    def latency(share: int) -> Callable[[Run, Column], float]:
        return lambda _, taken: 1000 * percentile(answered(taken), share)

    return [
        *(compared(f"{name} answered in time, %", attained(n), relative=False) for n, name in enumerate(SERVICES)),
        *(compared(f"latency of the answered, p{p} ms", latency(p), relative=True) for p in (50, 90)),
    ]


def answered(taken: Column) -> list[float]:
    """The latencies of answered requests in seconds."""
    seconds: list[float] = taken[~np.isnan(taken)].tolist()
    return seconds


def line_of(one: Comparison) -> dict[str, object]:
    """One figure, real and simulated, with its target."""
    return {
        "question": f"simulator against real fleet: {one.what}",
        "repeats": len(one.real),
        "real": round(statistics.median(one.real), 3),
        "spread": round(max(one.real) - min(one.real), 3),
        "simulated": round(statistics.median(one.simulated), 3),
        "difference": round(one.difference, 2),
        "unit": "%" if one.relative else "points",
        "target": one.within,
        "holds": one.holds,
    }


def constants_of(runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """Parameters of the simulator that were measured before the trace."""
    constants = {
        "latency of echo, ms": [1000 * run.trip for run in runs],
        "a device's turn between two batches, ms": [1000 * run.turn for run in runs],
        "run time over the curve's": [run.pace for run in runs],
    }
    for what, figures in constants.items():
        yield {"question": f"simulator against real fleet: {what}", **summary(figures)}


def verdict(compared: Sequence[Comparison]) -> dict[str, object]:
    """Whether all figures are within their targets, and which are not."""
    outside = "; ".join(one.what for one in compared if not one.holds)
    answer = f"no: {outside}" if outside else "yes"
    return {"question": "simulator against real fleet: are all figures within their targets?", "answer": answer}


def sentence(line: Mapping[str, object]) -> str:
    """A line for people."""
    what = str(line["question"]).partition(": ")[2]
    if "answer" in line:
        return f"{what} {line['answer']}"
    if "median" in line:
        return f"{what}: {line['median']} (measured before the trace, given to the simulator)"
    held = "within" if line["holds"] else "NOT within"
    told = f"{what}: real {line['real']} (spread {line['spread']}), simulated {line['simulated']}"
    return f"{told}; {line['difference']} {line['unit']} apart, {held} {line['target']}"


if __name__ == "__main__":
    main()
