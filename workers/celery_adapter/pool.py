"""Celery's pool over one device: it builds and starts the worker, and passes on what Celery's consumer receives."""

from __future__ import annotations

import atexit
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.concurrency.base import BasePool
from celery.worker import state

from broker.valkey.records import Ending
from tasks.ticket import Ticket
from workers.celery_adapter.bridge import CeleryBridge
from workers.celery_adapter.consumer_thread import Acknowledgements
from workers.celery_adapter.received import ReceivedTask
from workers.celery_adapter.strategy import class_of, context_of, refuse
from workers.drain import SIGNAL as NOTICE
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
        self._acknowledgements = None
        if class_queue is None:
            self._acknowledgements = Acknowledgements(self.worker.store, self.bridge.thread)
        self.worker.start({"acknowledgements": self._acknowledgements} if self._acknowledgements is not None else {})

    def on_apply(self, target: Any, args: Any, kwargs: Any = None, **options: Any) -> None:
        """Take a request over from the consumer. Returns at once."""
        task, _, fields = args[:3]
        request = options["accept_callback"].__self__  # a bound method of the request, in every Celery
        store, thread = self.worker.store, self.bridge.thread
        received = ReceivedTask(
            self.app, store, thread, request, target, task, fields, options["callback"], self._remember
        )
        self.worker.receive(received.delivery)

    def acknowledging(self, ticket: Ticket, ack: Callable[..., Any], reject: Callable[..., Any]) -> Callable[..., Any]:
        """How Celery acknowledges a message: on another kind of broker not before the store keeps the job's end."""
        return ack if self._acknowledgements is None else self._acknowledgements.after_end(ticket, ack, reject)

    def unfit_for(self, hardware_class: str) -> str | None:
        """Why the device may not serve a class; None where it may."""
        return self.worker.unfit_for(hardware_class)

    def register_with_event_loop(self, loop: Any) -> None:
        """Set Celery's event loop; called after each connection."""
        self.bridge.thread.follow(loop)

    def connect(self, consumer: Any) -> None:
        """Serve the queues of Celery's consumer; called after each connection."""
        self.bridge.thread.connection, self.bridge.thread.qos = consumer.connection, consumer.qos
        if self.worker.fetch is not None:
            consumer.task_consumer.channel.qos.can_consume = lambda: False
            self.bridge.follow(consumer.task_consumer)
            self.worker.fetch.resume()

    def disconnect(self) -> None:
        """Take nothing more: the consumer's connection is lost, or the worker ends."""
        if self.worker.fetch is not None:
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
        self.worker.stop(meanwhile=thread.stand_in)
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

    def _remember(self, ending: Ending) -> None:
        """Keep an end that was written until its message is acknowledged, where that waits."""
        if self._acknowledgements is not None:
            self._acknowledgements.remember(ending)

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
