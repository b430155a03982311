"""Whether and when a job runs again after a device fault. Pure.

A worker's retries are bounded by what it answered, so those of a class are, too: at most a tenth of its answers, and a
few for each worker. A device on which everything fails soon retries nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.1
"""Retries that each answer allows."""

FLOOR = 10.0
"""Retries that a worker may make before it has answered anything."""

MOST_SAVED = 100.0
"""Retries that may be saved up: a long time without faults allows no retry storm."""

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
