from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import celery
import kombu
import pytest
import redis

from broker.port import Peeked, Step
from broker.rabbitmq import RabbitQueueMover
from broker.valkey.leases import Leadership
from tasks.celery_app import class_queue
from tasks.settings import Settings
from taxiway.contract.keys import ARRIVALS, INFER, job_key, result_key
from taxiway.errors import BrokerUnavailableError
from tests.cable import Cable
from tests.integration.router.test_mover import QUEUES, renamed
from tests.routing import EchoDevice, depth_on_rabbitmq, empty_queues, eventually, router_process
from tests.working import worker_process

pytestmark = pytest.mark.rabbitmq

TWINS = ("cpu.a", "cpu.b")


@pytest.fixture
def twins(settings: Settings, amqp_url: str, tmp_path: Path) -> Iterator[Settings]:
    """Two classes of the same price behind RabbitMQ; their queues are deleted afterwards."""
    (tmp_path / "queues.yaml").write_text(QUEUES)
    empty_queues(amqp_url, TWINS)
    yield replace(settings, broker=amqp_url, queues=tmp_path / "queues.yaml")
    with kombu.Connection(amqp_url) as connection:
        for queue in map(class_queue, (*TWINS, "cpu.c")):
            queue.bind(connection.default_channel).delete()


def test_waiting_work_moves_and_runs_once_while_those_that_lead_are_killed(twins: Settings) -> None:
    with redis.Redis.from_url(twins.state) as store, ExitStack() as stack:
        with celery.Celery(broker=twins.broker, backend=twins.state) as producer:
            jobs = [
                producer.send_task(
                    INFER, kwargs={"model": "paced", "inputs": "x"}, queue=ARRIVALS, ignore_result=True
                ).id
                for _ in range(1200)
            ]
        with router_process(twins), EchoDevice(twins, hardware_class="cpu.a", answering=False):
            eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.a") == 1200, within=120)
        stack.enter_context(worker_process(twins, "--class", "cpu.b"))
        for _ in range(3):
            with router_process(twins) as router:
                eventually(lambda: moved(store, jobs))
                os.kill(router.process.pid, signal.SIGKILL)
        stack.enter_context(worker_process(twins, "--class", "cpu.a"))  # else done before a router is up
        eventually(lambda: finished(store, jobs), within=120)
        assert moved(store, jobs)
        assert {store.hget(job_key(job), "attempts") for job in jobs} == {b"1"}
        moves = json.loads(store.hget(job_key(moved(store, jobs)[0]), "moves"))
        assert {(move["source"], move["target"]) for move in moves} <= {("cpu.a", "cpu.b"), ("cpu.b", "cpu.a")}


def test_the_only_job_that_waits_for_a_class_that_was_renamed_runs_in_another(twins: Settings) -> None:
    with redis.Redis.from_url(twins.state) as store:
        with router_process(twins), EchoDevice(twins, hardware_class="cpu.a", answering=False):
            with celery.Celery(broker=twins.broker, backend=twins.state) as producer:
                asked = {"model": "paced", "inputs": "x"}
                job = producer.send_task(INFER, kwargs=asked, queue=ARRIVALS, ignore_result=True).id
            eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.a") == 1)
        renamed(twins, "cpu.a", "cpu.c")
        with router_process(twins), worker_process(twins, "--class", "cpu.b"):
            eventually(lambda: finished(store, [job]))
        assert depth_on_rabbitmq(twins.broker, "cpu.a") == 0
        assert store.hget(job_key(job), "hardware_class") == b"cpu.b"


def test_of_two_copies_of_a_job_that_wait_one_moves(twins: Settings) -> None:
    with ExitStack() as stack:
        with celery.Celery(broker=twins.broker, backend=twins.state) as producer:
            for _ in range(100):
                asked = {"model": "paced", "inputs": "x"}
                producer.send_task(INFER, kwargs=asked, queue=ARRIVALS, ignore_result=True)
        stack.enter_context(EchoDevice(twins, hardware_class="cpu.a", answering=False))
        with router_process(twins):
            eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.a") == 100)
        eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.a") == 100)  # what the router had looked at is back
        double(twins, "cpu.a")
        eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.a") == 200)
        stack.enter_context(EchoDevice(twins, hardware_class="cpu.b", answering=False))
        router = stack.enter_context(router_process(twins))
        eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.b") > 20)
        router.process.send_signal(signal.SIGTERM)
        assert router.process.wait(60) == 0


def double(settings: Settings, hardware_class: str) -> None:
    """Each message that waits stands there twice, as after a publish that was confirmed too late."""
    with kombu.Connection(settings.broker) as connection:
        queue, producer = class_queue(hardware_class).bind(connection.default_channel), kombu.Producer(connection)
        messages: list[Any] = [
            queue.get(no_ack=True) for _ in range(depth_on_rabbitmq(settings.broker, hardware_class))
        ]
        for message in messages:
            for _ in range(2):
                producer.publish(
                    message.body,
                    exchange=hardware_class,
                    routing_key=hardware_class,
                    headers=message.headers,
                    content_type=message.content_type,
                    content_encoding=message.content_encoding,
                    priority=message.properties.get("priority", 0),
                    correlation_id=message.properties.get("correlation_id"),
                )


def test_what_was_shown_by_a_connection_that_ended_is_not_moved(twins: Settings) -> None:
    parts = urlsplit(twins.broker)
    cable = Cable(str(parts.hostname), parts.port or 5672)
    through = twins.broker.replace(f":{parts.port}", f":{cable.port}")
    with kombu.Connection(twins.broker) as connection:
        for job in range(4):
            queue = class_queue("cpu.a").bind(connection.default_channel)
            kombu.Producer(connection).publish(
                {}, exchange=queue.exchange, routing_key="cpu.a", headers={"id": str(job)}, priority=1
            )
    eventually(lambda: depth_on_rabbitmq(twins.broker, "cpu.a") == 4)

    async def scenario() -> list[bool]:
        queue_mover = RabbitQueueMover(broker=through, state=twins.state)
        leadership = Leadership(twins.state, "t", 60)
        token = await leadership.campaign()
        before = await queue_mover.peek("cpu.a", 10)
        cable.cut()
        after: Sequence[Peeked] = ()
        while not after:
            with suppress(BrokerUnavailableError):
                after = (await queue_mover.peek("cpu.a", 10)).messages
        done = await queue_mover.move(token, [Step(one, "cpu.b", one.envelope) for one in before.messages])
        await queue_mover.close()
        await leadership.close()
        return done

    assert asyncio.run(scenario()) == [False, False]
    cable.close()
    eventually(lambda: (depth_on_rabbitmq(twins.broker, "cpu.a"), depth_on_rabbitmq(twins.broker, "cpu.b")) == (4, 0))


def moved(store: redis.Redis, jobs: list[str]) -> list[str]:
    return [job for job in jobs if store.hexists(job_key(job), "moves")]


def finished(store: redis.Redis, jobs: list[str]) -> bool:
    return all(store.mget([result_key(job) for job in jobs]))
