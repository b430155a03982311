"""How long does a tick of the rebalancer take with 1,000 workers and a million waiting jobs? Printed as JSON lines.

Ten classes of a hundred devices have all the jobs, in one level of their queues or in all four, of mixed models, sizes
and times left. A tick groups the jobs that it examines (`rebalance.window` of queues.yaml) and decides the moves. The
figure is the processor time of both, without reading the jobs. Run `python -m benchmarks.rebalance_speed`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from benchmarks.harness.measure import answer, say
from benchmarks.placement_speed import CLASSES, JOB_SECONDS, REPEATS, WAITING, WORKERS, device_of, model_of, topology_of
from broker.port import Peeked
from router.decide.classify import Needs
from router.decide.rebalance import Move, rebalance
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from router.upkeep.waiting import Waiting, groups_of, window_per_level
from tasks.heartbeat import variant_key
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from tasks.topology import Rebalance
from taxiway.contract.keys import LEVELS
from taxiway.contract.wire import Envelope

AT_MOST = 0.050
"""Seconds that a tick may take."""

MODELS = 4
"""Models that wait in each queue; sizes and times left differ by a factor of up to four."""

RULES = Rebalance()


@dataclass(frozen=True, slots=True)
class Scene:
    """A large fleet as the rebalancer sees it: the jobs that a tick examines, and the queues' contents."""

    working: WorkingSnapshot
    jobs: Sequence[Waiting]
    depths: Mapping[str, int]

    def tick(self) -> list[Move]:
        """The moves of a tick."""
        groups = groups_of(self.jobs, self.working, RULES.max_moves_per_job)
        work = {name: self.working.backlog.levels(name) for name in self.working.backlog.classes}
        return rebalance(groups, work, self.depths, RULES)


def scene_of(filled: int) -> Scene:
    """`WORKERS` devices in `CLASSES`, and `WAITING` jobs in the last `filled` levels of their queues."""
    topology, names = topology_of(CLASSES), [f"c{number}" for number in range(CLASSES)]
    models = [msgspec.structs.replace(model_of(2), name=f"m{number}") for number in range(MODELS)]
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
        _waiting(Peeked(name, level, None, _envelope(f"{name}.{level}.{n}")), models[n % MODELS], random)
        for name in names
        for level in levels
        for n in range(most)
    ]
    return Scene(working, jobs, dict.fromkeys(names, WAITING // CLASSES))


def _waiting(peeked: Peeked, model: Model, random: np.random.Generator) -> Waiting:
    """A job of a random size, due at a random time."""
    due, size = float(random.uniform(30, 120)), float(random.uniform(16, 64))
    return Waiting(peeked, model, Needs(due, peeked.level, 1, size), "v0", JOB_SECONDS, ())


def _envelope(job: str) -> Envelope:
    return Envelope(body="", headers={"id": job}, properties={})


def seconds_of(scene: Scene) -> float:
    """Processor seconds of a tick."""
    began = time.process_time()
    scene.tick()
    return time.process_time() - began


def main() -> None:
    """Measure and print."""
    for filled in (1, LEVELS):
        scene = scene_of(filled)
        scene.tick()  # builds the candidate tables, as a refresh does
        taken = [1e3 * seconds_of(scene) for _ in range(REPEATS)]
        levels = "one level" if filled == 1 else f"{filled} levels"
        question = f"milliseconds a tick, {WORKERS:,} workers, {WAITING:,} jobs in {levels} of {CLASSES} queues"
        moves = scene.tick()
        say(answer(question, taken, at_most=1e3 * AT_MOST, jobs=len(scene.jobs), moves=len(moves)))


if __name__ == "__main__":
    main()
