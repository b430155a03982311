"""Which waiting jobs a draining worker cannot finish. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import TypeVar

Job = TypeVar("Job", bound=Hashable)

Stint = tuple[Collection[Job], float]
"""A waiting batch: the jobs with rows in it, and its run time in seconds."""


def unfinished(stints: Iterable[Stint[Job]], left: float) -> set[Job]:
    """The jobs that do not end within `left` seconds if the batches run one after another in this order.

    A batch is skipped if it would end too late, or if all its jobs have rows in a skipped batch: later batches get its
    time.
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
