"""How long a device goes on with rows of jobs that have ended. Pure.

A batch of ONNX, torch or JAX cannot be ended. Once its jobs were cancelled or expired, the fleet's count of work has
nothing of it left, and the device is busy all the same: its heartbeat says so.
"""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 1.0
"""Seconds that a batch at its predicted end is expected to go on: a heartbeat, so that it is looked at again."""


@dataclass(frozen=True, slots=True)
class Occupation:
    """A batch that runs and cannot be ended: when it began, by any clock, and its seconds by its profile."""

    began: float
    predicted: float

    def ends_in(self, now: float) -> float:
        """Seconds until it ends; one that takes longer than predicted goes on for as long again as it is late."""
        return abs(self.predicted - (now - self.began))

    def longer_than(self, seconds: float, now: float) -> bool:
        """Whether it takes so long, by its profile or already."""
        return max(self.predicted, now - self.began) > seconds

    def left(self, now: float, unwanted: float) -> float:
        """Seconds that it goes on for the share `unwanted` of its rows.

        One that takes longer than predicted is expected to go on for as long again as it is late.
        """
        return unwanted * max(abs(self.predicted - (now - self.began)), FEWEST) if unwanted else 0.0
