"""Retries jobs that a device fault ended, within the retry budget, and ends a worker whose device memory is exhausted.

A request's own error is never retried. If the device has no memory left for work that it ran before (a leak, or the
remains of a fault), the worker requeues its jobs and exits. A request may also be too large for any device: a variant
that ran out of memory for several jobs in a row runs its model's example. If that succeeds, the jobs were too large and
the worker stays.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Sequence

from broker.outage import Outage
from broker.valkey.worker_store import WorkerStore, insist
from taxiway.errors import BrokerUnavailableError, DeviceFaultError, FleetUnavailable, TaxiwayError
from workers.decide.faults import RETRIES, Budget
from workers.stages.job import Answered, Delivery, Ended, Ending
from workers.stages.queues import Shared

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = os.EX_OSERR
"""Exit status of a worker whose device memory is exhausted (71): its supervisor starts another."""


def count_runs(store: WorkerStore, suspects: Sequence[Delivery], stopping: threading.Event) -> bool:
    """Count a run of each, alone, in the store before it begins: it may crash this worker. False without an answer."""
    begun = [(delivery.job, delivery.token, delivery.started) for delivery in suspects]

    def count() -> None:
        store.start(begun)
        store.alone([(job, token) for job, token, _ in begun], alone=True)

    try:
        insist(count, stopping, Outage(logger, "cannot count attempts"))
    except BrokerUnavailableError:  # stopping: the messages are delivered again
        return False
    for delivery in suspects:
        delivery.start_stored = True
    return True


class Retries:
    """Passes endings to the finish stage, except jobs to be retried. Only who has the device's turn.

    A retried delivery keeps its claim. Once the device's memory is exhausted, jobs that ran out of memory are kept for
    another worker. `runs_example` says whether a variant, by its key, can still run its model's example.
    """

    def __init__(self, shared: Shared, runs_example: Callable[[str], bool]) -> None:
        self._shared = shared
        self._limits = shared.store.limits
        self._runs_example = runs_example
        self._budget = Budget()
        self._exhausted = False
        self._starved: dict[str, set[str]] = {}

    def put(self, endings: Sequence[Ending]) -> None:
        """Pass on endings, and retry where allowed."""
        for ending in endings:
            if isinstance(ending, Answered):
                self._starved.pop(ending.job.key, None)
            elif isinstance(ending, Ended) and isinstance(ending.error, DeviceFaultError):
                self._starve(str(ending.error.details.get("variant")), ending.delivery.job)
        self._budget = self._budget.earned(sum(isinstance(ending, Answered) for ending in endings))
        self._shared.endings.put([ending for ending in endings if not self._retried(ending)])

    def _starve(self, variant: str, job: str) -> None:
        """Note that a job ran out of memory; the worker exits once that is the device's fault."""
        jobs = self._starved.setdefault(variant, set())
        jobs.add(job)
        if self._exhausted or len(jobs) < self._limits.memory_faults:
            return
        del self._starved[variant]
        self._exhausted = not self._runs_example(variant)
        if self._exhausted:
            logger.critical("device memory exhausted; worker requeues its jobs and exits", extra={"variant": variant})
            self._shared.drain.within(0.0)
            self._shared.celery.exit(OUT_OF_MEMORY)

    def _retried(self, ending: Ending) -> bool:
        delivery = ending.delivery
        error = ending.error if isinstance(ending, Ended) else None
        leaves = self._exhausted
        if not isinstance(error, FleetUnavailable) or not (leaves or self._affords(delivery, error)):
            return False
        seconds = RETRIES.longest if leaves else RETRIES.pause(delivery.retries + 1, random.random())
        logger.warning("runs again", extra={"job": delivery.job, "pause": round(seconds, 3), "error": error.message})
        delivery.retries += 1
        delivery.began = 0.0
        self._shared.admissions.put(delivery, pause=seconds)
        return True

    def _affords(self, delivery: Delivery, error: TaxiwayError) -> bool:
        """Whether a job may be retried; if so, the budget is charged."""
        if delivery.retries + 1 >= self._limits.attempts:
            return False
        if not self._budget.allows:
            logger.warning("no retry left", extra={"job": delivery.job, "error": error.message})
            return False
        self._budget = self._budget.spent()
        return True
