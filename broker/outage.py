"""What a process logs while a server does not answer: once that it is so, and once that it is over."""

from __future__ import annotations

import logging

from taxiway.backoff import Backoff

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
