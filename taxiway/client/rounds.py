"""Which stored results to poll, as a safety net for missed announcements. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

PAUSE = 3.0
"""Seconds between passes. With few waiters, a missed announcement is recovered after 3 to 6 s."""

AT_ONCE = 2048
"""Most results read in one pass: 0.8 ms of CPU time at the reader, 0.2 ms at the store."""


class Rounds:
    """Polls waiters in turn: each only after it has waited for a pass, and none twice before all others."""

    def __init__(self) -> None:
        self._left: deque[str] = deque()

    def take(self, waiting: Collection[str]) -> Sequence[str]:
        """The jobs to read in this pass, out of `waiting`."""
        taken: list[str] = []
        while self._left and len(taken) < AT_ONCE:
            job = self._left.popleft()
            if job in waiting:
                taken.append(job)
        if not self._left:
            self._left.extend(waiting)
        return taken
