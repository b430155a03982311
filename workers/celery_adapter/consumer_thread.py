"""Calls on the thread of Celery's consumer, which owns its connection."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class ConsumerThread:
    """Calls to be made on the consumer's thread. Any thread may `call`; the rest is for that thread."""

    def __init__(self) -> None:
        self._loop: Any = None
        self._callbacks: deque[Callable[[], object]] = deque()

    def follow(self, loop: Any) -> None:
        """Set Celery's event loop; called after each connection."""
        self._loop = loop
        loop.call_soon(self.run)

    def call(self, callback: Callable[[], object]) -> None:
        """Have a callback run soon."""
        self._callbacks.append(callback)
        if len(self._callbacks) == 1 and self._loop is not None:  # else it is awake, and makes this call too
            self._loop.call_soon(self.run)

    def run(self) -> None:
        """Make the calls that wait."""
        while self._callbacks:
            try:
                self._callbacks[0]()
            except Exception:  # one task's acknowledgement must not end the consumer's loop
                logger.exception("Celery could not end a task")
            finally:
                self._callbacks.popleft()
