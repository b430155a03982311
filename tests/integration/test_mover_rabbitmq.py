from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import celery
import kombu
import pytest
import redis

from tasks.celery_app import class_queue
from tasks.settings import Settings
from taxiway.keys import ARRIVALS, INFER, job_key, result_key
from tests.integration.test_mover import QUEUES
from tests.routing import EchoDevice, empty_queues, eventually, router_process
from tests.working import worker_process

pytestmark = pytest.mark.rabbitmq

TWINS = ("cpu.a", "cpu.b")


@pytest.fixture
def twins(settings: Settings, amqp_url: str, tmp_path) -> Iterator[Settings]:
    """Two classes of the same price behind RabbitMQ; their queues are deleted afterwards."""
    (tmp_path / "queues.yaml").write_text(QUEUES)
    empty_queues(amqp_url, TWINS)
    yield replace(settings, broker=amqp_url, queues=tmp_path / "queues.yaml")
    with kombu.Connection(amqp_url) as connection:
        for queue in map(class_queue, TWINS):
            queue.bind(connection.default_channel).delete()


def depth(settings: Settings, hardware_class: str) -> int:
    with kombu.Connection(settings.broker) as connection:
        return class_queue(hardware_class).bind(connection.default_channel).queue_declare(passive=True).message_count


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
            eventually(lambda: depth(twins, "cpu.a") == 1200, within=30)
        stack.enter_context(worker_process(twins, "--class", "cpu.b"))
        for _ in range(3):
            with router_process(twins) as router:
                eventually(lambda: moved(store, jobs), within=20)
                os.kill(router.process.pid, signal.SIGKILL)
        stack.enter_context(worker_process(twins, "--class", "cpu.a"))  # else done before a router is up
        eventually(lambda: finished(store, jobs), within=60)
        assert moved(store, jobs)
        assert {store.hget(job_key(job), "attempts") for job in jobs} == {b"1"}
        (move,) = json.loads(store.hget(job_key(moved(store, jobs)[0]), "moves"))
        assert (move["source"], move["target"]) in {("cpu.a", "cpu.b"), ("cpu.b", "cpu.a")}


def moved(store: redis.Redis, jobs: list[str]) -> list[str]:
    return [job for job in jobs if store.hexists(job_key(job), "moves")]


def finished(store: redis.Redis, jobs: list[str]) -> bool:
    return all(store.mget([result_key(job) for job in jobs]))
