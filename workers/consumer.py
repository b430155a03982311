"""What a worker adds to Celery's consumer: it keeps its messages, and sends its events in groups."""

from __future__ import annotations

import time
from typing import Any

from celery import bootsteps

from tasks.celery_app import RESCORE

EVENTS_EVERY = 0.1
"""Seconds within which task events of one group are sent together; Flower's pages are slower than that."""

EVENTS_AT_MOST = 500
"""Events in one group; a full group is sent at once."""


class Rescore(bootsteps.StartStopStep):
    """Renews, `RESCORE` times within the visibility timeout, the score of each message that this consumer holds.

    kombu's Redis transport gives a message to another worker once its score in the `unacked_index` is older than the
    timeout: without this a job longer than that is delivered twice.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Start renewing, anew with each connection. Celery cancels the timer with the connection."""
        if consumer.connection.transport.driver_type == "redis":
            channel = consumer.task_consumer.channel
            hub.call_repeatedly(channel.visibility_timeout / RESCORE, _renew, channel)


class GroupedEvents(bootsteps.StartStopStep):
    """Sends task events every `EVENTS_EVERY` seconds; Celery would send them on each turn of its loop."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        """Have the dispatcher wait, anew with each connection."""
        dispatcher = consumer.event_dispatcher
        dispatcher.buffer_limit = EVENTS_AT_MOST
        dispatcher.on_send_buffered = None

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Start sending. Celery cancels the timer with the connection."""
        hub.call_repeatedly(EVENTS_EVERY, consumer.event_dispatcher.flush)

    def shutdown(self, consumer: Any) -> None:
        """Send what the last batch brought."""
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.flush()


def _renew(channel: Any) -> None:
    tags = list(channel.qos._delivered)
    if tags:
        now = time.time()
        with channel.conn_or_acquire() as client:
            client.zadd(channel.unacked_index_key, dict.fromkeys(tags, now), xx=True)
