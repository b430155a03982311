"""What is it worth that running generations yield to more urgent ones and go on where they stopped?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lab.baselines import EVERY_POLICY
from lab.changes import ChangingPool, ChangingSimulation
from simulator.class_queue import SimulatedQueue
from simulator.device import SimulatedDevice
from simulator.engine import RunSummary, summarise
from simulator.workload import SimulatedJob, Workload

PLACED = ("per-request", "tuned-split")
"""How requests are placed meanwhile."""


class ArrivalOrder(SimulatedQueue):
    """Jobs that are served in the order of their arrival, as an engine alone serves them."""

    def order(self, job: SimulatedJob) -> float:
        """As `SimulatedQueue.order`."""
        return 0.0


class EvictingPool(ChangingPool):
    """A class whose generations yield and lose their text."""

    def _stopped(self, device: SimulatedDevice | None, index: int, now: float) -> SimulatedJob | None:
        job = super()._stopped(device, index, now)
        if job is not None:
            job.written = 0.0
        return job


class EvictingSimulation(ChangingSimulation):
    """A run in which the text of generations that yield is lost."""

    pool_type = EvictingPool


WAYS: Mapping[str, tuple[type[SimulatedQueue], type[ChangingSimulation], bool]] = {
    "in the order of arrival": (ArrivalOrder, ChangingSimulation, False),
    "by urgency, none yields": (SimulatedQueue, ChangingSimulation, False),
    "evicted, their text lost": (SimulatedQueue, EvictingSimulation, True),
    "they yield and go on": (SimulatedQueue, ChangingSimulation, True),
}
"""What becomes of running generations when urgent ones wait: in which order they are served, and what yields."""


def yielded(workload: Workload, seed: int) -> Iterator[RunSummary]:
    """Each placement's figures in each of the ways."""
    for placed in PLACED:
        for name, (queue, simulation, yields) in WAYS.items():
            policy = EVERY_POLICY[placed](workload, seed)
            policy.queue, policy.yields = queue, yields
            engine = simulation(workload, policy, seed=seed)
            yield summarise(f"{placed}: {name}", workload, engine.run(), engine.pools)
