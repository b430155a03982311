"""How long do a router's decisions take? `python -m benchmarks.decision_speed` prints JSON lines.

A placement: 1,000 in a row over 100 candidates, and single ones over 6. The slowest single placements of one run are
those that a busy machine interrupted, and other ones in the next run. So each placement is repeated, and its median is
what it takes; the slowest of one run are reported beside it.

A refresh of the fleet's state: from the store's keys, with 1,000 workers and a million waiting jobs, to a snapshot,
shadow prices and the first candidate table.

A tick of the rebalancer: ten classes of a hundred devices have a million jobs, in one level of their queues or in all
four, of mixed models, sizes and times left. A tick groups the jobs that it examines (`rebalance.window` of queues.yaml)
and decides the moves. The figure is the processor time of both, without reading the jobs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from benchmarks.harness.measure import answer, say
from broker.port import Peeked
from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Constraints, Needs
from router.decide.cost import shadow_prices
from router.decide.facts import FleetFacts, snapshot_from
from router.decide.moves.rebalance import Move, rebalance
from router.decide.moves.waiting import window_per_level
from router.decide.placement import choose
from router.decide.snapshot import Backlog, FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from router.upkeep.waiting import WaitingJob, groups_of
from tasks.document import Size
from tasks.heartbeat import DeviceFacts, variant_key
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.models.tensor_spec import TensorSpec
from tasks.topology import HardwareClass, Price, Rebalance, Service, Topology
from taxiway.contract.keys import LEVELS, arrived_cell, work_cell
from taxiway.contract.wire import Envelope

REPEATS = 9
TEXT = TensorSpec(name="text", datatype="BYTES", shape=(-1,))

WORKERS, CLASSES, MODELS, WAITING = 1000, 10, 20, 1_000_000
"""The large fleet: its workers in classes of equal size, the models that they hold, and the jobs in their queues."""

JOB_SECONDS = 0.02
"""Device seconds of a waiting job; they are summed by class and level."""

TICK_AT_MOST = 0.050
"""Seconds that a tick of the rebalancer may take."""

MIXED = 4
"""Models that wait in each queue of the rebalancer; sizes and times left differ by a factor of up to four."""

RULES = Rebalance()


def model_of(variants: int) -> Model:
    """A model with this many variants, each slower than the previous one."""
    return Model(
        name="m",
        version=1,
        summary="",
        licence="",
        pipeline="text",
        inputs=(TEXT,),
        outputs=(TEXT,),
        reference="v0",
        variants={
            f"v{n}": Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(0.001 * (n + 1), 1e-5)})
            for n in range(variants)
        },
    )


def topology_of(classes: int) -> Topology:
    """This many hardware classes, each more expensive than the previous one."""
    hardware = {
        f"c{n}": HardwareClass(
            device="cpu", runtimes=("onnx",), max_batch=32, max_wait=0.002, price=Price(0.05 * (n + 1))
        )
        for n in range(classes)
    }
    return Topology(hardware=hardware, service={"standard": Service(deadline=5.0)}, default_service="standard")


def device_of(hardware_class: str, number: int, warm: tuple[str, ...]) -> DeviceFacts:
    """One live device with `warm` models and its learned figures for each."""
    return DeviceFacts(
        worker=f"{hardware_class}.{number}",
        hardware_class=hardware_class,
        device="cpu:0",
        kind="cpu",
        emulated=False,
        name="x",
        memory_total=2**34,
        memory_free=2**34,
        utilisation=0.5 + number % 50 / 100,
        instruction_sets=("avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
        runtimes=("onnx", "torch", "python", "echo"),
        warm=warm,
        pace=dict.fromkeys(warm, 1 + number % 7 / 100),
        residual=dict.fromkeys(warm, (1.2 + number % 5 / 100,)),
    )


def table_of(classes: int, variants: int) -> CandidateTable:
    """A candidate table of `classes` × `variants` candidates, each class with four live devices."""
    model, topology = model_of(variants), topology_of(classes)
    devices = tuple(device_of(name, n, ("m:1/v0",)) for name in topology.hardware for n in range(4))
    return build_table(
        model, Constraints("standard"), topology, FleetSnapshot(devices, rates={"m:1": 20.0}), ProfileBook()
    )


def facts_of_a_large_fleet(topology: Topology) -> FleetFacts:
    """The store's keys for a fleet of `WORKERS` with `WAITING` jobs."""
    warm = tuple(variant_key(f"{'m' if n == 0 else f'm{n}'}:1", "v0") for n in range(4))
    devices = [device_of(name, n, warm) for name in topology.hardware for n in range(WORKERS // len(topology.hardware))]
    seconds = WAITING * JOB_SECONDS / (len(topology.hardware) * LEVELS)
    work = {work_cell(name, level): seconds for name in topology.hardware for level in range(LEVELS)}
    work |= {arrived_cell(name, f"m{n}:1"): 1e6 for name in topology.hardware for n in range(MODELS)}
    return FleetFacts(
        now=1000.0,
        devices={device.worker: msgspec.json.encode(device) for device in devices},
        heartbeats={device.worker: 999.5 for device in devices},
        work=work,
    )


def seconds_to_see(facts: FleetFacts, model: Model, topology: Topology) -> float:
    """Seconds from the store's keys to the candidate table of the first request."""
    started = time.perf_counter()
    fleet = snapshot_from(facts)
    fleet = replace(fleet, shadow=shadow_prices(topology, fleet))
    WorkingSnapshot(topology, ProfileBook(), fleet).table(model, Constraints("standard"))
    return time.perf_counter() - started


def seconds_of_each(table: CandidateTable, requests: int) -> list[float]:
    """Seconds of each of `requests` consecutive placements, each with the work of the previous ones added."""
    backlog = Backlog(table.classes, {})
    taken = []
    for seed in range(requests):
        needs = Needs(deadline=5.0, level=1, rows=1, size=20 + seed % 40)
        started = time.perf_counter()
        placement = choose(table, needs, backlog.seconds, seed=seed)
        backlog.add(placement.candidate.hardware_class, 1, placement.work)
        taken.append(time.perf_counter() - started)
    return taken


def slowest(taken: Sequence[float]) -> float:
    """The 99th percentile of these seconds."""
    return sorted(taken)[math.ceil(0.99 * len(taken)) - 1]


def medians(table: CandidateTable, requests: int) -> list[float]:
    """Seconds of each of `requests` consecutive placements: the median of `REPEATS` times that all of them are made."""
    runs = [seconds_of_each(table, requests) for _ in range(REPEATS)]
    return [statistics.median(each) for each in zip(*runs, strict=True)]


@dataclass(frozen=True, slots=True)
class Scene:
    """A large fleet as the rebalancer sees it: the jobs that a tick examines, and the queues' contents."""

    working: WorkingSnapshot
    jobs: Sequence[WaitingJob]
    depths: Mapping[str, int]

    def tick(self) -> list[Move]:
        """The moves of a tick."""
        groups = groups_of(self.jobs, self.working, RULES.max_moves_per_job)
        work = {name: self.working.backlog.levels(name) for name in self.working.backlog.classes}
        return rebalance(groups, work, self.depths, RULES)


def scene_of(filled: int) -> Scene:
    """`WORKERS` devices in `CLASSES`, and `WAITING` jobs in the last `filled` levels of their queues."""
    topology, names = topology_of(CLASSES), [f"c{number}" for number in range(CLASSES)]
    models = [msgspec.structs.replace(model_of(2), name=f"m{number}") for number in range(MIXED)]
    warm = tuple(variant_key(model.id, "v0") for model in models)
    devices = tuple(device_of(name, n, warm) for name in names for n in range(WORKERS // CLASSES))
    levels, each = range(LEVELS - filled, LEVELS), WAITING / (CLASSES * filled)
    work = {
        name: tuple(each * JOB_SECONDS * place / CLASSES * (level in levels) for level in range(LEVELS))
        for place, name in enumerate(names, start=1)
    }
    working = WorkingSnapshot(topology, ProfileBook(), FleetSnapshot(devices, work=work))
    random, most = np.random.default_rng(1), window_per_level(RULES.window, names, working.backlog)
    jobs = [
        _waiting(Peeked(name, level, b"", _envelope(f"{name}.{level}.{n}")), models[n % MIXED], random)
        for name in names
        for level in levels
        for n in range(most)
    ]
    return Scene(working, jobs, dict.fromkeys(names, WAITING // CLASSES))


def _waiting(peeked: Peeked, model: Model, random: np.random.Generator) -> WaitingJob:
    """A job of a random size, due at a random time."""
    due, size = float(random.uniform(30, 120)), float(random.uniform(16, 64))
    return WaitingJob.of(peeked, model, Needs(due, peeked.level, 1, size), "v0", JOB_SECONDS, ())


def _envelope(job: str) -> Envelope:
    return Envelope(body="", headers={"id": job}, properties={})


def seconds_of(scene: Scene) -> float:
    """Processor seconds of a tick."""
    began = time.process_time()
    scene.tick()
    return time.process_time() - began


def report(question: str, measure: Callable[[], float], *, at_most: float | None) -> None:
    """Print one line: the median and spread of `REPEATS` measurements, in microseconds."""
    say(answer(question, [measure() * 1e6 for _ in range(REPEATS)], at_most=at_most))


def report_tick(filled: int) -> None:
    """Print one line: the milliseconds of a tick."""
    scene = scene_of(filled)
    scene.tick()  # builds the candidate tables, as a refresh does
    taken = [1e3 * seconds_of(scene) for _ in range(REPEATS)]
    levels = "one level" if filled == 1 else f"{filled} levels"
    question = f"milliseconds a tick, {WORKERS:,} workers, {WAITING:,} jobs in {levels} of {CLASSES} queues"
    moves = scene.tick()
    say(answer(question, taken, at_most=1e3 * TICK_AT_MOST, jobs=len(scene.jobs), moves=len(moves)))


def main() -> None:
    """Measure and print."""
    wide, narrow = table_of(50, 2), table_of(3, 2)
    report(
        "microseconds a placement, 1,000 in bulk over 100 candidates",
        lambda: statistics.fmean(seconds_of_each(wide, 1000)),
        at_most=60,
    )
    report(
        f"microseconds of a single placement over 6 candidates, p99 of the medians of 1,000 made {REPEATS} times",
        lambda: slowest(medians(narrow, 1000)),
        at_most=60,
    )
    report(
        "microseconds of a single placement over 6 candidates, p99 of 1,000 with the machine's interruptions",
        lambda: slowest(seconds_of_each(narrow, 1000)),
        at_most=None,
    )
    large, model = topology_of(CLASSES), model_of(2)
    facts = facts_of_a_large_fleet(large)
    report(
        f"microseconds from the store's keys to a candidate table, {WORKERS:,} workers and {WAITING:,} waiting jobs",
        lambda: seconds_to_see(facts, model, large),
        at_most=50_000,
    )
    for filled in (1, LEVELS):
        report_tick(filled)


if __name__ == "__main__":
    main()
