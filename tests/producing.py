"""What producers send that have no client of ours: plain Celery, and HTTP."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from taxiway.contract.keys import ARRIVALS

_KEPT = {"x-queue-type": "quorum", "x-delivery-limit": -1}
QUORUM = Queue(ARRIVALS, Exchange(ARRIVALS), ARRIVALS, queue_arguments=_KEPT)
"""RabbitMQ's arrivals as docs/celery.md recommends that producers declare them."""


def stop_listening(app: Celery) -> None:
    """End the connections that an app waits for results on: else they end with errors when it is collected."""
    backend: Any = app.backend
    backend.result_consumer.stop()
    backend.client.connection_pool.disconnect()


def infer_body(*rows: Any, **terms: Any) -> dict[str, Any]:
    """An infer request to `echo` under these terms, as a JSON value."""
    payload = {"name": "payload", "shape": [len(rows)], "datatype": "BYTES", "data": list(rows)}
    return {"inputs": [payload], "parameters": terms}
