"""A RabbitMQ under TLS, with an account for each kind of process: each can do its work, and nothing else."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import amqp
import kombu
import pytest
from celery import Celery

from tasks.celery_app import make_app
from tasks.settings import Settings
from tasks.topology import load_topology
from taxiway.contract.keys import ARRIVALS, INFER
from tests.guarded import Guarded, guarded_rabbit
from tests.producing import stop_listening
from tests.routing import eventually, router_process
from tests.working import CLASS, worker_process, worker_settings

pytestmark = pytest.mark.rabbitmq

FORGED = amqp.Message("forged")
OTHER, ELSEWHERE, CONTROL, EVENTS = "gpu.realtime", "elsewhere", "a@host.celery.pidbox", "celeryev.1234"
NAMES = {ARRIVALS, CLASS, OTHER, ELSEWHERE, CONTROL, EVENTS}
DEFAULT = "write by default"  # to the exchange without a name, through which every queue can be reached
ATTEMPTS = {
    "read": lambda channel, queue: channel.basic_get(queue),
    "purge": lambda channel, queue: channel.queue_purge(queue),
    "declare": lambda channel, queue: channel.queue_declare(queue),
    "delete": lambda channel, queue: channel.queue_delete(queue),
    "declare an exchange": lambda channel, queue: channel.exchange_declare(queue, "direct"),
    "delete an exchange": lambda channel, queue: channel.exchange_delete(queue),
    "redirect": lambda channel, queue: channel.queue_bind(queue, queue, "another key"),
    "write": lambda channel, queue: published(channel, queue, queue),
    DEFAULT: lambda channel, queue: published(channel, "", queue),
}
REACHES = {
    "producer": {("write", ARRIVALS)},
    "router": {(what, name) for what in ATTEMPTS.keys() - {DEFAULT} for name in NAMES - {ELSEWHERE}},
    "worker": {(what, name) for what in ATTEMPTS.keys() - {DEFAULT} for name in NAMES - {ELSEWHERE, ARRIVALS}},
    "flower": {(what, name) for what in ATTEMPTS.keys() - {DEFAULT} for name in (CONTROL, EVENTS)},
}
"""What an account may do to which queue or exchange of that name. All else must be refused."""


def published(channel: Any, exchange: str, key: str) -> None:
    channel.confirm_select()
    channel.basic_publish_confirm(FORGED, exchange, key)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_rabbit(tmp_path_factory.mktemp("rabbit"), [CLASS, "gpu.realtime"]) as server:
        yield server


@pytest.fixture
def fleet(guarded: Guarded, settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """A router and a worker, each by its account."""
    base = worker_settings(replace(settings, broker=guarded.url("router")), tmp_path)
    own = replace(base, broker=guarded.url("worker"))
    with worker_process(own, log=subprocess.DEVNULL), router_process(base):
        yield base


def opened(guarded: Guarded, account: str) -> kombu.Connection:
    files = {"ca_certs": "ca.pem", "certfile": "client.pem", "keyfile": "client.key"}
    tls = {name: str(guarded.folder / file) for name, file in files.items()}
    address = f"amqps://{account}:{guarded.passwords[account]}@localhost:{guarded.port}/%2F"
    return kombu.Connection(address, ssl=tls | {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": "localhost"})


def declared(guarded: Guarded) -> bool:
    """Whether a router has declared the arrivals."""
    with opened(guarded, "router") as connection, connection.channel() as channel:
        try:
            cast(Any, channel).queue_declare(ARRIVALS, passive=True)
        except amqp.exceptions.NotFound:
            return False
        return True


def test_each_account_does_its_work(guarded: Guarded, fleet: Settings) -> None:
    with Celery("lab", backend=fleet.state, set_as_current=False) as producer, opened(guarded, "producer") as link:
        queue = kombu.Queue(ARRIVALS, no_declare=True)
        there: dict[str, Any] = {
            "queue": queue,
            "exchange": ARRIVALS,
            "routing_key": ARRIVALS,
        }  # else through amq.default
        eventually(lambda: declared(guarded))
        sent = producer.send_task(INFER, kwargs={"model": "echo", "inputs": "hello"}, connection=link, **there)
        assert sent.get(timeout=60)["outputs"] == {"payload": "hello"}
        stop_listening(producer)

    heard: list[str] = []
    with make_app(replace(fleet, broker=guarded.url("flower")), load_topology(fleet.queues)) as flower:
        assert flower.control.inspect(timeout=60, limit=1).ping()
        with flower.connection() as connection:

            def hear(event: dict[str, str]) -> None:
                heard.append(event["type"])
                receiver.should_stop = True

            receiver = flower.events.Receiver(connection, handlers={"*": hear})
            receiver.capture(timeout=60)
    assert heard


@pytest.mark.parametrize("account", REACHES)
def test_an_account_can_do_nothing_else(guarded: Guarded, account: str) -> None:
    done = []
    with opened(guarded, account) as link:
        for what, name in sorted({(what, name) for what in ATTEMPTS for name in NAMES} - REACHES[account]):
            try:
                with link.channel() as channel:
                    ATTEMPTS[what](channel, name)
            except amqp.exceptions.AccessRefused:
                continue
            done.append((what, name))
    assert done == []
