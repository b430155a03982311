"""Pauses between attempts that fail. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that double with each failure in a row, up to a limit."""

    first: float  # seconds
    longest: float  # seconds
    spread: float = 0.0  # share of a pause by which jitter shortens it at most

    def pause(self, failures: int, draw: float = 1.0) -> float:
        """Seconds until the next attempt after `failures` failures, 1 or more; `draw` from [0, 1] is the jitter."""
        return min(self.first * 2.0 ** min(failures - 1, 64), self.longest) * (1 - self.spread * (1 - draw))
