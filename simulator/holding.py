"""Held jobs in the simulation, released by the router's own rule: fairness between tenants, then deadlines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush

from broker.valkey.holding import HoldingQueue
from router.decide.fairness import FairOrder, HeldKind, Releasable
from simulator.traces.workload import Job


class Holding:
    """One queue per tenant, model and service, earliest deadline first."""

    def __init__(self) -> None:
        self._queues: defaultdict[HeldKind, list[tuple[float, int, Job]]] = defaultdict(list)
        self._order = FairOrder({})

    def add(self, kind: HeldKind, job: Job) -> None:
        """Hold a job."""
        heappush(self._queues[kind], (job.due, job.index, job))

    def kinds(self) -> set[HeldKind]:
        """The kinds that have jobs here."""
        return {kind for kind, jobs in self._queues.items() if jobs}

    def set_present(self, kinds: Iterable[HeldKind]) -> None:
        """Only the tenants of these kinds have jobs here."""
        self._order.set_present(kind.tenant for kind in kinds)

    def next(self, kinds: Iterable[HeldKind]) -> HeldKind:
        """The one of these kinds that is released next."""
        return self._order.next(self._releasable(kind) for kind in kinds).kind

    def first(self, kind: HeldKind) -> Job:
        """The job of a kind with the earliest deadline."""
        return self._queues[kind][0][2]

    def count(self, kind: HeldKind) -> int:
        """The number of jobs of a kind."""
        return len(self._queues[kind])

    def release(self, kind: HeldKind, dollars: float) -> None:
        """Remove the first job of a kind, and charge its tenant this many US dollars of device time."""
        heappop(self._queues[kind])
        self._order.charge(kind.tenant, dollars)

    def _releasable(self, kind: HeldKind) -> Releasable:
        due, _, job = self._queues[kind][0]
        return Releasable(HoldingQueue(kind.queue, due, job.level, self.count(kind)), kind)
