"""What a worker changes of Celery's consumer: it fetches in bulk, serves what its device may, and groups its events."""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.exceptions import CPendingDeprecationWarning, WorkerShutdown
from celery.worker.consumer import Consumer
from celery.worker.control import control_command
from redis.exceptions import NoPermissionError

from workers.celery_adapter.events import AT_MOST, SHOW_EVERY
from workers.celery_adapter.strategy import guarded


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


logger = logging.getLogger(__name__)


EXIT_REFUSED = os.EX_NOPERM
"""Exit status of a worker whose account at the broker lacks a right."""


@control_command(args=[("queue", str)], signature="<class>")
def add_consumer(state: Any, queue: str, **_: Any) -> dict[str, str]:
    """Serve one more hardware class, if the device may. Replaces Celery's own command."""
    reason = state.consumer.pool.unfit_for(queue)
    if reason is not None:
        return {"error": reason}
    state.consumer.call_soon(state.consumer.add_task_queue, queue)
    return {"ok": f"add consumer {queue}"}


class LoneConsumer(Consumer):
    """Celery's consumer without its exchange with other workers, which hold nothing that this one needs.

    At its start a worker would ask the others and wait until none has answered for a second.
    """

    def __init__(self, on_task_request: Any, *, worker_options: dict[str, Any], **kwargs: Any) -> None:
        alone = worker_options | {"without_mingle": True, "without_gossip": True}
        super().__init__(on_task_request, worker_options=alone, **kwargs)
        warnings.filterwarnings("ignore", r"\s*In Celery 5\.1 we introduced", CPendingDeprecationWarning)  # we chose

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Exit where the broker's account lacks a right; Celery would connect again at once, without end.

        Raises:
            WorkerShutdown: the server refused a command of the account.
        """
        if isinstance(exc, NoPermissionError):
            hint = (
                "`ACL LOG` at the broker names it; `python -m broker.accounts --acl FILE` writes what queues.yaml needs"
            )
            logger.critical(
                "the account at the state store lacks a right; worker exits", extra={"error": str(exc), "hint": hint}
            )
            raise WorkerShutdown(EXIT_REFUSED) from exc
        super().on_connection_error_after_connected(exc)


class Fetching(bootsteps.StartStopStep):
    """Has the fetch stage take messages, instead of kombu's consumer.

    The consumer stays, and says which queues are consumed: `add_consumer` and `cancel_consumer` work on it.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Start fetching, after each connection; skips classes of `-Q` that the device cannot serve."""
        for queue in consumer.task_consumer.queues:
            reason = consumer.pool.unfit_for(queue.name)
            if reason is not None:
                logger.error("a class is not served", extra={"class": queue.name, "reason": reason})
                consumer.cancel_task_queue(queue.name)
        guarded(consumer)
        consumer.pool.connect(consumer)

    def stop(self, consumer: Any) -> None:
        """Stop fetching: the connection is lost, or the worker ends."""
        consumer.pool.disconnect()


class GroupedEvents(bootsteps.StartStopStep):
    """Sends task events every `SHOW_EVERY` seconds; Celery would send them on each turn of its loop."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        """Make the dispatcher buffer events, after each connection."""
        dispatcher = consumer.event_dispatcher
        dispatcher.buffer_limit = AT_MOST
        dispatcher.on_send_buffered = None
        consumer.pool.bridge.events.wanted = lambda: dispatcher.enabled and "task" in (dispatcher.groups or {"task"})

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Start sending. Celery cancels the timer with the connection."""
        hub.call_repeatedly(SHOW_EVERY, consumer.event_dispatcher.flush)
        hub.call_repeatedly(SHOW_EVERY, consumer.pool.show)

    def shutdown(self, consumer: Any) -> None:
        """Send what the last batch brought."""
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.flush()
