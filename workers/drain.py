"""By when a worker that drains has stopped running work."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

PACKING = 1.0
"""Seconds of its grace in which a worker runs nothing: it hands back what is left, and closes its connections."""

MOMENT = 0.2
"""Seconds that a thread has to write what it has, when the time is over."""

_TURN = 0.02  # seconds between two looks at what is to be done meanwhile


class Drain:
    """The time by which nothing runs here any more. Threads may share it; signal handlers may bring it forward.

    `by` is of this host's monotonic clock, infinite for a worker that does not drain.
    """

    def __init__(self) -> None:
        self.by = math.inf
        self._stops = 0

    @property
    def begun(self) -> bool:
        """Whether the worker drains."""
        return self.by < math.inf

    @property
    def left(self) -> float:
        """Seconds in which work may still run."""
        return self.by - time.monotonic()

    def within(self, grace: float) -> None:
        """Drain within `grace` seconds, or sooner where that was asked before."""
        self.by = min(self.by, time.monotonic() + max(grace - PACKING, 0.0))

    def wait_for(self, thread: threading.Thread, meanwhile: Callable[[], None]) -> None:
        """Wait until the thread has ended, or until no work may run any more, a moment at least."""
        least = time.monotonic() + MOMENT
        while thread.is_alive() and (self.left > 0 or time.monotonic() < least):
            thread.join(_TURN)
            meanwhile()

    def stop(self, grace: float) -> None:
        """Drain within `grace` seconds; asked again, at once."""
        self._stops += 1
        self.within(grace if self._stops == 1 else 0.0)
