"""What has run and is not written yet: bounded, for it is held, and what is held must be kept and cannot move."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from workers.stages.job import Ending

MOST = 1024
"""Endings that may wait before no more is fetched: what the finisher writes in some 50 ms (benchmarks.queue_depth)."""


class Backlog:
    """Endings on their way to the finisher, which alone takes them. Any thread may put."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Sequence[Ending] | None] = queue.SimpleQueue()
        self._unwritten = 0
        self._fewer = threading.Condition()

    def put(self, endings: Sequence[Ending]) -> None:
        """Add endings; none wakes the finisher."""
        if endings:
            with self._fewer:
                self._unwritten += len(endings)
        self._inbox.put(endings)

    def close(self) -> None:
        """Say that nothing follows."""
        self._inbox.put(None)

    def take(self) -> tuple[list[Ending], bool]:
        """All that is there, once something is; and whether nothing follows."""
        taken: list[Ending] = []
        got = self._inbox.get()
        while got is not None:
            taken += got
            try:
                got = self._inbox.get_nowait()
            except queue.Empty:
                return taken, False
        return taken, True

    def wrote(self, endings: int) -> None:
        """Forget so many that were taken."""
        with self._fewer:
            self._unwritten -= endings
            self._fewer.notify_all()

    def wait_until_short(self, longest: float) -> bool:
        """Whether fewer than `MOST` are unwritten, now or within `longest` seconds. Any thread may ask."""
        with self._fewer:
            return self._fewer.wait_for(lambda: self._unwritten < MOST, longest)
