"""Pauses between attempts that fail, and what a process logs while a server does not answer."""

from __future__ import annotations

import logging
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


_BACKOFF = Backoff(0.05, 1.0)


class Outage:
    """Logs the `event` once with its reason, and its end, and gives the pause between attempts. For one thread."""

    def __init__(self, logger: logging.Logger, event: str, **extra: str) -> None:
        self._logger, self._event, self._extra = logger, event, extra
        self._failures = 0

    def pause(self, error: Exception) -> float:
        """Seconds to wait after one more failure."""
        if self._failures == 0:
            self._logger.warning(self._event, extra={**self._extra, "error": str(error)})
        self._failures += 1
        return _BACKOFF.pause(self._failures)

    def over(self) -> None:
        """The server answered."""
        if self._failures:
            extra = {"outage": self._event, **self._extra, "failures": self._failures}
            self._logger.info("available again", extra=extra)
        self._failures = 0
