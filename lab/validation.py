"""Does the simulator predict a real fleet? The same trace through real workers and through the simulator.

`python -m lab.validation` starts a router and a worker for each of two hardware classes, sends a seeded trace of
bursts for `paced` (an emulated accelerator, the same on any machine) in real time, and simulates the same trace with
the same curves, prices and batching. Every round uses a new fleet that has learned nothing. The simulator has no model
of a request's overhead, so it is measured on that fleet before the trace: the median latency of `echo` under the
trace's initial load (idle processes answer later than in the closed loop of `benchmarks.idle_round_trip`), and a
batch's overhead on a busy device.

With `--mixed` the workers serve four models at once, each with its own bursts, and figures are compared by model. A
batch has rows of one model only, so models delay each other. These models, their deadlines and their arrivals are
`SLOWER` times slower: the delays that models cause each other are compared, not those of a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

import taxiway
from benchmarks.harness.measure import machine, percentile, summary
from benchmarks.harness.processes import fleet
from lab.fleet_file import parse_fleet, prepare
from lab.rows import joined, synthetic_trace
from simulator.engine import ANSWERED, Simulation
from simulator.fleet import SERVICES, Fleet
from simulator.policies.routing import SimulatedReader
from simulator.policies.taxiway import Taxiway
from simulator.traces import Column, Trace
from simulator.workload import Workload
from tasks.models.folder import load_catalogue
from tasks.models.model import Profile
from tasks.settings import TREE
from tasks.topology import Topology, load_topology
from taxiway.contract.job import RunReport
from taxiway.errors import DeadlineExceededError, OverloadedError
from workers.runtimes.echo import PACED_BASE, PACED_ROW

QUEUES = Path(__file__).with_name("validation.yaml")

WORKERS = (
    ("--class", "cpu.batch", "--device", "cpu:0"),
    ("--class", "gpu.realtime", "--device", "cuda:0", "--emulate"),
)

SHARES = {"live": 0.3, "standard": 0.4, "bulk": 0.3}
"""Of the trace's requests."""

TRACE = "mmpp:low=40,high=160,stay=5,size=1,output=0,spread=0"
"""Lulls of 40 requests per second and bursts of 160; a paced device that takes one at a time answers 196."""

SLOWER = 10
"""How many times slower the four models are than `paced`: a batch takes 50 ms + 1 ms a row."""

MIXED_TRACE = "mmpp:low=0.5,high=3,stay=20,size=1,output=0,spread=0"
"""Of each of four models: 2 requests per second together in lulls, 12 in a common burst."""

SEED = 7

ATTAINMENT_WITHIN = 3.0
"""Tolerance in points of the share answered in time."""

LATENCY_WITHIN = 20.0
"""Tolerance in percent of a latency."""

MIXED_WITHIN = {50: 20.0, 90: 25.0}
"""Tolerance in percent of a model's latencies, by percentile."""

BEGINNING = 400
"""Requests of the trace that are first sent to `echo`, of one that is not slower."""

BURST = 128
"""Concurrent requests in the measurement of a batch's overhead."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The models that requests ask for, their arrivals, and the folder and the queues.yaml that a fleet is given.

    So many of the first requests are sent to `echo` before.
    """

    trace: Trace
    spec: str
    models: Path = TREE / "models"
    queues: Path = QUEUES
    beginning: int = BEGINNING


@dataclass(frozen=True, slots=True)
class Run:
    """One round: seconds per request, NaN without an answer, of shape (n,); then the constants."""

    workload: Workload
    real: Column
    simulated: Column
    trip: float
    turn: float
    pace: float

    def attained(self, taken: Column, rows: Column) -> float:
        """Percentage of some requests answered in time."""
        return 100 * float((taken <= self.workload.trace.deadline)[rows].mean())


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of each round, real and simulated, with its tolerance; `relative` ones are compared in percent."""

    what: str
    real: Sequence[float]
    simulated: Sequence[float]
    relative: bool
    within: float

    @property
    def difference(self) -> float:
        """The simulated median minus the real one."""
        real, simulated = statistics.median(self.real), statistics.median(self.simulated)
        return 100 * (simulated / real - 1) if self.relative else simulated - real

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return abs(self.difference) <= self.within


def main() -> None:
    """Measure, print every figure, and whether the simulator is accurate."""
    parser = argparse.ArgumentParser(prog="python -m lab.validation", description=__doc__)
    parser.add_argument("--seconds", type=int, default=180, help="length of the trace")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of each figure counts")
    parser.add_argument("--mixed", action="store_true", help="four models at once, compared by model")
    parser.add_argument("--json", action="store_true", help="print JSON lines, not sentences")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scene = mixed_scene(Path(folder), given.seconds) if given.mixed else single_scene(given.seconds)
        runs = [_announced(scene, number, given) for number in range(1, given.rounds + 1)]
    compared = by_model(runs) if given.mixed else comparisons(runs)
    about = {**machine(), "trace": scene.spec}
    for line in (*map(line_of, compared), *constants_of(runs), verdict(compared)):
        text = msgspec.json.encode({**line, **about}).decode() if given.json else sentence(line)
        sys.stdout.write(text + "\n")


def _announced(scene: Scene, number: int, given: argparse.Namespace) -> Run:
    """A round, after a line that it has begun: nothing is printed before all rounds have ended."""
    sys.stderr.write(f"round {number} of {given.rounds}: {len(scene.trace)} requests in {given.seconds} s\n")
    return one_round(scene)


def single_scene(seconds: int) -> Scene:
    """One model in bursts."""
    spec = f"{TRACE},duration={seconds},seed={SEED}"
    return Scene(synthetic_trace(spec, model="paced"), spec)


def mixed_scene(folder: Path, seconds: int) -> Scene:
    """Four copies of `paced`, each with its own bursts; writes their folder and a queues.yaml."""
    names = [f"paced-{letter}" for letter in "abcd"]
    shutil.copytree(TREE / "models" / "echo", folder / "models" / "echo")
    base, row = SLOWER * PACED_BASE, SLOWER * PACED_ROW
    pace = f"entry: paced={base:g}+{row:g}", f"{{base: {base:g}, slope: {row:g}, load: 0}}"
    described = (TREE / "models" / "paced" / "model.yaml").read_text()
    described = re.sub(r"{base: .*}", pace[1], described.replace("entry: paced", pace[0], 1))
    for name in names:
        (folder / "models" / name).mkdir()
        (folder / "models" / name / "model.yaml").write_text(described.replace("name: paced", f"name: {name}", 1))
    queues = folder / QUEUES.name
    text = QUEUES.read_text().replace("warm: [paced,", f"warm: [{', '.join(names)},")
    queues.write_text(re.sub(r"(max_wait|horizon|deadline): ([\d.]+)", _slower, text))
    spec = f"{MIXED_TRACE},duration={seconds}"
    each = [synthetic_trace(f"{spec},seed={SEED + place}", model=name) for place, name in enumerate(names)]
    return Scene(joined(each), f"4 of {spec}", folder / "models", queues, BEGINNING // SLOWER)


def _slower(found: re.Match[str]) -> str:
    return f"{found[1]}: {SLOWER * float(found[2]):g}"


def simulated_fleet(topology: Topology, models: Sequence[str], curve: Profile, *, turn: float, pace: float) -> Fleet:
    """One device of each class, always on, whose batches take `pace` times the curve's seconds plus the overhead."""
    paced = {"base": pace * curve.base + turn, "slope": pace * curve.slope, "load": curve.load}
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
            "curves": dict.fromkeys(models, paced),
        }
        for name, hardware in topology.hardware.items()
    }
    services = {
        name: {"share": SHARES[name], "deadline": service.deadline, "priority": service.priority}
        for name, service in topology.service.items()
    }
    document = {"default_model": models[0], "classes": classes, "services": services}
    return parse_fleet(json.dumps(document), str(QUEUES))


def one_round(scene: Scene) -> Run:
    """Run the trace on a new fleet and in the simulator."""
    names = scene.trace.models
    topology, model = load_topology(scene.queues), load_catalogue(scene.models).resolve(names[0])
    curve = model.variants[model.reference].profiles["cpu"]
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder), scene.queues, WORKERS, scene.models) as interfaces,
    ):
        turn, ratios = asyncio.run(turn_and_ratios(interfaces.broker, names[0], curve))
        pace = float(ratios.mean())
        workload = prepare(scene.trace, simulated_fleet(topology, names, curve, turn=turn, pace=pace), seed=SEED)
        beginning = workload.trace.part(slice(scene.beginning))
        trip = float(np.nanmedian(asyncio.run(replayed(interfaces.broker, ["echo"] * len(names), beginning))))
        real = asyncio.run(replayed(interfaces.broker, names, workload.trace))
    simulated = simulated_seconds(workload, trip - turn, ratios / pace)
    return Run(workload, real, simulated, trip, turn, pace)


def simulated_seconds(workload: Workload, path: float, strays: Column) -> Column:
    """As `replayed`, by the simulator.

    Work counts as unfinished for `path` seconds after its end, until the store shows it. `strays` are run times over
    predicted ones, from which each run draws its own; shape (n,).
    """
    random = np.random.default_rng(SEED)
    reader = SimulatedReader(workload, path=path, stray=lambda: float(random.choice(strays)))
    outcome = Simulation(workload, Taxiway(workload, reader), seed=SEED).run()
    return np.where(outcome.state == ANSWERED, outcome.latency, math.nan) + path


async def turn_and_ratios(url: str, model: str, curve: Profile) -> tuple[float, Column]:
    """Seconds between two batches on a busy device, and run times over the curve's, of shape (BURST,).

    Between batches the device's thread claims, prepares and reports; a late wake-up lengthens a batch. Measured while
    a device always has work: between the first and the last answer of a burst of bulk work, which all goes to the
    cheapest class.
    """
    async with taxiway.AsyncClient(url) as client:

        async def answer(number: int) -> tuple[float, RunReport]:
            result = await client.infer(model, f"burst {number}", service="bulk")
            return time.perf_counter(), result.report

        answers = await asyncio.gather(*map(answer, range(BURST)))
    moments, reports = zip(*answers, strict=True)
    batches = sum(1 / report.batch for report in reports)
    ran = sum(report.run_time / report.batch for report in reports) / batches
    ratios = np.array([report.run_time / curve.latency(report.batch, 1) for report in reports])
    return (max(moments) - min(moments)) / (batches - 1) - ran, ratios


async def replayed(url: str, models: Sequence[str], trace: Trace) -> Column:
    """Seconds of each request of the trace, sent to its model under these names; NaN if it failed. Shape (n,)."""
    async with taxiway.AsyncClient(url) as client:

        async def seconds(service: str, index: int) -> float:
            began = time.perf_counter()
            try:
                await client.infer(models[trace.model[index]], f"request {index}", service=service)
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
    trace = runs[0].workload.trace
    services = {name: trace.service == number for number, name in enumerate(SERVICES)}
    return [
        *(attained(runs, f"{name} answered in time, %", rows) for name, rows in services.items()),
        *(latency(runs, f"latency of the answered, p{p} ms", p, LATENCY_WITHIN, trace.model >= 0) for p in (50, 90)),
    ]


def by_model(runs: Sequence[Run]) -> list[Comparison]:
    """Attainment of each model in percent, and p50 and p90 of its answers in milliseconds."""
    trace = runs[0].workload.trace
    models = {name: trace.model == number for number, name in enumerate(trace.models)}
    return [
        *(attained(runs, f"{name} answered in time, %", rows) for name, rows in models.items()),
        *(
            latency(runs, f"{name}, latency of the answered, p{share} ms", share, within, rows)
            for name, rows in models.items()
            for share, within in MIXED_WITHIN.items()
        ),
    ]


def attained(runs: Sequence[Run], what: str, rows: Column) -> Comparison:
    """Percent of these requests that were answered in time."""
    real, simulated = ([run.attained(getattr(run, column), rows) for run in runs] for column in ("real", "simulated"))
    return Comparison(what, real, simulated, relative=False, within=ATTAINMENT_WITHIN)


def latency(runs: Sequence[Run], what: str, share: int, within: float, rows: Column) -> Comparison:
    """A percentile of these requests' latencies, in milliseconds."""
    real, simulated = (
        [1000 * percentile(answered(getattr(run, column)[rows]), share) for run in runs]
        for column in ("real", "simulated")
    )
    return Comparison(what, real, simulated, relative=True, within=within)


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
    text = f"{what}: real {line['real']} (spread {line['spread']}), simulated {line['simulated']}"
    return f"{text}; {line['difference']} {line['unit']} apart, {held} {line['target']}"


if __name__ == "__main__":
    main()
