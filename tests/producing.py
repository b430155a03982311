"""Plain Celery as a producer."""

from __future__ import annotations

from typing import Any

from celery import Celery


def stop_listening(app: Celery) -> None:
    """End the connections that an app waits for results on: else they end with errors when it is collected."""
    backend: Any = app.backend
    backend.result_consumer.stop()
    backend.client.connection_pool.disconnect()
