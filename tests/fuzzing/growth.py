"""By how much a process grows while it is fuzzed."""

from __future__ import annotations

import contextlib

import psutil

from tests.waiting import Watcher

_EVERY = 0.05  # seconds between two looks


class Growth(Watcher):
    """The most bytes of memory that a process had beyond what it has when this begins."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self._process = psutil.Process(pid)
        self._before = self._process.memory_info().rss
        self.most = 0

    def watch(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self.over.wait(_EVERY):
                self.most = max(self.most, self._process.memory_info().rss - self._before)
