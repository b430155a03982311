"""Jobs end at their deadline, by the store's clock, wherever they are; their waiters and workers are notified."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
import redis

from broker.port import Outgoing
from broker.valkey.jobs import Ending, forget_ended_call, overdue_answer, overdue_call
from broker.valkey.queues import ValkeyTransport
from broker.valkey.worker_store import WorkerStore
from router.service.store import RouterStore
from router.upkeep.deadlines import Deadlines
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway import Client
from taxiway.contract.job import JobState
from taxiway.contract.keys import DEADLINES, job_key
from taxiway.errors import DeadlineExceededError
from tests.builders import a_ticket
from tests.celery_double import NoCelery, NoQueue
from tests.routing import EchoDevice, eventually, router_process
from tests.scripting import KEEP, Store, placed
from tests.waiting import BUSY, in_thread
from workers.stages.held import Cancellations, HeldJobs
from workers.stages.job import Delivery


@pytest.fixture
def store(scripts: Store) -> Store:
    return scripts


def overdue(store: Store) -> list[tuple[str, str]]:
    return [(one.job, one.reply) for one in overdue_answer(store.run(overdue_call(10, 5.0)))[1]]


async def fire(settings: Settings) -> int:
    limits, state = Limits(), settings.broker
    router = RouterStore(state, limits)
    broker = ValkeyTransport(state, name="r", keep_record=limits.keep_record, confirmed_by=limits.confirmed_by)
    try:
        return await Deadlines(router, broker).fire()
    finally:
        await router.close()
        await broker.close()


def alike(*jobs: str, **fields: Any) -> list[Outgoing]:
    """Jobs that are forwarded as one group."""
    first, *rest = (placed(job, **fields) for job in jobs)
    return [first, *(msgspec.structs.replace(one, fields=first.fields) for one in rest)]


def cancelled(job: str) -> Ending:
    return Ending(job, JobState.CANCELLED, b"cancelled")


def test_a_job_is_overdue_once_its_deadline_passed_and_comes_again_only_after_a_while(store: Store) -> None:
    now = store.client.time()[0]
    past = msgspec.structs.replace(placed("past", deadline_at=f"{now - 1}.5"), reply="me")
    store.forward(past, placed("far", deadline_at=f"{now + 60}.5"))
    assert overdue(store) == [("past", "me")]
    assert overdue(store) == []


def test_a_job_without_a_deadline_is_overdue_once_no_worker_may_begin_it(store: Store) -> None:
    now = store.client.time()[0]
    late, soon = repr(now - KEEP - 1.0), repr(now - KEEP + 60.0)
    store.forward(*(placed(job, deadline_at="0.0", placed=late) for job in ("waits", "runs")))
    store.forward(placed("not yet", deadline_at="0.0", placed=soon))
    [claim] = store.claim("a", "runs")
    store.start(("runs", claim.token, 1.0))
    assert overdue(store) == [("waits", "")]
    assert store.client.ttl(job_key("waits")) > 0


def test_a_held_job_is_overdue_too_unless_it_has_no_deadline(store: Store) -> None:
    store.forward(placed("patient", deadline_at="0.0", placed="0.0", holding="q", state="held", accepted="1.0"))
    assert store.client.zcard(DEADLINES) == 0
    store.forward(placed("j", deadline_at="1.5", holding="q", state="held", accepted="1.0"))
    assert overdue(store) == [("j", "")]


def test_jobs_that_ended_are_not_overdue_and_their_group_is_forgotten(store: Store) -> None:
    store.forward(*alike("run", "cancelled", deadline_at="1.5"))
    [claim] = store.claim("a", "run")
    store.finish(Ending("run", JobState.SUCCEEDED, b"answer", claim.token), cancelled("cancelled"))
    assert store.client.zcard(DEADLINES) == 1
    assert overdue(store) == []
    assert store.client.zcard(DEADLINES) == 0


def test_a_group_is_forgotten_once_all_of_it_ended_long_before_its_deadline(store: Store) -> None:
    later = f"{store.client.time()[0] + 3600}.5"
    store.forward(*alike("ended", "open", deadline_at=later))
    store.forward(placed("gone", deadline_at=later))
    store.finish(cancelled("ended"))
    store.client.delete(job_key("gone"))
    assert store.run(forget_ended_call("-inf", 10)) == [2, later.encode()]
    assert store.client.zcard(DEADLINES) == 1
    store.finish(cancelled("open"))
    assert store.run(forget_ended_call("-inf", 10))[0] == 1
    assert store.client.zcard(DEADLINES) == 0


def test_the_rest_of_a_group_comes_again_if_it_was_not_ended(store: Store) -> None:
    store.forward(*alike("ended", "left", deadline_at="1.5"))
    store.finish(cancelled("ended"))
    for _ in range(2):
        groups, [left], _ = overdue_answer(store.run(overdue_call(10, 0.0)))
        assert (groups, left.job) == (1, "left")
    store.finish(cancelled("left"))
    assert overdue(store) == []
    assert store.client.zcard(DEADLINES) == 0


def test_a_router_ends_what_is_overdue_also_while_it_runs(settings: Settings, store: Store) -> None:
    store.forward(placed("waits", deadline_at="1.5"), placed("runs", deadline_at="1.5"))
    [claim] = store.claim("a", "runs")
    assert asyncio.run(fire(settings)) == 1  # jobs that are alike are one group
    assert [store.record(job)["state"] for job in ("waits", "runs")] == ["expired", "expired"]
    assert store.finish(Ending("runs", JobState.SUCCEEDED, b"late", claim.token)) == [0]


@contextmanager
def listening(worker: WorkerStore, deliveries: list[Delivery]) -> Iterator[None]:
    held = HeldJobs(worker, NoQueue(), NoCelery())
    held.hold(deliveries)
    cancellations = Cancellations(worker, held, marked=lambda: None)
    with in_thread(cancellations.run, stop=cancellations.stop):
        yield


def delivery(job: str) -> Delivery:
    return Delivery(job, a_ticket(job), b"", "application/json", 0.0, hardware_class="cpu.batch")


def test_a_worker_is_notified_at_once_that_a_job_it_holds_was_ended(settings: Settings, store: Store) -> None:
    worker, held = WorkerStore(settings.broker, "a@host#1", Limits()), [delivery("ended"), delivery("wanted")]
    store.forward(placed("ended"), placed("wanted"))
    _, claims = worker.claim([("ended", 0.0), ("wanted", 0.0)])
    with listening(worker, held):
        eventually(lambda: store.client.pubsub_numsub("taxiway:cancelled:a@host#1")[0][1] == 1)
        store.finish(Ending("wanted", JobState.SUCCEEDED, b"answer", claims[1].token), cancelled("ended"))
        eventually(lambda: held[0].lost)
    assert not held[1].lost


def test_a_waiter_is_notified_at_the_deadline_by_either_interface_without_any_worker(settings: Settings) -> None:
    with router_process(settings) as router, redis.Redis.from_url(settings.broker) as state:
        with EchoDevice(settings, answering=False), Client(settings.broker) as broker, Client(router.http) as http:
            jobs = [client.submit("echo", "a", deadline=4) for _ in range(4) for client in (broker, http)]
            eventually(lambda: all(state.exists(job_key(job.id)) for job in jobs))
        with Client(settings.broker) as broker, httpx.Client(base_url=router.http, trust_env=False) as http:
            asked = http.get(f"/v2/jobs/{jobs[1].id}/result", params={"wait": 60}, timeout=90)
            with pytest.raises(
                DeadlineExceededError, match=r"^deadline of 4 s exceeded: queued \d+(\.\d+)? s on cpu\.batch$"
            ):
                broker.job(jobs[0].id).result(60)
        eventually(lambda: all(state.hexists(job_key(job.id), "finished") for job in jobs))
        records = [state.hmget(job_key(job.id), "deadline_at", "finished") for job in jobs]
    assert (asked.status_code, asked.json()["code"]) == (504, "deadline_exceeded")
    lateness = [float(finished) - float(due) for due, finished in records]
    assert 0 <= min(lateness) <= max(lateness) < BUSY
