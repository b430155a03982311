"""The queue of a hardware class in the simulation."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain
from typing import Literal

from simulator.workload import SimulatedJob
from taxiway.contract.keys import LEVELS

Order = Literal["level", "deadline"]
"""How a class queue is served: by the product's levels, first come, first served within each; or by deadline alone."""


Place = tuple[float, int]
"""A job's level or deadline, and its number in order of joining."""


Entry = tuple[Place, SimulatedJob]


class SimulatedQueue:
    """Jobs that wait for a class. Models do not wait for each other: each has its own queue."""

    def __init__(self, order: Order) -> None:
        self._by_level = order == "level"
        self._lines: dict[int, list[Entry]] = {}
        self._places: dict[int, Place] = {}
        self._joined = 0

    def __len__(self) -> int:
        return len(self._places)

    def indices(self) -> list[int]:
        """The indices of the jobs here, by when they joined."""
        return list(self._places)

    def push(self, job: SimulatedJob) -> None:
        """Add a job."""
        self._joined += 1
        place = (job.level if self._by_level else job.due, self._joined)
        self._places[job.index] = place
        insort(self._lines.setdefault(job.model, []), (place, job))

    def take(self, job: SimulatedJob) -> None:
        """Remove a job at any position."""
        line = self._lines[job.model]
        del line[bisect_left(line, (self._places.pop(job.index),))]
        if not line:
            del self._lines[job.model]

    def first(self, model: int) -> SimulatedJob | None:
        """The model's job that is served next."""
        line = self._lines.get(model)
        return line[0][1] if line else None

    def heads(self) -> list[SimulatedJob]:
        """The first job of each model that has any, in serving order."""
        firsts = [line[0] for line in self._lines.values()]
        if len(firsts) > 1:
            firsts.sort()
        return [job for _, job in firsts]

    def front(self, model: int, most: int) -> list[SimulatedJob]:
        """Up to `most` jobs of a model, in serving order."""
        return [job for _, job in self._lines.get(model, ())[:most]]

    def count(self, model: int) -> int:
        """How many jobs of a model wait."""
        return len(self._lines.get(model, ()))

    def back(self, most: int) -> Iterator[SimulatedJob]:
        """Up to `most` jobs of each level, last served first. Requires an order by level."""
        assert self._by_level
        return chain.from_iterable(self._last(level, most) for level in range(LEVELS))

    def _last(self, level: int, most: int) -> list[SimulatedJob]:
        """Up to `most` jobs of a level, last served first."""
        found: list[Entry] = []
        for line in self._lines.values():
            first, end = bisect_left(line, ((level, 0),)), bisect_left(line, ((level + 1, 0),))
            found += line[max(first, end - most) : end]
        return [job for _, job in sorted(found, reverse=True)[:most]]
