"""Runs again what failed by a fault of ours, after a pause, as far as the budget goes; a request's own fault never.

`pause` and `Budget` only decide. A worker's retries are bounded by what it answered, so those of a class are, too: at
most a tenth of its answers, and a few for each worker. A device that fails at everything soon retries nothing.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from taxiway.errors import FleetUnavailable, TaxiwayError
from workers.celery_adapter.out_of_memory import Exhaustion
from workers.stages.job import Answered, Delivery, Ended, Ending

logger = logging.getLogger(__name__)

SHARE = 0.1
"""Retries that each answer allows."""

FLOOR = 10.0
"""Retries that a worker may make before it answered anything."""

MOST_SAVED = 100.0
"""Retries that may be saved up: a long good time allows no storm."""

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 30.0
"""Seconds before the first retry, at most, and before any; doubled each time."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many retries may be made now."""

    tokens: float = FLOOR

    @property
    def allows(self) -> bool:
        """Whether one may be made."""
        return self.tokens >= 1

    def earned(self, answers: int) -> Budget:
        """After so many answers."""
        return Budget(min(self.tokens + SHARE * answers, max(MOST_SAVED, self.tokens)))

    def spent(self) -> Budget:
        """After one retry."""
        return Budget(self.tokens - 1)


def pause(retries: int, draw: float) -> float:
    """Seconds before a job runs again that was retried so often; `draw` from [0, 1) keeps jobs apart."""
    longest = min(FIRST_PAUSE * 2.0 ** min(retries, 20), LONGEST_PAUSE)
    return longest * (0.5 + draw / 2)


class Again(Protocol):
    """Takes a delivery that is to run again after `pause` seconds."""

    def __call__(self, delivery: Delivery, *, pause: float) -> None:
        """Take it."""


class Retries:
    """Between the device and those who write results. For the device thread.

    Args:
        end: takes what ended.
        again: takes what runs again; its claim is kept.
        attempts: most runs of one job.
        exhaustion: learns of all that ended; once it `found` the device's memory gone, what failed by that is kept for
            another worker.
    """

    def __init__(
        self, end: Callable[[Sequence[Ending]], None], again: Again, attempts: int, exhaustion: Exhaustion
    ) -> None:
        self._end = end
        self._again = again
        self._attempts = attempts
        self._exhaustion = exhaustion
        self._budget = Budget()

    def put(self, endings: Sequence[Ending]) -> None:
        """Hand on what ended, and retry what may be retried."""
        self._exhaustion.look(endings)
        self._budget = self._budget.earned(sum(isinstance(ending, Answered) for ending in endings))
        self._end([ending for ending in endings if not self._retried(ending)])

    def _retried(self, ending: Ending) -> bool:
        delivery = ending.delivery
        error = ending.outcome.error if isinstance(ending, Ended) else None
        leaves = self._exhaustion.found
        if not isinstance(error, FleetUnavailable) or not (leaves or self._affords(delivery, error)):
            return False
        seconds = LONGEST_PAUSE if leaves else pause(delivery.retries, random.random())
        logger.warning("runs again", extra={"job": delivery.job, "pause": round(seconds, 3), "error": error.message})
        delivery.retries += 1
        delivery.began = 0.0
        self._again(delivery, pause=seconds)
        return True

    def _affords(self, delivery: Delivery, error: TaxiwayError) -> bool:
        """Whether a job may run once more, which is then paid for."""
        if delivery.retries + 1 >= self._attempts:
            return False
        if not self._budget.allows:
            logger.warning("no retry left", extra={"job": delivery.job, "error": error.message})
            return False
        self._budget = self._budget.spent()
        return True
