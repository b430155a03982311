"""Celery's pool over one device: it builds and starts the worker, and passes on what Celery's consumer receives.

`CeleryBridge` is Celery's worker as the stages see it (`workers.stages.job.CeleryWorker`), `ReceivedTask` a job that
Celery's consumer received (`CeleryTask`).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from celery import Celery, signals
from celery.concurrency.base import BasePool
from celery.worker import state
from celery.worker.request import Request
from celery.worker.state import task_ready
from kombu.message import Message

from broker.valkey.class_queue import ClassQueue
from broker.valkey.jobs import Ending
from broker.valkey.worker_store import WorkerStore
from tasks.heartbeat import unfit_for
from tasks.telemetry import parent_of
from tasks.ticket import Ticket
from taxiway.contract.keys import INFER
from taxiway.contract.wire import HEADER, Envelope
from taxiway.errors import BrokerUnavailableError, TaxiwayError
from workers.celery_adapter.consumer import (
    AT_MOST,
    ConsumerThread,
    Inspection,
    TaskEvent,
    TaskEvents,
    event_of,
    stopped,
)
from workers.celery_adapter.strategy import (
    ENDED,
    STORED,
    TOKEN,
    bytes_of,
    class_of,
    context_of,
    is_outage,
    keep_message,
    refuse,
    sending_where_it_came_from,
)
from workers.drain import SIGNAL as NOTICE
from workers.stages.held import in_order
from workers.stages.job import Delivery, Ended
from workers.worker import Worker, open_class_queue

logger = logging.getLogger(__name__)


class DevicePool(BasePool):
    """One device, on threads of this process. Concurrency is always 1: batches are the parallelism."""

    task_join_will_block = False

    def on_start(self) -> None:
        """Find the device, load what the class keeps warm, and serve.

        Raises:
            SystemExit: the device is missing.
        """
        self.limit = 1
        context, name = context_of(self.app), self.options["initargs"][1]
        class_queue = open_class_queue(context, name)
        self.bridge = CeleryBridge(self.app, name, class_queue)
        self.worker = Worker(context, name, self.bridge, class_queue)
        signal.signal(NOTICE, lambda *_: self.worker.notice.signal())
        signals.worker_shutting_down.connect(self._drain, weak=False)
        self.worker.start()

    def on_apply(self, target: Any, args: Any, kwargs: Any = None, **options: Any) -> None:
        """Take a request over from the consumer. Returns at once."""
        task, _, fields = args[:3]
        request = options["accept_callback"].__self__  # a bound method of the request, in every Celery
        store, thread = self.worker.store, self.bridge.thread
        received = ReceivedTask(self.app, store, thread, request, target, task, fields, options["callback"])
        self.worker.receive(received.delivery)

    def unfit_for(self, hardware_class: str) -> str | None:
        """Why the device may not serve a class; None where it may."""
        return unfit_for(hardware_class, self.worker.heartbeat.facts, self.worker.context.topology)

    def register_with_event_loop(self, loop: Any) -> None:
        """Set Celery's event loop; called after each connection."""
        self.bridge.thread.follow(loop)

    def connect(self, consumer: Any) -> None:
        """Serve the queues of Celery's consumer; called after each connection."""
        consumer.task_consumer.channel.qos.can_consume = lambda: False
        self.bridge.follow(consumer.task_consumer)
        self.worker.fetch.resume()

    def disconnect(self) -> None:
        """Take nothing more: the consumer's connection is lost, or the worker ends."""
        self.worker.fetch.pause()
        self.bridge.leave()

    def show(self) -> None:
        """Show Celery's tools what is held, and the store what runs; on the consumer's thread."""
        started = self.bridge.inspection.show(self.worker.held, self.worker.endings)
        if started or self.bridge.events.waiting:
            self.worker.finish.report_started(started)

    def refuse(self, message: Any, reason: str) -> None:
        """Count a message of Celery's consumer that is not run, keep it as a dead letter, and end its job."""
        self.worker.counters.reject(class_of(message))
        refuse(self.worker.store, self.worker.context, message, reason)

    def on_close(self) -> None:
        """Publish that the worker takes no more."""
        self.worker.close()

    def on_stop(self) -> None:
        """Finish what ends within the grace, write what is done, and requeue the rest."""
        cold: Any = state.should_terminate
        if cold:
            self.worker.drain.within(0.0)
        thread = self.bridge.thread
        self.worker.stop(meanwhile=thread.run)
        self.worker.requeue(meanwhile=thread.run)
        if self.worker.computes:
            logger.warning("a batch did not end within the grace: its jobs are back in their queue")
            atexit.register(os._exit, 0)  # native code that runs would not survive the interpreter's end

    def on_terminate(self) -> None:
        """Requeue everything at once, also what runs."""
        self.worker.abandon()
        self.worker.requeue(meanwhile=self.bridge.thread.run)

    def terminate_job(self, pid: Any, signal: Any = None) -> None:
        """Nothing: Celery has marked the job, so a callable that runs for it is ended, and no answer is written."""

    def _drain(self, how: str, **_: Any) -> None:
        """Begin the grace; asked once more, end it. In a signal's handler."""
        if how == "Warm":
            self.worker.drain.stop(self.worker.store.limits.grace)

    def _get_info(self) -> dict[str, Any]:
        """What `celery inspect stats` and Flower show of the pool."""
        return {
            "implementation": f"{__name__}:{type(self).__name__}",
            "max-concurrency": self.limit,
            "processes": [os.getpid()],
            **self.worker.heartbeat.shown(),
        }


class CeleryBridge:
    """Stages call it from any thread; what touches the consumer's connection is done on the consumer's thread.

    It stands for kombu's channel in the messages of class queues that it has Celery's consumer receive, and which are
    acknowledged at `class_queue`.
    """

    no_ack_consumers = None  # kombu looks for it on a channel

    def __init__(self, app: Celery, hostname: str, class_queue: ClassQueue) -> None:
        self.thread = ConsumerThread()
        self.events = TaskEvents(hostname, app.clock, class_queue.publish)  # type: ignore[attr-defined]  # celery-types lacks it
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
            self._queue.put_back(in_order(waiting))
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

    def report_end(self, ended: Ended) -> None:
        """Report how a plain job ended here."""
        self.inspection.report(ended.delivery, event_of(ended))

    def report_release(self, delivery: Delivery, error: TaxiwayError | None = None) -> None:
        """Report a plain job that is held no longer; with its end, where it was cancelled or expired."""
        self.inspection.report(delivery, stopped(delivery, error))

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
        self._queue.acknowledge([tag])

    def basic_reject(self, tag: str, requeue: bool = False) -> None:
        """Acknowledge a message that Celery refused, or put it back."""
        if not requeue:
            self.basic_ack(tag)
            return
        self._received.pop(tag, None)
        self._queue.put_back([tag])

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


Traced = tuple[int, Any, float]
"""What Celery's tracer answers: whether it failed, the value as text or the exception, and the run time."""


@dataclass(eq=False)
class ReceivedTask:
    """What Celery handed to the pool."""

    app: Celery
    store: WorkerStore
    thread: ConsumerThread
    request: Request
    tracer: Callable[..., Traced]
    task: str
    fields: dict[str, Any]
    """The request's context, which the tracer reads."""
    succeed: Callable[[Traced], None]
    """Has Celery acknowledge what its tracer ended."""
    delivery: Delivery = field(init=False)

    def __post_init__(self) -> None:
        message, ticket = self.request.message, self.fields[HEADER]
        assert isinstance(ticket, Ticket)  # the consumer's strategy has checked it
        self.delivery = Delivery(
            ticket.job,
            ticket,
            bytes_of(message.body),
            message.content_type,
            time.time(),
            hardware_class=class_of(message),
            parent=parent_of(self.fields),
            task=self,
        )

    @property
    def followed(self) -> bool:
        """Whether other tasks follow from this one: a link, an errback, a chain or a chord."""
        return any(self._embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord"))

    def start(self) -> None:
        """Report that the task runs."""
        accepted: Callable[[int, float], None] = self.request.on_accepted  # type: ignore[assignment]  # Celery passes an int
        self.thread.call(partial(accepted, os.getpid(), time.monotonic()))

    def finish(self, ended: Ended, token: str, written: Ending | None) -> None:
        """Run Celery's tracer around the end: signals, events, callbacks, and the result unless it is written."""
        self.fields |= {ENDED: ended, TOKEN: token} | ({STORED: True} if written is not None else {})
        try:
            payload = self.request.message.payload
            with sending_where_it_came_from(self.request.message):
                failed, value, seconds = self.tracer(self.task, self.delivery.job, self.fields, payload, None, None)
        except Exception:  # a callback that cannot be sent, a signal's receiver
            logger.exception("a task could not be ended", extra={"job": self.delivery.job})
            self.requeue()
            return
        if ended.result is not None:  # Flower shows this as the task's runtime
            seconds = ended.result.report.run_time
        self.thread.call(lambda: self.succeed((failed, value, seconds)))

    def drop(self, error: TaxiwayError | None) -> None:
        """Acknowledge a task that had ended, and report its end if it was cancelled or expired."""
        if self.followed:  # whatever ended it did not see what follows, or its worker died before it reported the end
            try:
                backend: Any = self.app.backend
                with sending_where_it_came_from(self.request.message):
                    backend.propagate(self.delivery.job, self.fields | self._embed)
            except Exception as failed:  # an errback that cannot be sent, a server that does not answer
                logger.exception("the end of a task could not be reported", extra={"job": self.delivery.job})
                if not self._given_up(failed):
                    self.requeue()
                    return
        event = stopped(self.delivery, error)
        self.thread.call(partial(self._acknowledge, event))

    def revoke(self) -> None:
        """Have Celery end a task that its remote control revoked."""
        self.thread.call(self._revoked)

    def requeue(self) -> None:
        """Have Celery return the message to its queue."""
        self.thread.call(partial(self.request.reject, requeue=True))

    def dead_letter(self, reason: str) -> None:
        """Keep a copy of the message among the dead letters."""
        keep_message(self.store, self.request.message, reason)

    def _given_up(self, error: Exception) -> bool:
        """Whether the message is among the dead letters now, because no attempt could report its task's end."""
        if is_outage(error):
            return False
        try:
            self.dead_letter(f"what follows from the task could not be sent: {error!r}")
        except BrokerUnavailableError:
            return False
        return True

    @property
    def _embed(self) -> dict[str, Any]:
        """What follows from the task, as its message says."""
        return self.request.message.payload[2] or {}

    def _revoked(self) -> None:
        with sending_where_it_came_from(self.request.message):
            self.request.revoked()

    def _acknowledge(self, event: TaskEvent | None) -> None:
        if event is not None:
            facts = {name: getattr(event, name) for name in ("terminated", "signum", "expired", "exception")}
            self.request.send_event(event.type, **facts)
        task_ready(self.request)
        self.request.acknowledge()
