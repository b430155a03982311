"""Celery's `task-sent` events for placed and moved jobs: Flower shows from them in which queue each job waits."""

from __future__ import annotations

import os
import time

import msgspec

from broker.port import Transport
from taxiway.contract.keys import INFER
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError

ROUTING_KEY = "task.multi"
"""Celery's routing key for batched events."""

_KEPT = 1000  # events between two sends; further ones are dropped

_encode = msgspec.json.Encoder().encode


class _Sent(msgspec.Struct):
    """One event; fields that are the same in all have their value here."""

    uuid: str
    kwargs: str
    queue: str
    exchange: str
    routing_key: str
    root_id: str
    hostname: str
    timestamp: float
    pid: int
    clock: int
    type: str = "task-sent"
    name: str = INFER
    args: str = ""
    parent_id: None = None
    retries: int = 0
    eta: None = None
    expires: None = None
    utcoffset: int = 0


class SentEvents:
    """Collects events and sends them together: adding one costs a job a single list append."""

    def __init__(self, name: str) -> None:
        self._node = f"router@{name}"
        self._pid = os.getpid()
        self._clock = 0
        self._waiting: list[_Sent] = []

    def add(self, job: str, queue: str, envelope: Envelope) -> None:
        """Record that a job now waits in a queue."""
        if len(self._waiting) >= _KEPT:
            return
        self._clock += 1
        shown = envelope.headers["kwargsrepr"]
        sent = _Sent(job, shown, queue, queue, queue, job, self._node, time.time(), self._pid, self._clock)
        self._waiting.append(sent)

    async def send(self, transport: Transport) -> None:
        """Send the collected events; one that cannot be sent is dropped."""
        events, self._waiting = self._waiting, []
        if not events:
            return
        try:
            await transport.announce(ROUTING_KEY, _encode(events))
        except BrokerUnavailableError:
            return
