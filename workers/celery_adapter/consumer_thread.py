"""Calls on the thread of Celery's consumer, which owns its connection."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_BEAT = 1.0  # seconds between two heartbeats to RabbitMQ while Celery's loop rests


class ConsumerThread:
    """Calls to be made on the consumer's thread. Any thread may `call`; the rest is for that thread.

    `connection` is that of Celery's consumer, and `qos` says how many messages it may take ahead.
    """

    def __init__(self) -> None:
        self.connection: Any = None
        self.qos: Any = None
        self._loop: Any = None
        self._callbacks: deque[Callable[[], object]] = deque()
        self._beat_at = 0.0

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

    def stand_in(self) -> None:
        """Do what Celery's loop did, once that has ended: make calls, and send RabbitMQ its heartbeats."""
        self.run()
        now = time.monotonic()
        if self.connection is not None and self.connection.supports_heartbeats and now > self._beat_at + _BEAT:
            self._beat_at = now
            with contextlib.suppress(OSError):
                self.connection.connection.send_heartbeat()
