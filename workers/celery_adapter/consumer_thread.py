"""What is to be done on the thread that owns the connection of Celery's consumer, the hub's."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_SIGN_OF_LIFE = 1.0  # seconds between two heartbeats to RabbitMQ while Celery's loop rests


class Hub:
    """Callbacks for the hub's thread. Any thread may `call`; the rest is for that thread.

    `link` is the connection of Celery's consumer, and `qos` says how many messages that may take ahead.
    """

    def __init__(self) -> None:
        self.link: Any = None
        self.qos: Any = None
        self._loop: Any = None
        self._callbacks: deque[Callable[[], None]] = deque()
        self._alive_at = 0.0

    def follow(self, loop: Any) -> None:
        """Learn Celery's event loop, anew after each connection."""
        self._loop = loop
        loop.call_soon(self.run)

    def call(self, callback: Callable[[], None]) -> None:
        """Have a callback run soon."""
        self._callbacks.append(callback)
        if len(self._callbacks) == 1 and self._loop is not None:  # else it is awake, and runs this one too
            self._loop.call_soon(self.run)

    def run(self) -> None:
        """Run what was called for."""
        while self._callbacks:
            try:
                self._callbacks[0]()
            except Exception:  # one task's acknowledgement must not end the consumer's loop
                logger.exception("Celery could not end a task")
            finally:
                self._callbacks.popleft()

    def stand_in(self) -> None:
        """Do what Celery's loop does when that has ended: and keep RabbitMQ from taking the worker for dead."""
        self.run()
        now = time.monotonic()
        if self.link is not None and self.link.supports_heartbeats and now > self._alive_at + _SIGN_OF_LIFE:
            self._alive_at = now
            with contextlib.suppress(OSError):
                self.link.connection.send_heartbeat()
