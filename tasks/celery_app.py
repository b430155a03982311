"""The fleet's Celery app: its queues, its guarantees and its one task."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from celery import Celery
from kombu import Exchange, Queue

from tasks.settings import Settings, on_socket
from tasks.topology import Topology
from taxiway.contract.keys import ARRIVALS, DEFAULT_QUEUE, INFER
from taxiway.valkey import parse

NEVER = 86_400
"""Seconds between kombu's own searches for lost messages: workers find theirs sooner (`broker.valkey.class_queue`)."""


def make_app(settings: Settings, topology: Topology, *, backend: str = "") -> Celery:
    """The app of a fleet process; `backend` is a result backend's class path where it is not Celery's own."""
    broker, watched, tls = _sentinels(on_socket(settings.broker))
    backend = f"{backend}+{broker.removeprefix('redis+')}" if backend else broker
    app = Celery("taxiway", broker=broker, backend=backend)
    app.conf.update(_guarantees(topology) | _routing(topology))
    app.conf.broker_transport_options |= watched
    app.conf.result_backend_transport_options = watched
    if tls:
        app.conf.broker_use_ssl = app.conf.redis_backend_use_ssl = tls
    return app


def _sentinels(url: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """An address of sentinels as Celery and kombu take it, `sentinel://…;sentinel://…`, their options, and TLS's."""
    if "+sentinel://" not in url:
        return url, {}, {}
    address = parse(url)
    account = f"{quote(address.username, safe='')}:{quote(address.password, safe='')}@" if address.password else ""
    hosts = [f"sentinel://{account}{host}:{port}/{address.database}" for host, port in map(tuple, address.places)]
    login = {"username": address.sentinel_username, "password": address.sentinel_password}
    login = {name: value for name, value in login.items() if value}
    tls = {name: value for name, value in (address.tls or {}).items() if name.startswith("ssl_")}
    options = {**login, "ssl": True, **tls} if tls else login
    return ";".join(hosts), {"master_name": address.service, "sentinel_kwargs": options}, tls


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
        # a job's claim survives the connection: what ends meanwhile is written once, and a redelivered copy is dropped
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # a full disk answers a connection's health check with an error, which ends a worker otherwise
        "broker_channel_error_retry": True,
        "broker_transport_options": {"unacked_restore_interval": NEVER, "queue_order_strategy": "priority"},
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_enable_soft_shutdown_on_idle": False,
        "worker_hijack_root_logger": False,
        "enable_utc": True,
    }


def _routing(topology: Topology) -> dict[str, Any]:
    return {
        "task_queues": [Queue(name, Exchange(name), routing_key=name) for name in sorted(topology.hardware)],
        "task_routes": {INFER: {"queue": ARRIVALS}},
        "task_create_missing_queues": True,
        "task_default_queue": DEFAULT_QUEUE,  # of links that name none: where their own application's workers look
        "task_default_priority": 0,
    }
