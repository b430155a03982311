"""What a router reports of its jobs to other systems: Celery's `task-sent` events and error links, and trace spans.

Flower shows from the events in which queue each placed or moved job waits. Spans say what was placed, refused and
moved, for messages that carry a trace context.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from opentelemetry.trace import Span, SpanKind

from broker.port import MoveStep
from broker.valkey.jobs import Ending
from broker.valkey.queues import ValkeyTransport
from router.decide.moves.rebalance import Move
from router.service.admission import Place
from router.service.celery_message import After
from router.service.store import RouterStore
from tasks import telemetry
from taxiway.contract.keys import INFER
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

ROUTING_KEY = "task.multi"
"""Celery's routing key for batched events."""

_KEPT = 1000  # events between two sends; further ones are dropped

_encode = msgspec.json.Encoder().encode


class _Sent(msgspec.Struct):
    """One event; fields that are equal in all events have their value here."""

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


async def end_all(store: RouterStore, transport: ValkeyTransport, groups: Sequence[tuple[Ending, After]]) -> None:
    """End jobs and what follows them (`JobStore.finish_all`), and call their error links.

    A link that cannot be called is logged and given up, as its job has ended.
    """
    for queue, call in await store.jobs.finish_all(groups):
        try:
            await transport.send(queue, call)
        except BrokerUnavailableError as error:
            extra = {
                "queue": queue,
                "task": call.headers["task"],
                "job": call.headers["parent_id"],
                "error": error.message,
            }
            logger.warning("an error link could not be called", extra=extra)


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

    async def send(self, transport: ValkeyTransport) -> None:
        """Send the collected events; one that cannot be sent is dropped."""
        events, self._waiting = self._waiting, []
        if events:
            with suppress(BrokerUnavailableError):
                await transport.announce(ROUTING_KEY, _encode(events))


def trace_placement(admitted: Place, store: RouterStore) -> None:
    """Record how a job was placed or held; its message continues that trace. `store` provides the time."""
    headers = admitted.outgoing.envelope.headers
    parent = telemetry.parent_of(headers)
    if parent is None:
        return
    placement, at = admitted.placement, time.time()
    decided = float(admitted.outgoing.fields["placed"]) or admitted.ticket.accepted
    began = at - max(store.clock.now() - decided, 0.0)
    if parent.since:
        telemetry.wait(parent, began, {"taxiway.job": admitted.outgoing.job, "taxiway.held": True})
    attributes: telemetry.Attributes = {
        "taxiway.job": admitted.outgoing.job,
        "taxiway.model": placement.table.model.id,
        "taxiway.class": "" if placement.held else placement.candidate.hardware_class,
        "taxiway.variant": placement.candidate.variant_name,
        "taxiway.level": placement.level,
        "taxiway.held": placement.held,
        "taxiway.reason": placement.reason,
    }
    span = telemetry.begin("place", parent, began, attributes, SpanKind.CONSUMER)
    telemetry.end(span, at)
    telemetry.mark(headers, span, at)


def trace_refusal(headers: Mapping[str, Any], job: str, code: str) -> None:
    """Record that a job was not placed."""
    parent = telemetry.parent_of(headers)
    if parent is not None:
        at = time.time()
        span = telemetry.begin("place", parent, at, {"taxiway.job": job}, SpanKind.CONSUMER)
        telemetry.end(span, at, code)


class MoveTraces:
    """The spans of messages that are about to move together. Each continues its own trace, recorded once moved."""

    def __init__(self, move: Move, steps: Sequence[MoveStep]) -> None:
        self._move = move
        self._at = time.time()
        self._begun: dict[str, tuple[telemetry.ParentSpan, Span]] = {}
        for step in steps:
            parent = telemetry.parent_of(step.envelope.headers)
            if parent is not None:
                self._begun[step.peeked.job] = parent, self._begin(parent, step)

    def end(self, steps: Sequence[MoveStep]) -> None:
        """Record the messages that moved, and their preceding wait."""
        at = time.time()
        for step in steps if self._begun else ():
            if step.peeked.job in self._begun:
                parent, span = self._begun[step.peeked.job]
                telemetry.wait(parent, self._at, {"taxiway.job": step.peeked.job, "taxiway.class": self._move.source})
                telemetry.end(span, at)

    def _begin(self, parent: telemetry.ParentSpan, step: MoveStep) -> Span:
        attributes = {
            "taxiway.job": step.peeked.job,
            "taxiway.source": self._move.source,
            "taxiway.target": self._move.target,
            "taxiway.kind": self._move.kind,
            "taxiway.reason": self._move.reason,
        }
        span = telemetry.begin("move", parent, self._at, attributes)
        telemetry.mark(step.envelope.headers, span, self._at)
        return span
