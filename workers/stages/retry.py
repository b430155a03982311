"""Between device and finish: jobs that failed by a device fault run again, as far as the retry budget goes.

A request's own error is never retried. A worker whose device has no memory left for what ran there before (a leak, or
what a fault left behind) gives its jobs up and exits. A request may itself be too large for any device, so a variant
that had no memory for several jobs in a row runs its model's own example: where that succeeds, the jobs were too large,
and the worker stays.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Sequence

from taxiway.errors import DeviceFaultError, FleetUnavailable, TaxiwayError
from workers.decide.retry import LONGEST_PAUSE, Budget, pause
from workers.drain import Drain
from workers.stages.job import Answered, Delivery, Ended, Ending
from workers.stages.ports import CeleryWorker
from workers.stages.queues import AdmitQueue, EndingSink

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = os.EX_OSERR
"""Exit status of a worker whose device has no memory left (71): its supervisor starts another."""


class OutOfMemoryPolicy:
    """Watches how jobs end, and has the worker exit when its device has no memory left. For the device thread.

    Args:
        most: jobs in a row that a variant may have no memory for.
        runs_example: whether a variant, by its key, still answers its model's example.

    `exhausted` says that the device has no memory left.
    """

    def __init__(self, most: int, runs_example: Callable[[str], bool], drain: Drain, celery: CeleryWorker) -> None:
        self.exhausted = False
        self._most = most
        self._runs_example = runs_example
        self._drain = drain
        self._celery = celery
        self._starved: dict[str, set[str]] = {}

    def observe(self, endings: Sequence[Ending]) -> None:
        """Learn from what ended."""
        for ending in endings:
            if isinstance(ending, Answered):
                self._starved.pop(ending.job.key, None)
            elif isinstance(ending, Ended) and isinstance(ending.outcome.error, DeviceFaultError):
                self._starve(str(ending.outcome.error.details.get("variant")), ending.delivery.job)

    def _starve(self, variant: str, job: str) -> None:
        jobs = self._starved.setdefault(variant, set())
        jobs.add(job)
        if self.exhausted or len(jobs) < self._most:
            return
        del self._starved[variant]
        self.exhausted = not self._runs_example(variant)
        if self.exhausted:
            logger.critical("the device has no memory left: the worker gives its jobs up", extra={"variant": variant})
            self._drain.within(0.0)
            self._celery.exit(OUT_OF_MEMORY)


class Retries:
    """Passes endings on to the finish stage, but for jobs that run again. For the device thread.

    Args:
        finish: takes what ended.
        admit: takes what runs again; its claim is kept.
        attempts: most runs of one job.
        memory: once it finds the device's memory exhausted, jobs that failed by that are kept for another worker.
    """

    def __init__(self, finish: EndingSink, admit: AdmitQueue, attempts: int, memory: OutOfMemoryPolicy) -> None:
        self._finish = finish
        self._admit = admit
        self._attempts = attempts
        self._memory = memory
        self._budget = Budget()

    def put(self, endings: Sequence[Ending]) -> None:
        """Pass on what ended, and retry what may be retried."""
        self._memory.observe(endings)
        self._budget = self._budget.earned(sum(isinstance(ending, Answered) for ending in endings))
        self._finish.put([ending for ending in endings if not self._retried(ending)])

    def _retried(self, ending: Ending) -> bool:
        delivery = ending.delivery
        error = ending.outcome.error if isinstance(ending, Ended) else None
        leaves = self._memory.exhausted
        if not isinstance(error, FleetUnavailable) or not (leaves or self._affords(delivery, error)):
            return False
        seconds = LONGEST_PAUSE if leaves else pause(delivery.retries, random.random())
        logger.warning("runs again", extra={"job": delivery.job, "pause": round(seconds, 3), "error": error.message})
        delivery.retries += 1
        delivery.began = 0.0
        self._admit.put(delivery, pause=seconds)
        return True

    def _affords(self, delivery: Delivery, error: TaxiwayError) -> bool:
        """Whether a job may run once more; its retry is then paid for."""
        if delivery.retries + 1 >= self._attempts:
            return False
        if not self._budget.allows:
            logger.warning("no retry left", extra={"job": delivery.job, "error": error.message})
            return False
        self._budget = self._budget.spent()
        return True
