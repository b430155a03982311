"""What waits bound to no class, as the router holds it: one queue a model and service, by deadline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush

from router.decide.fairness import Kind
from simulator.traces.workload import Job


class Holding:
    """Held jobs by what they have in common, those that are due first in front.

    A trace's tenants share no budget, so that all jobs count as one tenant's, and the earliest deadline is next.
    """

    def __init__(self) -> None:
        self._queues: defaultdict[Kind, list[tuple[float, int, Job]]] = defaultdict(list)

    def add(self, kind: Kind, job: Job) -> None:
        """A job is held."""
        heappush(self._queues[kind], (job.due, job.index, job))

    def kinds(self) -> set[Kind]:
        """What has jobs here."""
        return {kind for kind, jobs in self._queues.items() if jobs}

    def next(self, kinds: Iterable[Kind]) -> Kind:
        """Which of these kinds has the job that is due first."""
        return min(kinds, key=lambda kind: self._queues[kind][0][:2])

    def first(self, kind: Kind) -> Job:
        """The job of a kind that is due first."""
        return self._queues[kind][0][2]

    def count(self, kind: Kind) -> int:
        """How many jobs of a kind there are."""
        return len(self._queues[kind])

    def release(self, kind: Kind) -> None:
        """The first job of a kind leaves."""
        heappop(self._queues[kind])
