"""How a class's queue is served: by the product's levels, or by deadline alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Literal, Protocol

from simulator.traces.workload import Job
from taxiway.contract.keys import LEVELS

Order = Literal["level", "deadline"]
"""How a class queue is served: by the product's levels, first come, first served within each; or by deadline alone."""


class Queue(Protocol):
    """Jobs that wait for a class. `front` returns up to `most` of them in serving order, without removing them."""

    def __len__(self) -> int: ...

    def push(self, job: Job) -> None:
        """Add a job."""

    def first(self) -> Job:
        """The job served next; the queue must not be empty."""

    def front(self, most: int) -> list[Job]:
        """The jobs served next."""

    def take(self, job: Job) -> None:
        """Remove a job at any position."""


class LevelQueue:
    """Levels in order; first come, first served within a level."""

    def __init__(self) -> None:
        self._levels = [OrderedDict[int, Job]() for _ in range(LEVELS)]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, job: Job) -> None:
        """As `Queue.push`."""
        self._levels[job.level][job.index] = job
        self._count += 1

    def first(self) -> Job:
        """As `Queue.first`."""
        return next(self._served())

    def front(self, most: int) -> list[Job]:
        """As `Queue.front`."""
        return list(islice(self._served(), most))

    def take(self, job: Job) -> None:
        """As `Queue.take`."""
        del self._levels[job.level][job.index]
        self._count -= 1

    def back(self, most: int) -> Iterator[Job]:
        """Up to `most` jobs of each level, last served first."""
        return chain.from_iterable(islice(reversed(jobs.values()), most) for jobs in self._levels)

    def _served(self) -> Iterator[Job]:
        return chain.from_iterable(jobs.values() for jobs in self._levels)


class DeadlineQueue:
    """Earliest deadline first; first come, first served among equal deadlines."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._joined = 0
        self._inside: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._inside)

    def push(self, job: Job) -> None:
        """As `Queue.push`."""
        self._joined += 1
        self._inside[job.index] = self._joined
        heappush(self._heap, (job.due, self._joined, job))

    def first(self) -> Job:
        """As `Queue.first`."""
        return self._heap[0][2]

    def front(self, most: int) -> list[Job]:
        """As `Queue.front`."""
        found: list[tuple[float, int, Job]] = []
        while self._heap and len(found) < most:
            found.append(heappop(self._heap))
            self._clear()
        for entry in found:
            heappush(self._heap, entry)
        return [job for _, _, job in found]

    def take(self, job: Job) -> None:
        """As `Queue.take`."""
        del self._inside[job.index]
        self._clear()

    def _clear(self) -> None:
        """Remove entries at the top whose jobs have left."""
        while self._heap and self._inside.get(self._heap[0][2].index) != self._heap[0][1]:
            heappop(self._heap)
