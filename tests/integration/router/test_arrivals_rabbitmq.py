from __future__ import annotations

import asyncio
import dataclasses
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import celery
import httpx
import kombu
import pytest
import redis

import taxiway
from broker.port import Arrival, ForwardOutcome, Outgoing
from broker.rabbitmq import RabbitTransport
from broker.valkey.claims import Verdict
from tasks.celery_app import class_queue
from tasks.settings import TREE, Settings
from tasks.ticket import job_id, read_ticket
from tasks.topology import load_topology
from taxiway.contract.job import JobState, read_meta
from taxiway.contract.keys import ARRIVALS, INFER, WORK, job_key, result_key
from taxiway.contract.request import Terms
from taxiway.contract.wire import HEADER
from taxiway.errors import BrokerUnavailableError, NoDeviceError
from tests.cable import Cable
from tests.narrowing import as_bytes, present
from tests.routing import EchoDevice, depth_on_rabbitmq, empty_queues, eventually, router_process
from tests.scripting import Store
from tests.stored import fields_of, record_of
from tests.waiting import BUSY

pytestmark = pytest.mark.rabbitmq

CLASSES = sorted(load_topology(TREE / "queues.yaml").hardware)


@pytest.fixture
def rabbit(settings: Settings, amqp_url: str) -> Settings:
    """Settings with RabbitMQ as the broker, its queues empty."""
    empty_queues(amqp_url, CLASSES)
    return dataclasses.replace(settings, broker=amqp_url)


@pytest.fixture
def store(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.state) as client:
        yield client


@pytest.fixture
def producer(rabbit: Settings) -> Iterator[celery.Celery]:
    app = celery.Celery(broker=rabbit.broker, backend=rabbit.state)
    yield app
    app.close()


def send(app: celery.Celery, **kwargs: Any) -> str:
    given = {"model": "echo", "inputs": "hello", "deadline": 60, **kwargs}
    return app.send_task(INFER, kwargs=given, queue=ARRIVALS).id


def receive(rabbit: Settings, queue: str, count: int) -> list[Any]:
    """That many messages of a class queue, as kombu reads them."""
    messages: list[Any] = []
    with kombu.Connection(rabbit.broker) as connection:
        bound = class_queue(queue).bind(connection.default_channel)
        while len(messages) < count:
            messages.append(eventually(lambda: bound.get(no_ack=True)))
    return messages


def state(store: redis.Redis, job: str) -> JobState:
    return record_of(store, job).state


def test_an_arrival_reaches_its_class_queue_as_a_celery_message(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery
) -> None:
    with EchoDevice(rabbit, answering=False), router_process(rabbit):
        job = send(producer)
        (message,) = receive(rabbit, "cpu.batch", 1)

    assert message.headers["task"] == INFER
    assert message.decode()[1] == {"model": "echo", "inputs": "hello", "deadline": 60}
    body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
    assert read_ticket(message.headers[HEADER], body, rabbit.secret).job == job
    assert state(store, job) is JobState.QUEUED


def test_urgent_jobs_leave_the_class_queue_first(rabbit: Settings, store: redis.Redis, producer: celery.Celery) -> None:
    with EchoDevice(rabbit, answering=False), router_process(rabbit):
        slow, fast = send(producer, deadline=5000, priority="low"), send(producer, priority="high")
        eventually(
            lambda: depth_on_rabbitmq(rabbit.broker, "cpu.batch") == 2
        )  # a job is recorded before it is published
        messages = receive(rabbit, "cpu.batch", 2)

    assert [m.headers["id"] for m in messages] == [fast, slow]


def test_a_refusal_reaches_the_producer(rabbit: Settings, store: redis.Redis, producer: celery.Celery) -> None:
    with EchoDevice(rabbit, answering=False), router_process(rabbit):
        job = send(producer, model="ecko")

        meta = read_meta(eventually(lambda: store.get(result_key(job))))

    assert (meta.status, meta.result["exc_type"]) == ("FAILURE", "UnknownModelError")


def test_the_http_door_places_on_rabbitmq_too(rabbit: Settings, store: redis.Redis) -> None:
    tensor = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    with EchoDevice(rabbit, answering=False), router_process(rabbit) as router:
        path = f"{router.http}/v2/models/echo/infer"
        accepted = httpx.post(path, json={"inputs": [tensor]}, headers={"prefer": "respond-async"})
        (message,) = receive(rabbit, "cpu.batch", 1)

    assert message.headers["id"] == accepted.json()["id"]


def test_what_the_http_door_recorded_and_could_not_publish_is_ended(rabbit: Settings, store: redis.Redis) -> None:
    tensor = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    with EchoDevice(rabbit, answering=False), router_process(rabbit) as router:
        path, asked = f"{router.http}/v2/models/echo/infer", {"inputs": [tensor]}

        def refused() -> bool:  # a router that connects declares the queue again
            with kombu.Connection(rabbit.broker) as connection:
                class_queue("cpu.batch").bind(connection.default_channel).delete()
            return httpx.post(path, json=asked, headers={"prefer": "respond-async"}).status_code == 503

        eventually(refused)
    jobs = [key.decode().removeprefix(job_key("")) for key in store.scan_iter(job_key("*"))]
    (ended,) = (job for job in jobs if state(store, job) is JobState.FAILED)
    assert read_meta(as_bytes(store.get(result_key(ended)))).result["exc_type"] == "BrokerUnavailableError"
    left = [int(count) for cell, count in fields_of(store, WORK).items() if cell.endswith("|jobs")]
    assert sum(left) == len(jobs) - 1


def test_a_placement_on_rabbitmq_is_explained(rabbit: Settings, producer: celery.Celery) -> None:
    with EchoDevice(rabbit, answering=False), router_process(rabbit) as router:
        job = send(producer)
        path = f"{router.http}/v2/jobs/{job}/placement"
        placed = eventually(lambda: (a := httpx.get(path, trust_env=False)).is_success and a).json()

    assert placed["note"] is None
    assert [row["hardware_class"] for row in placed["considered"] if row["chosen"]] == ["cpu.batch"]


def test_what_a_killed_router_had_taken_is_placed_by_another(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery
) -> None:
    jobs = [send(producer) for _ in range(20)]
    environment = {**rabbit.environment(), "PATH": "/usr/bin"}
    victim = subprocess.Popen([sys.executable, "-c", TAKE_AND_HANG], cwd=TREE, env=environment, stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"20\n"

    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()

    with EchoDevice(rabbit, answering=False), router_process(rabbit):
        eventually(lambda: all(state(store, job) is JobState.QUEUED for job in jobs))
        messages = receive(rabbit, "cpu.batch", 20)
    assert {m.headers["id"] for m in messages} == set(jobs)


TAKE_AND_HANG = textwrap.dedent(
    """
    import asyncio, os, time
    from broker.rabbitmq import RabbitTransport

    async def main():
        transport = RabbitTransport(
            broker=os.environ["TAXIWAY_BROKER"], state=os.environ["TAXIWAY_STATE"], name="v", keep_record=60, queues=set
        )
        taken = 0
        while taken < 20:
            await transport.wait(1)
            taken += len((await transport.take()).arrivals)
        print(taken, flush=True)
        time.sleep(60)

    asyncio.run(main())
    """
)


def transport_of(rabbit: Settings) -> RabbitTransport:
    return RabbitTransport(
        broker=rabbit.broker, state=rabbit.state, name="t", keep_record=60, queues=lambda: set(CLASSES)
    )


def test_the_queue_of_a_class_that_comes_later_is_declared_while_the_router_runs(rabbit: Settings) -> None:
    classes, new = {"cpu.batch"}, f"new.{uuid.uuid4().hex}"

    async def scenario() -> None:
        transport = RabbitTransport(
            broker=rabbit.broker, state=rabbit.state, name="t", keep_record=60, queues=lambda: classes
        )
        await transport.tidy()
        classes.add(new)
        await transport.tidy()
        await transport.close()

    asyncio.run(scenario())
    assert depth_on_rabbitmq(rabbit.broker, new) == 0
    with kombu.Connection(rabbit.broker) as connection:
        class_queue(new).bind(connection.default_channel).delete()


async def take(transport: RabbitTransport, count: int) -> list[Arrival]:
    taken: list[Arrival] = []
    while len(taken) < count:
        await transport.wait(1)
        taken += (await transport.take()).arrivals
    return taken


async def take_one(transport: RabbitTransport) -> Arrival:
    return (await take(transport, 1))[0]


def outgoing(arrival: Arrival, job: str, deadline_at: float = 0.0) -> Outgoing:
    fields = {"state": "queued", "cell": "cpu.batch|1", "work": "1", "deadline_at": repr(deadline_at)}
    return Outgoing(arrival.tag, "cpu.batch", 1, present(arrival.envelope), job, fields)


def test_a_job_recorded_and_not_published_is_published_when_it_comes_again(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery
) -> None:
    job = send(producer)
    store.hset(job_key(job), mapping={"state": "queued", "cell": "cpu.batch|1", "work": "1"})

    async def scenario() -> list[Any]:
        transport = transport_of(rabbit)
        answers = [await transport.forward([outgoing(await take_one(transport), job)])]
        await transport.close()
        return answers

    assert asyncio.run(scenario()) == [[ForwardOutcome.NEW]]
    assert len(receive(rabbit, "cpu.batch", 1)) == 1


def test_a_copy_that_a_worker_holds_never_ends_its_job_before_the_deadline_in_the_record(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery
) -> None:
    """A worker holds the first copy, published without a confirm, when the job comes again under its key."""
    job = send(producer)
    scripts = Store(store)
    first_due = store.time()[0] + 300.0

    async def place(due: float) -> list[ForwardOutcome]:
        transport = transport_of(rabbit)
        placed = await transport.forward([outgoing(await take_one(transport), job, due)])
        await transport.close()
        return placed

    assert asyncio.run(place(first_due)) == [ForwardOutcome.NEW]
    store.hset(job_key(job), "published", "0")  # the router heard no confirm
    [held] = scripts.claim("a", job, deadline=first_due)
    producer.send_task(INFER, kwargs={}, queue=ARRIVALS, task_id=job)
    assert asyncio.run(place(first_due + 30)) == [ForwardOutcome.NEW]

    assert held.verdict is Verdict.RUN
    assert record_of(store, job).deadline_at == first_due
    assert depth_on_rabbitmq(rabbit.broker, "cpu.batch") == 2


@pytest.mark.parametrize(("published", "ended"), [("0", JobState.FAILED), ("1", JobState.QUEUED)])
def test_a_refused_copy_ends_a_job_that_was_recorded_and_not_published_and_no_other(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery, published: str, ended: JobState
) -> None:
    job = uuid.uuid4().hex
    store.hset(job_key(job), mapping={"state": "queued", "cell": "cpu.batch|1", "work": "1", "published": published})
    with router_process(rabbit):
        kwargs = {"model": "not-there", "inputs": "hello"}
        producer.send_task(INFER, kwargs=kwargs, queue=ARRIVALS, task_id=job)
        after = send(producer, model="not-there")
        eventually(lambda: store.exists(result_key(after)))
    assert state(store, job) is ended
    assert store.exists(result_key(job)) == (ended is JobState.FAILED)


def test_a_resubmit_publishes_what_a_router_recorded_and_could_not_publish(
    rabbit: Settings, store: redis.Redis
) -> None:
    job = job_id(Terms(idempotency_key="once"), rabbit.secret[0])
    store.hset(job_key(job), mapping={"state": "queued", "cell": "cpu.batch|1", "work": "1"})
    with EchoDevice(rabbit, answering=False), router_process(rabbit) as router, taxiway.Client(router.http) as client:
        assert client.submit("echo", "hello", idempotency_key="once").id == job
        (message,) = receive(rabbit, "cpu.batch", 1)
    assert message.headers["id"] == job


@pytest.mark.parametrize("published", ["0", "1"])
def test_a_copy_without_a_device_gets_the_job_of_its_key_only_if_that_was_published(
    rabbit: Settings, store: redis.Redis, published: str
) -> None:
    with router_process(rabbit) as router, taxiway.Client(router.http) as client:
        submit = partial(client.submit, "echo", "hello", idempotency_key="once")
        with EchoDevice(rabbit, answering=False):
            job = submit().id
        eventually(lambda: not client.fleet()["devices"])
        store.hset(job_key(job), "published", published)
        if published == "1":
            assert submit().id == job
        else:
            with pytest.raises(NoDeviceError):
                submit()


def test_a_job_that_was_published_is_not_published_again(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery
) -> None:
    job = send(producer)

    async def scenario() -> tuple[Any, Any]:
        transport = transport_of(rabbit)
        first = await transport.forward([outgoing(await take_one(transport), job)])
        producer.send_task(INFER, kwargs={}, queue=ARRIVALS, task_id=job)
        again = await transport.forward([outgoing(await take_one(transport), job)])
        await transport.close()
        return first, again

    assert asyncio.run(scenario()) == ([ForwardOutcome.NEW], [ForwardOutcome.COPY])
    assert depth_on_rabbitmq(rabbit.broker, "cpu.batch") == 1


def test_a_job_that_runs_was_published_though_its_router_did_not_say_so(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery
) -> None:
    job = send(producer)
    store.hset(job_key(job), mapping={"state": "running", "cell": "cpu.batch|1", "work": "1"})

    async def scenario() -> list[ForwardOutcome]:
        transport = transport_of(rabbit)
        forwarded = await transport.forward([outgoing(await take_one(transport), job)])
        await transport.close()
        return forwarded

    assert asyncio.run(scenario()) == [ForwardOutcome.COPY]
    assert depth_on_rabbitmq(rabbit.broker, "cpu.batch") == 0


def test_what_was_abandoned_is_taken_again(rabbit: Settings, producer: celery.Celery) -> None:
    job = send(producer)

    async def scenario() -> list[Any]:
        transport = transport_of(rabbit)
        first = await take_one(transport)
        transport.abandon()
        again = await take_one(transport)
        await transport.settle([again.tag])
        await transport.close()
        return [present(one.envelope).headers["id"] for one in (first, again)]

    assert asyncio.run(scenario()) == [job, job]


def test_what_is_settled_never_comes_again_and_all_else_does(rabbit: Settings, producer: celery.Celery) -> None:
    jobs = [send(producer) for _ in range(4)]

    async def scenario() -> list[str]:
        transport = transport_of(rabbit)
        taken = await take(transport, 4)
        await transport.settle([taken[0].tag, taken[2].tag])
        transport.abandon()
        rest = await take(transport, 2)
        await transport.settle([arrival.tag for arrival in reversed(rest)])
        transport.abandon()
        last = send(producer)
        [left] = await take(transport, 1)
        await transport.close()
        assert present(left.envelope).headers["id"] == last
        return [present(arrival.envelope).headers["id"] for arrival in rest]

    assert asyncio.run(scenario()) == [jobs[1], jobs[3]]


def test_an_unreachable_broker_is_reported_within_two_seconds(rabbit: Settings) -> None:
    async def scenario() -> None:
        transport = transport_of(dataclasses.replace(rabbit, broker="amqp://guest:guest@127.0.0.1:1/"))
        with pytest.raises(BrokerUnavailableError):
            async with asyncio.timeout(2 + BUSY):
                await transport.take()
        await transport.close()

    asyncio.run(scenario())


def test_a_router_and_its_broker_find_each_other_again(
    rabbit: Settings, store: redis.Redis, producer: celery.Celery, tmp_path: Path
) -> None:
    parts = urlsplit(rabbit.broker)
    cable, log = Cable(present(parts.hostname), parts.port or 5672), tmp_path / "router.log"
    credentials = parts.netloc.rpartition("@")[0]
    through = dataclasses.replace(rabbit, broker=f"amqp://{credentials}@127.0.0.1:{cable.port}{parts.path}")
    with EchoDevice(rabbit, answering=False), log.open("wb") as errors, router_process(through, log=errors):
        before = send(producer)
        eventually(lambda: state(store, before) is JobState.QUEUED)
        cable.pull()
        eventually(lambda: "server unavailable" in log.read_text())
        jobs = [send(producer) for _ in range(20)]
        cable.plug()

        eventually(lambda: all(state(store, job) is JobState.QUEUED for job in jobs))
        arrived: set[str] = set()  # a job may come twice: published, and the cable cut before that was known
        while arrived != {before, *jobs}:
            arrived |= {m.headers["id"] for m in receive(rabbit, "cpu.batch", 1)}
    cable.close()

    assert log.read_text().count("server unavailable") == 1
