from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import celery
import httpx
import msgspec
import pytest
import redis

import taxiway
from broker.port import Arrival, DeadLetter, ForwardOutcome, Outgoing
from broker.valkey.queues import TAKES, ValkeyTransport
from local.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings
from taxiway.contract.job import JobState, Result, read_meta, read_result
from taxiway.contract.keys import (
    ARRIVALS,
    DEAD,
    INFER,
    TURNS,
    WORK,
    arrived_cell,
    in_flight_key,
    job_key,
    priority_list,
    priority_lists,
    reply_channel,
    result_key,
    session_key,
    spent_key,
)
from taxiway.contract.request import Request
from taxiway.contract.wire import cancel_message, infer_message
from taxiway.errors import OverloadedError, TaxiwayError
from tests.narrowing import as_bytes, present
from tests.routing import EchoDevice, EchoFleet, echo_fleet, eventually, router_process
from tests.stored import fields_of, is_listened_to, record_of


@pytest.fixture
def device(settings: Settings) -> Iterator[EchoDevice]:
    with EchoDevice(settings) as device:
        yield device


@pytest.fixture
def idle_device(settings: Settings) -> Iterator[EchoDevice]:
    with EchoDevice(settings, answering=False) as device:
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


def is_queued(store: redis.Redis, job: str) -> bool:
    return record_of(store, job).state is JobState.QUEUED


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
def test_arrivals_of_every_priority_are_taken(state: redis.Redis) -> None:
    jobs = [send(state, level=level, deadline=30) for level in range(4)]

    for job in jobs:
        assert result(state, job)


def test_the_work_placed_is_counted_until_it_is_done(settings: Settings, store: redis.Redis) -> None:
    with echo_fleet(settings):
        jobs = [send(store, model="paced", inputs="x", deadline=60) for _ in range(20)]
        for job in jobs:
            result(store, job)

    placed = {cell: float(figure) for cell, figure in fields_of(store, WORK).items()}
    assert placed.pop(arrived_cell("cpu.batch", "paced:1")) == 20
    placed = {cell: figure for cell, figure in placed.items() if not cell.endswith(TURNS)}  # never fewer
    assert placed
    assert all(abs(seconds) < 1e-9 for seconds in placed.values())


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


@pytest.mark.usefixtures("paused")
def test_a_copy_that_is_refused_leaves_the_accepted_job_alone(state: redis.Redis) -> None:
    job = send(state, deadline=30)
    eventually(lambda: state.exists(job_key(job)))

    send(state, model="ecko", job=job)
    other = send(state, model="ecko")

    with pytest.raises(TaxiwayError):
        result(state, other)
    assert record_of(state, job).state is JobState.QUEUED
    assert not state.exists(result_key(job))


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


@pytest.mark.usefixtures("echo")
def test_what_is_no_message_is_parked_and_the_router_goes_on(state: redis.Redis) -> None:
    for raw in (b"\x00\xff", b"{}", b'{"body":"%%%","headers":{},"properties":{}}'):
        state.lpush(ARRIVALS, raw)
    job = send(state)

    assert result(state, job)
    letters = eventually(lambda: state.llen(DEAD) == 3 and state.lrange(DEAD, 0, -1))
    assert all(json.loads(letter)["reason"] for letter in letters)


@pytest.mark.usefixtures("paused")
def test_a_cancelled_job_is_revoked_while_it_waits(state: redis.Redis) -> None:
    job = send(state, deadline=60)
    eventually(lambda: record_of(state, job).state is JobState.QUEUED)

    state.lpush(ARRIVALS, cancel_message(job, origin="test"))

    meta = read_meta(eventually(lambda: state.get(result_key(job))))
    assert meta.status == "REVOKED"
    assert record_of(state, job).state is JobState.CANCELLED


@pytest.mark.usefixtures("paused")
def test_a_second_arrival_of_a_job_is_dropped(state: redis.Redis) -> None:
    job = send(state, deadline=60)
    send(state, job=job, deadline=60)

    last = send(state, deadline=60)

    eventually(lambda: state.exists(job_key(last)))
    assert waiting(state) == 2


@pytest.mark.usefixtures("echo")
def test_a_second_arrival_of_a_finished_job_is_answered_to_its_own_client(state: redis.Redis) -> None:
    job = send(state, reply="c1")
    result(state, job)
    pubsub = state.pubsub()
    pubsub.subscribe(reply_channel("c2"))

    send(state, job=job, reply="c2")

    announced = eventually(lambda: pubsub.get_message(ignore_subscribe_messages=True, timeout=0.1))
    assert json.loads(announced["data"])["task_id"] == job
    pubsub.close()


def test_two_routers_share_the_arrivals(state: redis.Redis, echo: EchoFleet) -> None:
    with router_process(echo.settings):
        jobs = [send(state, deadline=60) for _ in range(500)]
        for job in jobs:
            assert result(state, job).outputs == {"payload": "hello"}

    assert all(echo.device.done.count(job) == 1 for job in jobs)


def test_what_a_killed_router_had_taken_is_placed_by_another(
    settings: Settings, store: redis.Redis, idle_device: EchoDevice
) -> None:
    jobs = [send(store, deadline=600) for _ in range(20)]
    victim = subprocess.Popen([sys.executable, "-c", TAKE_AND_HANG], cwd=TREE, env=environment(settings))
    eventually(lambda: store.llen(in_flight_key("victim.1", TAKES)) == 20)

    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not any(store.exists(name) for name in priority_lists(ARRIVALS))

    with router_process(settings):
        for job in jobs:
            eventually(partial(is_queued, store, job))
    assert waiting(store) == 20
    assert not store.exists(in_flight_key("victim.1", TAKES))


TAKE_AND_HANG = textwrap.dedent(
    """
    import asyncio, os, time
    from broker.valkey.queues import ValkeyTransport

    async def main():
        url = os.environ["TAXIWAY_BROKER"]
        transport = ValkeyTransport(url, name="victim", keep_record=60)
        await transport.take()
        time.sleep(60)

    asyncio.run(main())
    """
)


def environment(settings: Settings) -> dict[str, Any]:
    return {**os.environ, **settings.environment()}


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


def test_a_revived_router_does_not_forward_what_was_put_back(
    settings: Settings, store: redis.Redis, idle_device: EchoDevice
) -> None:
    async def scenario() -> tuple[list[ForwardOutcome], int]:
        url = settings.broker
        revived = ValkeyTransport(url, name="revived", keep_record=60)
        other = ValkeyTransport(url, name="other", keep_record=60)
        job = send(store)
        taken = await revived.take()
        store.delete(session_key("revived.1"))  # its session ended while it was stopped

        assert await other.tidy() == 1
        answer = await revived.forward([outgoing(taken.arrivals[0], job)])

        again = await other.take()
        await other.close()
        await revived.close()
        return answer, len(again.arrivals)

    assert asyncio.run(scenario()) == ([ForwardOutcome.COPY], 1)
    assert waiting(store) == 0


def test_what_an_idle_router_waited_for_is_put_back_when_it_dies(settings: Settings, store: redis.Redis) -> None:
    async def scenario() -> tuple[int, list[ForwardOutcome], list[Any]]:
        url = settings.broker
        idle = ValkeyTransport(url, name="idle", keep_record=60)
        other = ValkeyTransport(url, name="other", keep_record=60)
        await idle.take()
        waiting = asyncio.create_task(idle.wait(1.0))
        job = await asyncio.to_thread(send, store, level=2)
        await waiting
        [woken] = (await idle.take()).arrivals
        store.delete(session_key("idle.1"))

        put_back = await other.tidy()
        answers = await idle.forward([outgoing(woken, job)])
        async with asyncio.timeout(60):
            while not (again := (await other.take()).arrivals):
                await other.wait(0.1)
                await other.tidy()  # what the idle one still waited for reached it late
        await other.close()
        await idle.close()
        return put_back, answers, [id_of(a) == job for a in again]

    assert asyncio.run(scenario()) == (1, [ForwardOutcome.COPY], [True])


def test_what_arrives_while_a_router_forwards_is_taken_next(settings: Settings, store: redis.Redis) -> None:
    async def scenario() -> bool:
        router = ValkeyTransport(settings.broker, name="r", keep_record=60)
        first = await asyncio.to_thread(send, store)
        [arrival] = (await router.take()).arrivals
        later = [await asyncio.to_thread(send, store) for _ in range(3)]
        assert await router.forward([outgoing(arrival, first)]) == [ForwardOutcome.NEW]
        taken = await router.take()
        await router.settle([a.tag for a in taken.arrivals])
        await router.close()
        return [id_of(a) for a in taken.arrivals] == later

    assert asyncio.run(scenario())
    assert not store.exists(*priority_lists(ARRIVALS))


def test_nothing_is_taken_in_the_place_of_arrivals_that_are_still_to_be_answered(
    settings: Settings, store: redis.Redis
) -> None:
    async def scenario() -> tuple[Any, bool]:
        router = ValkeyTransport(settings.broker, name="r", keep_record=60)
        early = [await asyncio.to_thread(send, store) for _ in range(2)]
        taken = list((await router.take()).arrivals)
        waiting = asyncio.create_task(router.wait(5.0))
        woken = await asyncio.to_thread(send, store)
        await waiting
        taken += (await router.take()).arrivals
        late = await asyncio.to_thread(send, store)
        assert await router.forward([outgoing(taken[2], woken)]) == [ForwardOutcome.NEW]
        left = store.llen(ARRIVALS)
        await router.settle([taken[0].tag])
        taken += (await router.take()).arrivals
        await router.settle([taken[3].tag])
        await router.close()
        return left, [id_of(arrival) for arrival in taken] == [*early, woken, late]

    assert asyncio.run(scenario()) == (1, True)
    assert not store.exists(*priority_lists(ARRIVALS))


def test_where_arrivals_come_in_bursts_one_wake_takes_all_of_them(settings: Settings, store: redis.Redis) -> None:
    request = Request(model="echo", inputs="hello")

    async def woken(router: ValkeyTransport) -> Sequence[Arrival]:
        waiting = asyncio.create_task(router.wait(5.0))
        store.lpush(ARRIVALS, *(infer_message(job, request, reply="", origin="test") for job in "abcd"))
        await waiting
        return (await router.take()).arrivals

    async def all_of(router: ValkeyTransport) -> None:
        taken = list(await woken(router))
        while len(taken) < 4:
            await router.forward([outgoing(arrival, id_of(arrival)) for arrival in taken])
            taken += (await router.take()).arrivals
        await router.settle(sorted({arrival.tag for arrival in taken}))

    async def scenario() -> int:
        router = ValkeyTransport(settings.broker, name="r", keep_record=60)
        await router.take()
        await all_of(router)
        second = await woken(router)
        await router.close()
        return len(second)

    assert asyncio.run(scenario()) == 4


def outgoing(arrival: Arrival, job: str) -> Outgoing:
    fields = {"state": "queued", "cell": "c|1", "work": "1"}
    return Outgoing(arrival.tag, "cpu.batch", 1, present(arrival.envelope), job, fields)


def test_a_router_that_stops_finishes_what_it_took(
    settings: Settings, store: redis.Redis, idle_device: EchoDevice
) -> None:
    with router_process(settings) as router:
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
            with EchoDevice(own):
                assert result(store, send(store, deadline=30)).outputs == {"payload": "hello"}
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


@pytest.mark.usefixtures("paused")
def test_celery_events_report_placed_jobs(state: redis.Redis, echo: EchoFleet) -> None:
    app = celery.Celery(broker=echo.settings.broker)
    heard: list[dict[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-sent": heard.append})
        capture = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        capture.start()
        eventually(lambda: is_listened_to(state))
        job = send(state, deadline=60)
        eventually(lambda: heard)
        receiver.should_stop = True
        capture.join()
    app.close()

    assert [(event["uuid"], event["queue"]) for event in heard] == [(job, "cpu.batch")]


def ruled_settings(
    settings: Settings, folder: Path, tenants: dict[str, Any] | dict[str, dict[str, list[str]]]
) -> Settings:
    """The settings with these tenants in queues.yaml."""
    queues = folder / "queues.yaml"
    queues.write_text(settings.queues.read_text() + f"\ntenants: {json.dumps(tenants)}\n")
    return dataclasses.replace(settings, queues=queues)


def test_a_tenant_is_refused_once_its_day_is_spent_and_others_are_not(
    settings: Settings, store: redis.Redis, device: EchoDevice, tmp_path: Path
) -> None:
    ended: list[Any] = []
    with router_process(ruled_settings(settings, tmp_path, {"lab": {"usd_per_day": 4e-7}})):
        while not ended or ended[-1].status == "SUCCESS":  # the faster they come, the less each costs
            job = send(store, model="paced", inputs="x", tenant="lab", deadline=60)
            ended.append(read_meta(eventually(partial(store.get, result_key(job)))))
        other = send(store, model="paced", inputs="x", tenant="other", deadline=60)
        assert result(store, other).outputs == {"payload": "x"}

    *answered, refused = ended
    [key] = store.keys(spent_key("*"))
    assert answered
    assert refused.result["exc_type"] == "OverloadedError"
    assert 0 < refused.result["details"]["retry_after"] <= 86400
    assert 0 < float(as_bytes(store.hget(key, "lab"))) < 2 * 4e-7  # a reading may miss what was just placed


def test_another_router_knows_what_a_tenant_has_spent(
    settings: Settings, store: redis.Redis, device: EchoDevice, tmp_path: Path
) -> None:
    ruled = ruled_settings(settings, tmp_path, {"lab": {"usd_per_day": 1.0}})
    seconds, _ = store.time()
    store.hset(spent_key(datetime.fromtimestamp(seconds, UTC).date().isoformat()), "lab", 1.0)

    with router_process(ruled):
        job = send(store, tenant="lab", deadline=30)
        with pytest.raises(OverloadedError, match="'lab' has 0 of 1 USD left for today"):
            result(store, job)


def test_a_tenants_request_runs_on_its_classes_alone(
    settings: Settings, store: redis.Redis, device: EchoDevice, tmp_path: Path
) -> None:
    rules = {"lab": {"classes": ["cpu.batch"]}, "shop": {"classes": ["gpu.realtime"]}}
    with (
        EchoDevice(settings, hardware_class="gpu.realtime") as dear,
        router_process(ruled_settings(settings, tmp_path, rules)),
    ):
        ours = send(store, tenant="lab", deadline=30)
        theirs = send(store, tenant="shop", deadline=30)
        assert result(store, ours).report.hardware_class == "cpu.batch"
        assert result(store, theirs).report.hardware_class == "gpu.realtime"
    assert dear.done == [theirs]
