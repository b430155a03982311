"""What workers did: outcomes and latencies, counted since a worker's start, as its heartbeat tells them to routers."""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

import msgspec

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Upper bounds of the buckets, in seconds: from an echo's batch to a bulk job's hour."""

Stage = Literal["queue", "run", "total"]
"""What a latency is of: from acceptance to the start, the batches it ran in, from acceptance to the result."""

STAGES: tuple[Stage, ...] = ("queue", "run", "total")


class Ran(msgspec.Struct, frozen=True):
    """What was done for one model.

    Jobs that were `answered`, with their `rows`, the seconds that they waited (`queue`), were in batches (`run`) and
    took from acceptance to result (`total`), in all, and the `batches` that they were, each job a share of its own.
    Jobs that had begun and `failed`, with the seconds that they took (`lost`). When, in Unix time, the `last` ended.
    """

    answered: int = 0
    failed: int = 0
    rows: int = 0
    batches: float = 0.0
    queue: float = 0.0
    run: float = 0.0
    total: float = 0.0
    lost: float = 0.0
    last: float = 0.0

    def plus(self, more: Ran, less: Ran) -> Ran:
        """This and what `more` has beyond `less`."""
        sums = {
            name: getattr(self, name) + getattr(more, name) - getattr(less, name)
            for name in self.__struct_fields__
            if name != "last"
        }
        return Ran(**sums, last=max(self.last, more.last))


class Done(msgspec.Struct, frozen=True):
    """What was done for one hardware class.

    `outcomes` counts jobs by their final state; `latency` maps each stage to jobs by bucket, with one more for those
    beyond all bounds, and then their seconds in all. `rejected` counts messages that no router had ordered. `models`
    has each model's part, by its id.
    """

    outcomes: dict[str, int] = {}
    latency: dict[Stage, tuple[float, ...]] = {}
    rejected: int = 0
    models: dict[str, Ran] = {}


def empty() -> list[float]:
    """The figures of a stage that no job went through."""
    return [0.0] * (len(BOUNDS) + 2)


def count(figures: list[float], seconds: float) -> None:
    """Count one job in a stage's figures."""
    figures[bisect_left(BOUNDS, seconds)] += 1
    figures[-1] += seconds
