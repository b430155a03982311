"""By how much a process grows while it is fuzzed."""

from __future__ import annotations

import contextlib
import threading

import psutil

_EVERY = 0.05  # seconds between two looks


class Growth:
    """The most bytes of memory that a process had beyond what it has when this begins."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = 0

    def __enter__(self) -> Growth:
        self._before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._ended.wait(_EVERY):
                self.most = max(self.most, self._process.memory_info().rss - self._before)
