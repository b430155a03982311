"""Which waiting jobs a worker that drains does not run to their end. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import TypeVar

Job = TypeVar("Job", bound=Hashable)

Stint = tuple[Collection[Job], float]
"""A batch that waits: the jobs that have rows in it, and the seconds that it takes once it runs."""


def unfinished(stints: Iterable[Stint[Job]], left: float) -> set[Job]:
    """The jobs that do not end within `left` seconds, where batches run in this order, one after the other.

    A batch that would end too late is not run, nor one whose jobs all have rows in such a batch: what comes behind has
    that time.
    """
    late: set[Job] = set()
    spent = 0.0
    for jobs, seconds in stints:
        if late.issuperset(jobs):
            continue
        if spent + seconds > left:
            late.update(jobs)
        else:
            spent += seconds
    return late
