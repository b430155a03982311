"""Where Celery sends what follows from a job: to the broker, or back to RabbitMQ if the job came from there.

A worker does not reach RabbitMQ: its messages wait in an outbox, which a router's bridge publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery.app.amqp import AMQP
from kombu import Queue
from kombu.message import Message
from kombu.utils.objects import cached_property

from taxiway.contract.keys import AMQP_OUTBOX, DEFAULT_QUEUE
from taxiway.contract.wire import BRIDGED, DESTINATION

_OUTBOX = Queue(AMQP_OUTBOX, routing_key=AMQP_OUTBOX)

_bridged: ContextVar[bool] = ContextVar("bridged", default=False)
"""Whether what this thread sends follows from a job that came from RabbitMQ."""


@contextmanager
def sending_where_it_came_from(message: Message) -> Iterator[None]:
    """Send what follows from the message's job to the server that the message came from."""
    before = _bridged.set(bool(message.properties.get(BRIDGED)))
    try:
        yield
    finally:
        _bridged.reset(before)


class BridgedAMQP(AMQP):
    """Celery's sender of messages, for jobs of either server. A message to RabbitMQ names its queue, no exchange."""

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        """Send a task's message."""
        send = self._create_task_sender()  # type: ignore[attr-defined]  # celery-types lacks it

        def send_where_it_came_from(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if not _bridged.get():
                return send(producer, name, message, **options)
            rest = {key: value for key, value in options.items() if key not in _ADDRESS}
            destination = {DESTINATION: _destination(**options)}
            quiet = message._replace(sent_event=None)  # there, the fleet's events have no listener
            return send(producer, name, quiet, queue=_OUTBOX, declare=[], **rest, **destination)

        return send_where_it_came_from


_ADDRESS = ("queue", "exchange", "routing_key", "exchange_type", "declare", "priority")


def _destination(queue: Any = None, routing_key: str = "", priority: int | None = None, **_: Any) -> dict[str, Any]:
    return {"queue": getattr(queue, "name", queue) or routing_key or DEFAULT_QUEUE, "priority": priority}
