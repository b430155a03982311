"""A draining worker's time limit, and the watch for a reclaim notice.

A notice is a signal, a file that appears, or the end of the class's hours.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from tasks.topology import Notice

PACKING = 1.0
"""Last seconds of a worker's grace, in which it runs nothing: it requeues its jobs and closes its connections."""

MOMENT = 0.2
"""Seconds that a thread has to finish its writes after the limit."""

_TURN = 0.02  # seconds between calls of `meanwhile`

logger = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR2
"""The signal for a notice. Celery uses TERM, INT, QUIT, HUP and USR1; this one only if CELERY_RDBSIG is set."""

POLL_EVERY = 1.0
"""Seconds between polls."""


class Drain:
    """The time after which no work runs here. Thread-safe; signal handlers may bring it forward.

    `by` is on this host's monotonic clock, infinite while the worker does not drain.
    """

    def __init__(self) -> None:
        self.by = math.inf
        self._stops = 0

    @property
    def begun(self) -> bool:
        """Whether the worker is draining."""
        return self.by < math.inf

    @property
    def left(self) -> float:
        """Seconds in which work may still run."""
        return self.by - time.monotonic()

    def within(self, grace: float) -> None:
        """Drain within `grace` seconds, or sooner if an earlier call asked for that."""
        self.by = min(self.by, time.monotonic() + max(grace - PACKING, 0.0))

    def wait_for(self, thread: threading.Thread, meanwhile: Callable[[], None]) -> None:
        """Wait until the thread has ended or the time limit has passed, but always for a short moment."""
        least = time.monotonic() + MOMENT
        while thread.is_alive() and (self.left > 0 or time.monotonic() < least):
            thread.join(_TURN)
            meanwhile()

    def stop(self, grace: float) -> None:
        """Drain within `grace` seconds; a second call drains at once."""
        self._stops += 1
        self.within(grace if self._stops == 1 else 0.0)


@dataclass(slots=True, eq=False)
class NoticeWatch:
    """Polls for a notice until stopped."""

    notice: Notice
    leave: Callable[[float], None]
    """Called with the seconds until the machine is gone, at every poll that finds a notice."""
    closes: Callable[[], float] = lambda: math.inf
    """The seconds until the class's hours end."""
    grace: float = 0.0
    """The last of these seconds count as a notice."""
    _wake: SimpleQueue[None] = field(default_factory=SimpleQueue)  # a signal handler may put into it
    _signals: int = 0
    _stopped: bool = False

    def signal(self) -> None:
        """Count a signal; a second one means to exit at once. Called by the signal handler."""
        self._signals += 1
        self._wake.put(None)

    def stop(self) -> None:
        """End `run`. Any thread may call it."""
        self._stopped = True
        self._wake.put(None)

    def run(self) -> None:
        """Poll every `POLL_EVERY` seconds, and at once after a signal."""
        while not self._stopped:
            grace = self.look()
            if grace is not None:
                self.leave(grace)
            with contextlib.suppress(Empty):
                self._wake.get(timeout=POLL_EVERY)

    def look(self) -> float | None:
        """Seconds until the machine is gone; None without a notice."""
        graces = [] if (said := self._file()) is None else [said]
        if self._signals:
            graces.append(self.notice.grace if self._signals == 1 else 0.0)
        if (left := self.closes()) <= self.grace:
            graces.append(left)
        return min(graces, default=None)

    def _file(self) -> float | None:
        """The seconds that the file names, else the class's grace; None while there is no file."""
        if self.notice.file is None:
            return None
        try:
            text = Path(self.notice.file).read_text(errors="replace")
        except OSError:
            return None
        seconds = math.nan
        with contextlib.suppress(ValueError):
            seconds = float(text)
        return seconds if 0 <= seconds < math.inf else self.notice.grace
