"""Whether and when a job runs again after a device fault. Pure.

Retries are limited to a tenth of a worker's answers plus a few per worker, which bounds them for a class too. A device
on which everything fails soon stops retrying.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.1
"""Retries that each answer allows."""

FLOOR = 10.0
"""Retries that a worker may make before its first answer."""

MOST_SAVED = 100.0
"""Maximum saved retries: a long time without faults does not allow a retry storm."""

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 30.0
"""Maximum seconds before the first retry, doubled each time, and before any retry."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The retry budget: how many retries are available now."""

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
    """Seconds before the next retry of a job; `draw` from [0, 1) is the jitter."""
    longest = min(FIRST_PAUSE * 2.0 ** min(retries, 20), LONGEST_PAUSE)
    return longest * (0.5 + draw / 2)
