"""Ends a worker whose device has no memory left for what ran there before: a leak, or what a fault left behind.

A request may itself be too large for any device, so a variant that had no memory for several jobs in a row runs its
model's own example: where that is answered, the jobs were too large, and the worker stays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from celery.worker import state

from taxiway.errors import DeviceFaultError
from workers.drain import Departure
from workers.stages.job import Answered, Ended, Ending

logger = logging.getLogger(__name__)

EXHAUSTED = os.EX_OSERR
"""Exit status of a worker whose device has no memory left (71): its supervisor starts another."""


class Exhaustion:
    """Watches how jobs end. For the device thread.

    Args:
        most: jobs in a row that a variant may have no memory for.
        runs_example: whether a variant, by its key, still answers its model's example.
        departure: told that the worker leaves now, with nothing run to its end.

    `found` says that the device has no memory left.
    """

    def __init__(self, most: int, runs_example: Callable[[str], bool], departure: Departure) -> None:
        self.found = False
        self._most = most
        self._runs_example = runs_example
        self._departure = departure
        self._starved: dict[str, set[str]] = {}

    def look(self, endings: Sequence[Ending]) -> None:
        """Learn from what ended."""
        for ending in endings:
            if isinstance(ending, Answered):
                self._starved.pop(ending.job.key, None)
            elif isinstance(ending, Ended) and isinstance(ending.outcome.error, DeviceFaultError):
                self._starve(str(ending.outcome.error.details.get("variant")), ending.delivery.job)

    def _starve(self, variant: str, job: str) -> None:
        jobs = self._starved.setdefault(variant, set())
        jobs.add(job)
        if self.found or len(jobs) < self._most:
            return
        del self._starved[variant]
        self.found = not self._runs_example(variant)
        if self.found:
            logger.critical("the device has no memory left: the worker gives its jobs up", extra={"variant": variant})
            self._departure.within(0.0)
            state.should_stop = EXHAUSTED  # type: ignore[assignment]  # None in Celery's module, until somebody says so
