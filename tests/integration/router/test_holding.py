"""Holding on real servers: what no class can take soon waits unbound, and is released as queues drain."""

import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from tasks.settings import Settings
from taxiway.contract.job import JobState, read_meta, read_result
from taxiway.contract.keys import (
    ARRIVALS,
    HELD,
    HOLDING,
    INFER,
    RELEASED,
    WORK,
    held_cell,
    job_key,
    priority_lists,
    result_key,
    work_cell,
)
from taxiway.contract.request import Request
from taxiway.contract.wire import cancel_message, encode_envelope, infer_message, task_envelope
from taxiway.errors import DeadlineExceededError
from tests.builders import recorded
from tests.routing import HTTP, EchoDevice, RouterProcess, eventually, router_process
from tests.stored import record_of
from tests.working import worker_process, worker_settings

HORIZON = 1.0
QUEUES = recorded("fleets/holding.yaml")
ALONE = 0.0051  # device seconds of a `paced` job that runs alone
BOUND = work_cell("cpu.batch", 3)


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a fleet of one class with a short horizon; broker and state are one Valkey."""
    return worker_settings(settings, tmp_path, QUEUES)


def publish(settings: Settings, raws: list[bytes]) -> None:
    """Write messages to the arrivals."""
    with redis.Redis.from_url(settings.broker) as client:
        client.lpush(ARRIVALS, *raws)


def send(settings: Settings, count: int = 1, **terms: Any) -> list[str]:
    """Ask for so many `paced` jobs; their ids."""
    jobs = [str(uuid.uuid4()) for _ in range(count)]
    asked = {"model": "paced", "inputs": "x", "service": "bulk", **terms}
    publish(settings, [infer_message(job, Request(**asked), reply="", origin="test") for job in jobs])
    return jobs


def is_placed_or_held(store: redis.Redis, job: str) -> bool:
    return record_of(store, job).state is not JobState.ACCEPTED


def holds_fewer_than(store: redis.Redis, count: int) -> bool:
    return store.hlen(HELD) < count or count == 0


def fill(settings: Settings, store: redis.Redis, **terms: int) -> str:
    """Bind a horizon's worth of jobs and hold another, then one more that has to be held; that one's id.

    Between two readings a router takes devices to work, and releases: what is held before the one makes up for that.
    """
    while not store.hlen(HELD):  # what a job takes falls with the rate at which they come
        last = send(settings, int(HORIZON / ALONE), **terms)[-1]
        eventually(partial(is_placed_or_held, store, last))
    return send(settings, 1 + int(HORIZON / ALONE), **terms)[-1]


def test_a_flood_waits_in_holding_while_its_class_keeps_its_horizon_and_its_device_never_idles(
    fleet: Settings, store: redis.Redis
) -> None:
    with router_process(fleet):
        with EchoDevice(fleet, answering=False):
            jobs = send(fleet, 800)
            eventually(lambda: record_of(store, jobs[-1]).state is JobState.HELD)
        bound = []
        with worker_process(fleet):
            while store.hlen(HELD) > 0:
                bound.append(float(store.hget(WORK, BOUND) or 0))
                time.sleep(0.01)
            ended = [eventually(partial(store.get, result_key(job))) for job in jobs]

    assert {read_meta(meta).status for meta in ended} == {"SUCCESS"}
    assert {record_of(store, job).attempts for job in jobs} == {1}
    assert max(bound) <= 2 * HORIZON  # a batch of arrivals may be on its way while the work is read
    assert sum(seconds > 0.05 for seconds in bound) >= 0.9 * len(bound) >= 20
    assert not any(store.exists(key) for key in (HOLDING, HELD, RELEASED))
    assert all(abs(float(store.hget(WORK, cell) or 0)) < 1e-6 for cell in (BOUND, held_cell("cpu.batch", 3)))


@pytest.fixture(scope="module")
def full(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """The router of such a fleet whose class is past its horizon, and whose device answers nothing."""
    fleet = worker_settings(lasting, tmp_path_factory.mktemp("full"), QUEUES)
    with (
        EchoDevice(fleet, answering=False),
        router_process(fleet) as router,
        redis.Redis.from_url(fleet.broker) as state,
    ):
        job = fill(fleet, state, deadline=500)
        eventually(lambda: record_of(state, job).state is JobState.HELD)
        yield router


def held(settings: Settings, state: redis.Redis, **terms: Any) -> str:
    """A job that is held."""
    [job] = send(settings, **terms)
    eventually(lambda: record_of(state, job).state is JobState.HELD)
    return job


def test_a_held_job_says_so_and_why(full: RouterProcess, lasting: Settings, state: redis.Redis) -> None:
    job = held(lasting, state)
    status = HTTP.get(f"{full.http}/v2/jobs/{job}").json()
    placement = HTTP.get(f"{full.http}/v2/jobs/{job}/placement").json()

    assert (status["state"], status["hardware_class"]) == ("held", "")
    assert status["position"] >= 1
    assert placement["reason"].startswith("held: every queue that could take it is past its horizon")
    assert placement["note"] is None
    assert placement["considered"][0]["why_not"].startswith("past its horizon")


@pytest.mark.usefixtures("full")
def test_a_held_job_is_cancelled_at_once(lasting: Settings, state: redis.Redis) -> None:
    job = held(lasting, state)
    publish(lasting, [cancel_message(job, origin="test")])

    assert read_meta(eventually(lambda: state.get(result_key(job)))).status == "REVOKED"
    assert not state.hexists(HELD, job_key(job))


@pytest.mark.usefixtures("full")
def test_a_held_job_past_its_deadline_ends_and_what_follows_it_fails_though_no_queue_has_room(
    lasting: Settings, state: redis.Redis
) -> None:
    first, after = str(uuid.uuid4()), str(uuid.uuid4())
    follow = {"chain": [{"task": INFER, "options": {"task_id": after}}]}
    body = msgspec.json.encode([[], {"model": "paced", "inputs": "x", "service": "bulk", "deadline": 4}, follow])
    publish(lasting, [encode_envelope(task_envelope(INFER, first, body, header={}, origin="test"))])
    for job in (first, after):
        with pytest.raises(DeadlineExceededError, match=r"^deadline of 4 s exceeded: held \d"):
            read_result(read_meta(eventually(partial(state.get, result_key(job)))))

    ended = record_of(state, first)
    assert ended.deadline_at - ended.accepted == pytest.approx(4)


@pytest.mark.usefixtures("full")
def test_work_for_people_passes_what_is_held(lasting: Settings, state: redis.Redis) -> None:
    [job] = send(lasting, deadline=60, priority="high", service="standard")
    eventually(lambda: record_of(state, job).state is not JobState.ACCEPTED)

    assert record_of(state, job).state is JobState.QUEUED
    assert state.llen(priority_lists("cpu.batch")[0]) == 1


def test_jobs_leave_holding_by_their_deadlines(fleet: Settings, store: redis.Redis) -> None:
    with EchoDevice(fleet, answering=False), router_process(fleet):
        first = fill(fleet, store)
        soon = send(fleet, 5, deadline=5000)
        eventually(lambda: all(record_of(store, job).state is JobState.HELD for job in soon))
    with EchoDevice(fleet) as device, router_process(fleet):
        eventually(lambda: {first, *soon} <= set(device.done))

    assert max(record_of(store, job).placed for job in soon) <= record_of(store, first).placed
    assert read_result(read_meta(eventually(lambda: store.get(result_key(first))))).outputs == {"payload": "x"}
    done = record_of(store, first)
    assert done.hardware_class == "cpu.batch"
    assert done.accepted < done.placed


def test_tenants_leave_holding_in_proportion_to_their_weights(fleet: Settings, store: redis.Redis) -> None:
    with EchoDevice(fleet, answering=False), router_process(fleet):
        fill(fleet, store)
        lab, shop = send(fleet, 400, tenant="lab"), send(fleet, 400, tenant="shop")
        eventually(lambda: record_of(store, shop[-1]).state is record_of(store, lab[-1]).state is JobState.HELD)
    with EchoDevice(fleet) as device, router_process(fleet):
        eventually(lambda: {*lab, *shop} <= set(device.done), within=120)

    first = sorted([*lab, *shop], key=lambda job: record_of(store, job).placed)[:400]
    assert len(set(first) & set(shop)) == pytest.approx(300, abs=90)  # a share is kept to a draw


def test_routers_that_die_while_they_release_lose_no_job_and_run_none_twice(
    fleet: Settings, store: redis.Redis
) -> None:
    with EchoDevice(fleet, answering=False), router_process(fleet):
        jobs = send(fleet, 800)
        eventually(lambda: record_of(store, jobs[-1]).state is JobState.HELD)
    with EchoDevice(fleet) as device:
        for _ in range(3):
            with router_process(fleet) as router:
                eventually(partial(holds_fewer_than, store, store.hlen(HELD)))
                router.process.kill()
        with router_process(fleet), router_process(fleet):
            eventually(lambda: set(jobs) <= set(device.done), within=120)

    assert len(device.done) == len(set(device.done)) == len(jobs)
