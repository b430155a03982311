"""A job that Celery's consumer received, as the stages see it (`workers.stages.job.CeleryTask`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery, states
from celery.app.task import Context
from celery.worker.request import Request
from celery.worker.state import task_ready

from broker.valkey.records import Ending
from broker.valkey.worker import Store
from tasks.telemetry import trail_of
from tasks.ticket import Ticket
from taxiway.contract.job import JobState
from taxiway.contract.wire import HEADER
from taxiway.errors import TaxiwayError
from workers.celery_adapter import events
from workers.celery_adapter.backend import OUTCOME, STORED, TOKEN
from workers.celery_adapter.consumer_thread import ConsumerThread
from workers.celery_adapter.strategy import bytes_of, class_of, keep_message
from workers.stages.job import Delivery, Outcome

logger = logging.getLogger(__name__)

Traced = tuple[int, Any, float]
"""What Celery's tracer answers: whether it failed, the value as text or the exception, and the run time."""


class ReceivedTask:
    """What Celery handed to the pool.

    Args:
        fields: the request's context, which the tracer reads.
        succeed: has Celery acknowledge what its tracer ended.
        remember: takes a written end, if it can be written again as it is.
    """

    def __init__(
        self,
        app: Celery,
        store: Store,
        thread: ConsumerThread,
        request: Request,
        tracer: Callable[..., Traced],
        task: str,
        fields: dict[str, Any],
        succeed: Callable[[Traced], None],
        remember: Callable[[Ending], None],
    ) -> None:
        self._app = app
        self._store = store
        self._thread = thread
        self._request = request
        self._tracer = tracer
        self._task = task
        self._fields = fields
        self._succeed = succeed
        self._remember = remember
        self.delivery = self._delivery()

    @property
    def followed(self) -> bool:
        """Whether other tasks follow from this one: a link, an errback, a chain or a chord."""
        return any(self._embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord"))

    def start(self) -> None:
        """Report that the task runs."""
        accepted: Callable[[int, float], None] = self._request.on_accepted  # type: ignore[assignment]  # Celery passes an int
        self._thread.call(partial(accepted, os.getpid(), time.monotonic()))

    def finish(self, outcome: Outcome, token: str, written: Ending | None) -> None:
        """Run Celery's tracer around the outcome: signals, events, callbacks, and the result unless it is written."""
        self._fields |= {OUTCOME: outcome, TOKEN: token} | ({STORED: True} if written is not None else {})
        if written is not None and not outcome.blobs and written.state is not JobState.DEAD:  # that may be replayed
            self._remember(written)
        try:
            payload = self._request.message.payload
            failed, value, seconds = self._tracer(self._task, self.delivery.job, self._fields, payload, None, None)
        except Exception:  # a callback that cannot be sent, a signal's receiver
            logger.exception("a task could not be ended", extra={"job": self.delivery.job})
            self.requeue()
            return
        if outcome.result is not None:  # Flower shows this as the task's runtime
            seconds = outcome.result.report.run_time
        self._thread.call(lambda: self._succeed((failed, value, seconds)))

    def drop(self, error: TaxiwayError | None) -> None:
        """Acknowledge a task that had ended, and report it as revoked if it was cancelled or expired."""
        if self._embed.get("chord"):
            self._count_chord_part()
        event = events.revoked(self.delivery, error)
        self._thread.call(partial(self._acknowledge, event))

    def revoke(self) -> None:
        """Have Celery end a task that its remote control revoked."""
        self._thread.call(self._request.revoked)

    def requeue(self) -> None:
        """Have Celery return the message to its queue."""
        self._thread.call(partial(self._request.reject, requeue=True))

    def dead_letter(self, reason: str) -> None:
        """Keep a copy of the message among the dead letters."""
        keep_message(self._store, self._request.message, reason)

    @property
    def _embed(self) -> dict[str, Any]:
        """What follows from the task, as its message says."""
        return self._request.message.payload[2] or {}

    def _delivery(self) -> Delivery:
        message, ticket = self._request.message, self._fields[HEADER]
        assert isinstance(ticket, Ticket)  # the consumer's strategy has checked it
        return Delivery(
            ticket.job,
            ticket,
            bytes_of(message.body),
            message.content_type,
            time.time(),
            hardware_class=class_of(message),
            trail=trail_of(self._fields),
            task=self,
        )

    def _acknowledge(self, event: events.TaskEvent | None) -> None:
        if event is not None:
            facts = {name: getattr(event, name) for name in ("terminated", "signum", "expired", "exception")}
            self._request.send_event(event.type, **facts)
        task_ready(self._request)
        self._request.acknowledge()

    def _count_chord_part(self) -> None:
        """Count a part of a chord again: its worker may have died between the result and the count."""
        backend = self._app.backend
        stored = backend.get_task_meta(self.delivery.job)
        if stored["status"] in states.READY_STATES:
            context = Context(self._fields | self._embed)
            backend.on_chord_part_return(context, stored["status"], stored["result"])
