import asyncio
import dataclasses
import json
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import celery
import httpx
import msgspec
import pytest
import redis

import taxiway
from broker.port import Arrival, DeadLetter, ForwardOutcome, Outgoing
from broker.valkey.queues import ValkeyTransport
from local.embedded import EmbeddedValkey
from tasks.heartbeat import GONE_AFTER
from tasks.settings import Settings
from taxiway.contract.job import JobState, Result, read_meta, read_result
from taxiway.contract.keys import (
    ARRIVALS,
    DEAD,
    HEARTBEATS,
    INFER,
    job_key,
    priority_list,
    priority_lists,
    reply_channel,
    result_key,
    session_key,
    spent_key,
)
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from taxiway.errors import OverloadedError, TaxiwayError
from tests.narrowing import present
from tests.routing import EchoDevice, EchoFleet, eventually, router_process
from tests.stored import record_of
from tests.waiting import Blocking


@pytest.fixture
def device(settings: Settings) -> Iterator[EchoDevice]:
    with EchoDevice(settings) as device:
        yield device


def send(
    store: redis.Redis,
    *,
    model: str = "echo",
    inputs: str = "hello",
    job: str | None = None,
    reply: str = "",
    level: int = 0,
    **terms: Any,
) -> str:
    job = job or str(uuid.uuid4())
    message = infer_message(job, Request(model=model, inputs=inputs, **terms), reply=reply, origin="test")
    store.lpush(priority_list(ARRIVALS, level), message)
    return job


def result(store: redis.Redis, job: str, *, within: float = 60.0) -> Result:
    return read_result(read_meta(eventually(lambda: store.get(result_key(job)), within=within)))


def id_of(arrival: Arrival) -> str:
    return str(present(arrival.envelope).headers["id"])


def waiting(store: redis.Redis, queue: str = "cpu.batch") -> int:
    return sum(store.llen(name) for name in priority_lists(queue))


@pytest.mark.usefixtures("echo")
def test_an_arrival_reaches_a_worker_and_its_record_follows(state: redis.Redis) -> None:
    job = send(state, deadline=30)

    assert result(state, job).outputs == {"payload": "hello"}
    done = record_of(state, job)
    assert done.state is JobState.SUCCEEDED
    assert (done.hardware_class, done.variant, done.model) == ("cpu.batch", "echo", "echo:1")
    assert done.accepted <= done.started <= done.finished <= done.deadline_at


@pytest.mark.usefixtures("echo")
def test_a_refusal_is_a_celery_failure_and_is_announced_to_its_client(state: redis.Redis) -> None:
    pubsub = state.pubsub()
    pubsub.subscribe(reply_channel("c1"))

    job = send(state, model="ecko", reply="c1")

    with pytest.raises(TaxiwayError) as caught:
        result(state, job)
    assert caught.value.code == "unknown_model"
    announced = eventually(lambda: pubsub.get_message(ignore_subscribe_messages=True, timeout=0.1))
    assert json.loads(announced["data"])["task_id"] == job
    assert eventually(lambda: state.exists(ARRIVALS) == 0)
    pubsub.close()


def test_where_producers_sign_a_router_takes_what_they_signed_and_parks_the_rest(
    settings: Settings, store: redis.Redis, device: EchoDevice
) -> None:
    signing = dataclasses.replace(settings, producers=(b"p" * 16,))
    unsigned = send(store, deadline=30)
    with router_process(signing), taxiway.Client(settings.broker, key=(b"p" * 16).hex()) as producer:
        assert producer.infer("echo", "signed", deadline=30).outputs == {"payload": "signed"}
        (letter,) = eventually(lambda: store.lrange(DEAD, 0, -1))
    assert "signed by a producer" in msgspec.json.decode(letter, type=DeadLetter).reason
    assert not store.exists(job_key(unsigned), result_key(unsigned))


def test_a_router_killed_under_load_loses_nothing(settings: Settings, store: redis.Redis, device: EchoDevice) -> None:
    jobs = []
    for _ in range(3):
        with router_process(settings) as router:
            jobs += [send(store, deadline=600) for _ in range(300)]
            eventually(lambda: store.llen(ARRIVALS) < 200)
            router.process.kill()

    with router_process(settings):
        for job in jobs:
            assert result(store, job)
    assert len(device.done) == len(set(device.done)) == len(jobs)


@contextmanager
def transports(settings: Settings, *names: str) -> Iterator[list[Any]]:
    """What routers of these names take arrivals with, each call of which is waited for."""
    with asyncio.Runner() as runner:
        opened = [Blocking(runner, ValkeyTransport(settings.broker, name=name, keep_record=60)) for name in names]
        yield opened
        for one in opened:
            one.close()


def arrives(router: Any, store: redis.Redis, *messages: bytes) -> Sequence[Arrival]:
    """What a router takes that is woken by these messages."""
    arriving = threading.Timer(0.05, store.lpush, (ARRIVALS, *messages))
    arriving.start()
    router.wait(10.0)
    arriving.join()
    return router.take()


def message(job: str) -> bytes:
    return infer_message(job, Request(model="echo", inputs="hello"), reply="", origin="test")


def outgoing(arrival: Arrival) -> Outgoing:
    fields = {"state": "queued", "cell": "c|1", "work": "1"}
    return Outgoing(arrival.tag, "cpu.batch", 1, present(arrival.envelope), id_of(arrival), fields)


def test_what_an_idle_router_waited_for_is_put_back_when_it_dies_and_is_not_forwarded_by_it(
    settings: Settings, store: redis.Redis
) -> None:
    with transports(settings, "idle", "other") as (idle, other):
        idle.take()
        [woken] = arrives(idle, store, message("j"))
        store.delete(session_key("idle.1"))  # its session ended while it was stopped
        assert other.tidy() == 1
        assert idle.forward([outgoing(woken)]) == [ForwardOutcome.COPY]

        def taken() -> Sequence[Arrival]:
            other.tidy()  # what the idle one still waited for reached it late
            return other.take()

        assert [id_of(one) for one in eventually(taken)] == ["j"]
    assert waiting(store) == 0


def test_nothing_is_taken_in_the_place_of_arrivals_that_are_still_to_be_answered(
    settings: Settings, store: redis.Redis
) -> None:
    with transports(settings, "r") as (router,):
        store.lpush(ARRIVALS, *map(message, "ab"))
        taken = list(router.take())
        taken += arrives(router, store, message("woken"))
        store.lpush(ARRIVALS, message("late"))
        assert router.forward([outgoing(taken[2])]) == [ForwardOutcome.NEW]
        assert store.llen(ARRIVALS) == 1
        router.settle([taken[0].tag])
        taken += router.take()
        router.settle([taken[3].tag])
    assert [id_of(one) for one in taken] == ["a", "b", "woken", "late"]
    assert not store.exists(*priority_lists(ARRIVALS))


def test_where_arrivals_come_in_bursts_one_wake_takes_all_of_them(settings: Settings, store: redis.Redis) -> None:
    with transports(settings, "r") as (router,):
        router.take()
        taken = list(arrives(router, store, *map(message, "abcd")))
        while len(taken) < 4:
            router.forward([outgoing(arrival) for arrival in taken])
            taken += router.take()
        router.settle(sorted({arrival.tag for arrival in taken}))
        assert len(arrives(router, store, *map(message, "efgh"))) == 4


def test_a_router_that_stops_finishes_what_it_took(settings: Settings, store: redis.Redis) -> None:
    with EchoDevice(settings, answering=False), router_process(settings) as router:
        jobs = [send(store, deadline=600) for _ in range(400)]
        eventually(lambda: waiting(store) > 0)
        router.process.terminate()
        assert router.process.wait(timeout=60) == 0

    arrived = sum(store.llen(name) for name in priority_lists(ARRIVALS))
    assert waiting(store) + arrived == len(jobs)


def test_a_router_that_is_to_stop_says_so_and_serves_on_for_a_while(settings: Settings, device: EchoDevice) -> None:
    body = {"inputs": [{"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
    with router_process(settings, options=["--parting", "30"]) as router, httpx.Client(trust_env=False) as http:
        eventually(lambda: http.get(f"{router.http}/v2/health/ready").status_code == 200)
        router.process.terminate()
        eventually(lambda: http.get(f"{router.http}/v2/health/ready").status_code == 503)
        answer = http.post(f"{router.http}/v2/models/echo/infer", json=body)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        router.process.terminate()  # for the second time: now
        assert router.process.wait(timeout=60) == 0


def test_a_router_and_its_broker_find_each_other_again(tmp_path: Path, settings: Settings) -> None:
    log = tmp_path / "router.log"
    with EmbeddedValkey(tmp_path / "valkey") as server, log.open("wb") as errors:
        own = dataclasses.replace(settings, broker=server.url)
        with router_process(own, log=errors) as router, redis.Redis.from_url(server.url) as store:
            server.stop()
            eventually(lambda: "server unavailable" in log.read_text())
            time.sleep(1)  # many attempts fit into a second
            assert router.process.poll() is None
            server.start()
            EchoDevice(own).beat()
            for name in store.zrange(HEARTBEATS, 0, -1):
                store.zincrby(HEARTBEATS, -GONE_AFTER - 0.5, name)  # as if it could not be renewed meanwhile
            job = send(store, deadline=30)
            eventually(lambda: waiting(store))
            with EchoDevice(own):
                assert result(store, job).outputs == {"payload": "hello"}
    assert log.read_text().count('"event":"server unavailable"') == 1
    assert log.read_text().count('"available again","outage":"server unavailable"') == 1


@pytest.mark.usefixtures("paused")
def test_a_plain_celery_worker_understands_what_the_router_forwards(
    state: redis.Redis, tmp_path: Path, echo: EchoFleet
) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", PLAIN_WORKER, echo.settings.broker], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        app = celery.Celery(broker=echo.settings.broker, backend=echo.settings.broker)
        sent = app.send_task(INFER, kwargs={"model": "echo", "inputs": "hi", "deadline": 60}, queue=ARRIVALS)
        assert sent.get(timeout=30) == {"echoed": "hi"}
    finally:
        worker.terminate()
        worker.wait(timeout=20)
        app.close()


PLAIN_WORKER = textwrap.dedent(
    """
    import sys
    from celery import Celery
    from kombu import Queue

    app = Celery(broker=sys.argv[1], backend=sys.argv[1])
    app.conf.task_queues = [Queue("cpu.batch")]

    @app.task(name="taxiway.infer")
    def infer(model, inputs, **_):
        return {"echoed": inputs}

    app.worker_main(["worker", "-P", "solo", "-l", "ERROR", "--without-mingle", "--without-gossip"])
    """
)


def test_another_router_knows_what_a_tenant_has_spent(
    settings: Settings, store: redis.Redis, device: EchoDevice, tmp_path: Path
) -> None:
    (tmp_path / "queues.yaml").write_text(settings.queues.read_text() + "\ntenants: {lab: {usd_per_day: 1}}\n")
    seconds, _ = store.time()
    store.hset(spent_key(datetime.fromtimestamp(seconds, UTC).date().isoformat()), "lab", 1.0)

    with router_process(dataclasses.replace(settings, queues=tmp_path / "queues.yaml")):
        job = send(store, tenant="lab", deadline=30)
        with pytest.raises(OverloadedError, match="'lab' has 0 of 1 USD left for today"):
            result(store, job)
