"""The peer: an ordinary Celery app with one task that returns its argument, with the fleet's delivery settings.

Its worker reads Celery's own CELERY_BROKER_URL and CELERY_RESULT_BACKEND.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

app = Celery("plain")
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    worker_send_task_events=True,
    task_send_sent_event=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="plain.echo")
def echo(value: Any) -> Any:
    """The argument."""
    return value
