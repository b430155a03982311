"""Celery's worker as the stages see it (`workers.stages.job.CeleryWorker`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from celery import Celery
from celery.worker import state
from kombu.message import Message

from broker.valkey.worker import ClassQueue
from taxiway.contract.keys import INFER
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError, TaxiwayError
from workers.celery_adapter import events
from workers.celery_adapter.consumer import Inspection
from workers.celery_adapter.consumer_thread import ConsumerThread
from workers.celery_adapter.events import AT_MOST, TaskEvents
from workers.stages.held import in_order
from workers.stages.job import Delivery, Outcome

logger = logging.getLogger(__name__)


class CeleryBridge:
    """Stages call it from any thread; what touches the consumer's connection is done on the consumer's thread.

    It stands for kombu's channel in the messages of class queues that it has Celery's consumer receive.

    Args:
        class_queue: where such messages are acknowledged; None where the consumer takes all by itself.
    """

    no_ack_consumers = None  # kombu looks for it on a channel

    def __init__(self, app: Celery, hostname: str, class_queue: ClassQueue | None) -> None:
        self.thread = ConsumerThread()
        publish = class_queue.publish if class_queue is not None else lambda topic, message: None
        self.events = TaskEvents(hostname, app.clock, publish)  # type: ignore[attr-defined]  # celery-types lacks it
        self.inspection = Inspection(app.tasks[INFER], hostname, self.events, self.thread)
        self._app = app
        self._queue = class_queue
        self._consumer: Any = None
        self._received: dict[str, Message] = {}
        self._passing: set[str] = set()

    def follow(self, consumer: Any) -> None:
        """Use this kombu consumer from now on; called after each connection."""
        self._consumer = consumer

    def leave(self) -> None:
        """The consumer's connection ends: what Celery only schedules goes back to its queue."""
        waiting = [tag for tag, message in self._received.items() if message.headers.get("eta") is not None]
        for tag in waiting:
            self._received.pop(tag, None)
        try:
            self._put_back(in_order(waiting))
        except BrokerUnavailableError:
            logger.warning("scheduled tasks wait for their visibility timeout", extra={"tasks": len(waiting)})

    def queues(self) -> Sequence[str]:
        """The class queues that the worker consumes now."""
        return list(self._app.amqp.queues.consume_from)

    def receive(self, envelope: Envelope, body: bytes, *, tag: str, queue: str) -> None:
        """Have Celery's consumer receive a message of a class queue."""
        message = Message(
            body=body,  # type: ignore[arg-type]  # kombu's own transports give bytes
            delivery_tag=tag,
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            delivery_info={"exchange": queue, "routing_key": queue},
            properties=envelope.properties,
            headers=envelope.headers,
            channel=self,
        )
        self._received[tag] = message
        self._passing.add(tag)
        self.thread.call(partial(self._deliver, message))

    @property
    def receiving(self) -> int:
        """How many messages of `receive` the consumer has not seen yet."""
        return len(self._passing)

    def tags(self) -> list[str]:
        """The tags of messages that the consumer received and has not acknowledged."""
        return [*self._received]

    def is_revoked(self, job: str) -> bool:
        """Whether remote control revoked the job."""
        return job in state.revoked

    def report_end(self, delivery: Delivery, outcome: Outcome) -> None:
        """Report how a plain job ended here."""
        self.inspection.report(delivery, events.ended(delivery, outcome))

    def report_release(self, delivery: Delivery, error: TaxiwayError | None = None) -> None:
        """Report a plain job that is held no longer; as revoked, where it was cancelled or expired."""
        self.inspection.report(delivery, events.revoked(delivery, error))

    def flush_events(self) -> None:
        """Send the task events that wait."""
        self.events.flush()

    def flush_full_group(self) -> None:
        """Send the task events that wait if they fill a group."""
        if self.events.waiting >= AT_MOST:
            self.events.flush()

    def exit(self, status: int) -> None:
        """Begin the worker's warm shutdown, with this exit status."""
        state.should_stop = status  # type: ignore[assignment]  # None in Celery's module, until it is to stop

    def basic_ack(self, tag: str, multiple: bool = False) -> None:
        """Acknowledge a message that Celery has ended."""
        self._received.pop(tag, None)
        if self._queue is not None:
            self._queue.acknowledge([tag])

    def basic_reject(self, tag: str, requeue: bool = False) -> None:
        """Acknowledge a message that Celery refused, or put it back."""
        if not requeue:
            self.basic_ack(tag)
            return
        self._received.pop(tag, None)
        self._put_back([tag])

    def _put_back(self, tags: Sequence[str]) -> None:
        if self._queue is not None:
            self._queue.put_back(tags)

    def _deliver(self, message: Message) -> None:
        """Have the consumer receive the message; on its thread."""
        message.accept = self._consumer.accept
        try:
            if message.errors:  # it cannot be decompressed
                message._reraise_error(self._consumer.on_decode_error)
            else:
                self._consumer.on_message(message)
        finally:
            self._passing.discard(message.delivery_tag)
