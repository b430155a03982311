"""What of the waiting work the leader looks at, and which of it is alike."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from router.decide.snapshot import Backlog
from router.decide.working_snapshot import TOLERANCE, WorkingSnapshot

_ALIKE = 2.0  # sizes and times left within this factor count as equal; at 1.5 a tick takes 50 % longer


@dataclass(frozen=True, slots=True)
class Queued:
    """A job in the queue of a class. `work` is its device seconds there; jobs of one group have `kind` in common."""

    queue: str
    level: int
    work: float
    kind: Hashable


Q = TypeVar("Q", bound=Queued)


def backlogged(working: WorkingSnapshot, tick: float) -> list[str]:
    """The classes with more work than they serve within a tick; empty if all work is on the only live class.

    Of a site that drains, all classes with work: also such as should be done by now, and waits behind a long job.
    """
    devices = {name: working.fleet.serving(name) for name in working.backlog.classes}
    if working.fleet.draining:
        behind = [name for name in devices if sum(working.fleet.work.get(name, ())) > 0]
    else:
        behind = [name for name, live in devices.items() if sum(working.backlog.levels(name)) > tick * live]
    return behind if any(live for name, live in devices.items() if behind != [name]) else []


def abandoned(working: WorkingSnapshot) -> list[str]:
    """Classes that queues.yaml no longer has, with work in their queues that no live device serves."""
    fleet, known = working.fleet, working.backlog.classes
    behind = (name for name, levels in fleet.work.items() if name not in known and sum(levels) > 0)
    return sorted(name for name in behind if not fleet.of_class(name))


def window_per_level(window: int, names: Sequence[str], backlog: Backlog) -> int:
    """Jobs to inspect at each level of these queues: one window, shared by the levels that have work."""
    filled = sum(seconds > TOLERANCE for name in names for seconds in backlog.levels(name))
    return max(window // max(filled, 1), 1)


def group_by_kind(jobs: Iterable[Q], backlog: Backlog) -> list[list[tuple[Q, float]]]:
    """The jobs by kind, each with the device seconds served before it.

    They arrive in the order of `peek` and keep it: within each queue and level, last served first.
    """
    before = {name: list(accumulate(backlog.levels(name))) for name in backlog.classes}
    kinds: dict[Hashable, list[tuple[Q, float]]] = {}
    for job in jobs:
        levels = before[job.queue]
        levels[job.level] -= job.work
        kinds.setdefault(job.kind, []).append((job, max(levels[job.level], 0.0)))
    return list(kinds.values())


def magnitude(value: float | None) -> int | None:
    """Equal for values within the factor `_ALIKE`: sizes, and times left."""
    return None if value is None else round(math.log(max(value, 1e-3), _ALIKE))
