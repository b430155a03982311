"""The fleet's Celery app: its queues, its guarantees and its one task."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from tasks.settings import Settings
from tasks.topology import Topology
from taxiway.keys import ARRIVALS, INFER, LEVELS

RESCORE = 4
"""A worker tells the broker that it still holds its messages this many times within the visibility timeout."""


def class_queue(hardware_class: str) -> Queue:
    """A hardware class's queue. On RabbitMQ a classic queue, whose priorities are exact; on Valkey kombu's lists."""
    arguments = {"x-max-priority": LEVELS - 1}
    return Queue(hardware_class, Exchange(hardware_class), routing_key=hardware_class, queue_arguments=arguments)


def make_app(settings: Settings, topology: Topology, *, backend: str = "") -> Celery:
    """The app of a fleet process; `backend` is a result backend's class path where it is not Celery's own."""
    app = Celery(
        "taxiway", broker=settings.broker, backend=f"{backend}+{settings.state}" if backend else settings.state
    )
    app.conf.update(_guarantees(topology) | _routing(topology))
    return app


def _guarantees(topology: Topology) -> dict[str, Any]:
    """Delivery at least once, and nothing that turns finished work into a failure when the network is cut."""
    return {
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_acks_on_failure_or_timeout": True,
        "result_expires": topology.limits.keep_result,
        "result_backend_always_retry": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "visibility_timeout": topology.limits.lease,
            "unacked_restore_interval": 1,
            "queue_order_strategy": "priority",
        },
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_enable_soft_shutdown_on_idle": False,
        "worker_hijack_root_logger": False,
        "enable_utc": True,
    }


def _routing(topology: Topology) -> dict[str, Any]:
    return {
        "task_queues": [class_queue(name) for name in sorted(topology.hardware)],
        "task_routes": {INFER: {"queue": ARRIVALS}},
        "task_create_missing_queues": True,
        "task_default_queue": ARRIVALS,
        "task_default_priority": 0,
    }
