"""When a worker that was told to leave is gone, and which of its work ends before. Decisions are pure."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import TypeVar

PACKING = 1.0
"""Seconds of its grace in which a worker runs nothing: it hands back what is left, and closes its connections."""

MOMENT = 0.2
"""Seconds that a thread has to write what it has, when the time is over."""

_TURN = 0.02  # seconds between two looks at what is to be done meanwhile

Job = TypeVar("Job", bound=Hashable)

Stint = tuple[Collection[Job], float]
"""A batch that waits: the jobs that have rows in it, and the seconds that it takes once it has its turn."""


class Departure:
    """The time by which nothing runs here any more. Threads may share it; signal handlers may bring it forward.

    `by` is of this host's monotonic clock, infinite for a worker that was not told to leave.
    """

    def __init__(self) -> None:
        self.by = math.inf
        self._stops = 0

    @property
    def told(self) -> bool:
        """Whether the worker is to leave."""
        return self.by < math.inf

    @property
    def left(self) -> float:
        """Seconds in which work may still run."""
        return self.by - time.monotonic()

    def within(self, grace: float) -> None:
        """Leave within `grace` seconds, or sooner where that was said before."""
        self.by = min(self.by, time.monotonic() + max(grace - PACKING, 0.0))

    def wait_for(self, thread: threading.Thread, meanwhile: Callable[[], None]) -> None:
        """Wait until the thread has ended, or until no work may run any more, a moment at least."""
        least = time.monotonic() + MOMENT
        while thread.is_alive() and (self.left > 0 or time.monotonic() < least):
            thread.join(_TURN)
            meanwhile()

    def stop(self, grace: float) -> None:
        """Leave within `grace` seconds; asked again, at once."""
        self._stops += 1
        self.within(grace if self._stops == 1 else 0.0)


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
