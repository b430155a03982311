"""Whose result to read without having heard of it: what is missed in spite of all, by whomever, is found so. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

PAUSE = 3.0
"""Seconds between two looks: who missed an announcement hears after 3 to 6 of them, while there are few waiters."""

AT_ONCE = 2048
"""Results read in one look at most, however many wait: 0.8 ms of the reader's processor time, 0.2 of the store's."""


class Rounds:
    """Takes waiters in turn: none before it has waited for a look, and each before any comes again."""

    def __init__(self) -> None:
        self._left: deque[str] = deque()

    def take(self, waiting: Collection[str]) -> Sequence[str]:
        """The jobs to read in this look, of those that are waited for."""
        taken: list[str] = []
        while self._left and len(taken) < AT_ONCE:
            job = self._left.popleft()
            if job in waiting:
                taken.append(job)
        if not self._left:
            self._left.extend(waiting)
        return taken
