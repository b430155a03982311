"""What a worker adds to Celery's consumer: it fetches in bulk, and sends its events in groups."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from workers.ledger import SHOW_EVERY

EVENTS_AT_MOST = 500
"""Events in one group; a full group is sent at once."""


class Fetching(bootsteps.StartStopStep):
    """Has the pool's fetch thread take messages from Valkey and Redis, instead of kombu's consumer.

    The consumer stays, and says which queues are consumed: `add_consumer` and `cancel_consumer` work on it.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Start fetching, anew with each connection."""
        if consumer.pool.fetcher is not None:
            consumer.task_consumer.channel.qos.can_consume = lambda: False
            consumer.pool.fetcher.follow(consumer.task_consumer)

    def stop(self, consumer: Any) -> None:
        """Stop fetching: the connection is lost, or the worker ends."""
        if consumer.pool.fetcher is not None:
            consumer.pool.fetcher.leave()


class GroupedEvents(bootsteps.StartStopStep):
    """Sends task events every `SHOW_EVERY` seconds; Celery would send them on each turn of its loop."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        """Have the dispatcher wait, anew with each connection."""
        dispatcher = consumer.event_dispatcher
        dispatcher.buffer_limit = EVENTS_AT_MOST
        dispatcher.on_send_buffered = None
        consumer.pool.ledger.events.wanted = lambda: dispatcher.enabled and "task" in (dispatcher.groups or {"task"})

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Start sending. Celery cancels the timer with the connection."""
        hub.call_repeatedly(SHOW_EVERY, consumer.event_dispatcher.flush)
        hub.call_repeatedly(SHOW_EVERY, consumer.pool.show)

    def shutdown(self, consumer: Any) -> None:
        """Send what the last batch brought."""
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.flush()
