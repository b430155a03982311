"""Celery's `task-sent` events for jobs that were placed or moved: Flower shows by them in which queue each waits."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec

from tasks.transport import Transport
from taxiway.errors import BrokerUnavailableError
from taxiway.keys import INFER
from taxiway.wire import Envelope

ROUTING_KEY = "task.multi"
"""Celery's routing key for events sent together."""

_KEPT = 1000  # events between two sendings; what is beyond them is not shown

_encode = msgspec.json.Encoder().encode


class SentEvents:
    """Gathers events and sends them together: on the way of a job they cost one append."""

    def __init__(self, name: str) -> None:
        self._node = f"router@{name}"
        self._clock = 0
        self._waiting: list[dict[str, Any]] = []

    def add(self, job: str, queue: str, envelope: Envelope) -> None:
        """Note that a job waits in a queue from now on."""
        if len(self._waiting) >= _KEPT:
            return
        self._clock += 1
        self._waiting.append(
            {
                "type": "task-sent",
                "uuid": job,
                "name": INFER,
                "args": "",
                "kwargs": envelope.headers["kwargsrepr"],
                "queue": queue,
                "exchange": queue,
                "routing_key": queue,
                "root_id": job,
                "parent_id": None,
                "retries": 0,
                "eta": None,
                "expires": None,
                "hostname": self._node,
                "timestamp": time.time(),
                "utcoffset": 0,
                "pid": os.getpid(),
                "clock": self._clock,
            }
        )

    async def send(self, transport: Transport) -> None:
        """Send what was gathered; an event that cannot be sent is dropped."""
        events, self._waiting = self._waiting, []
        if not events:
            return
        try:
            await transport.announce(ROUTING_KEY, _encode(events))
        except BrokerUnavailableError:
            return
