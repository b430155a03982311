"""The time limit of a draining worker."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

PACKING = 1.0
"""Last seconds of a worker's grace, in which it runs nothing: it requeues its jobs and closes its connections."""

MOMENT = 0.2
"""Seconds that a thread has to finish its writes after the limit."""

_TURN = 0.02  # seconds between calls of `meanwhile`


class Drain:
    """The time after which no work runs here. Thread-safe; signal handlers may bring it forward.

    `by` is on this host's monotonic clock, infinite while the worker does not drain.
    """

    def __init__(self) -> None:
        self.by = math.inf
        self._stops = 0

    @property
    def begun(self) -> bool:
        """Whether the worker is draining."""
        return self.by < math.inf

    @property
    def left(self) -> float:
        """Seconds in which work may still run."""
        return self.by - time.monotonic()

    def within(self, grace: float) -> None:
        """Drain within `grace` seconds, or sooner if an earlier call asked for that."""
        self.by = min(self.by, time.monotonic() + max(grace - PACKING, 0.0))

    def wait_for(self, thread: threading.Thread, meanwhile: Callable[[], None]) -> None:
        """Wait until the thread has ended or the time limit has passed, but always for a short moment."""
        least = time.monotonic() + MOMENT
        while thread.is_alive() and (self.left > 0 or time.monotonic() < least):
            thread.join(_TURN)
            meanwhile()

    def stop(self, grace: float) -> None:
        """Drain within `grace` seconds; a second call drains at once."""
        self._stops += 1
        self.within(grace if self._stops == 1 else 0.0)
