"""Asking a running job's holder to yield it, on a real Valkey server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from broker.valkey import Call
from broker.valkey.claims import (
    Relocation,
    YieldAnswer,
    YieldAsk,
    YieldRequest,
    release_call,
    start_call,
    yield_call,
)
from broker.valkey.worker_store import JobNotice, WorkerStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.keys import UNACKED, WORK, priority_list, work_cell
from tests.narrowing import as_bytes
from tests.scripting import CELL, Store, placed

ASK = YieldAsk("j", "w#1", "live chats wait")
REQUEST = YieldRequest(5.0, "live chats wait")


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with redis.Redis.from_url(settings.broker) as client:
        yield Store(client)


@pytest.fixture
def worker(settings: Settings, store: Store) -> WorkerStore:
    """A worker that holds and runs the job `j`, and listens."""
    worker = WorkerStore(settings.broker, "w", Limits())
    assert worker.notices(0.05) == []
    store.forward(placed("j"))
    store.claim("w", "j")
    store.run(start_call("cpu:0", [("j", "w#1", 1.0)]))
    return worker


def ask(store: Store, *asks: YieldAsk) -> list[int]:
    return [YieldAnswer(one) for one in store.run(yield_call(5.0, asks))]


def listened(worker: WorkerStore) -> JobNotice:
    """What the worker hears next; its subscription is confirmed first."""
    return next(one for _ in range(20) for one in worker.notices(0.5))


def test_the_holder_of_a_job_is_asked_once(store: Store, worker: WorkerStore) -> None:
    assert ask(store, ASK, ASK) == [YieldAnswer.ASKED, YieldAnswer.NOT_HELD]
    assert listened(worker) == JobNotice("j", "w#1", REQUEST)


def test_a_holder_that_did_not_hear_is_told_when_it_renews_its_claim(store: Store, worker: WorkerStore) -> None:
    assert worker.renew([("j", "w#1"), ("j", "v#1")]) == [True, False]
    ask(store, ASK)
    (told,) = worker.renew([("j", "w#1")])
    assert isinstance(told, YieldRequest)
    assert (told.reason, 0 < told.seconds <= 5) == (REQUEST.reason, True)


def test_a_claim_that_is_over_is_not_asked(store: Store, worker: WorkerStore) -> None:
    assert ask(store, YieldAsk("j", "w#2", ""), YieldAsk("other", "w#1", "")) == [YieldAnswer.NOT_HELD] * 2


def test_no_job_yields_to_one_that_a_worker_took_meanwhile(store: Store, worker: WorkerStore) -> None:
    store.forward(placed("live"))
    for_live = YieldAsk("j", "w#1", "live chats wait", waiting="live")
    store.claim("v", "live")
    assert ask(store, for_live) == [YieldAnswer.NOT_WAITING]
    store.run(release_call([("live", "v#1")]))
    assert ask(store, for_live) == [YieldAnswer.ASKED]


def test_a_job_yields_to_one_that_waits_at_its_worker_until_that_begins(store: Store, worker: WorkerStore) -> None:
    store.forward(placed("live"))
    store.claim("w", "live")
    for_live = YieldAsk("j", "w#1", "", waiting="live", held="w#1")
    assert ask(store, replace(for_live, held="v#1")) == [YieldAnswer.NOT_WAITING]
    assert ask(store, for_live) == [YieldAnswer.ASKED]
    store.run(start_call("cpu:0", [("live", "w#1", 1.0)]))
    assert ask(store, for_live) == [YieldAnswer.NOT_WAITING]


def test_a_job_that_yielded_waits_again_without_an_attempt_and_is_asked_anew_in_its_next_run(
    store: Store, worker: WorkerStore
) -> None:
    ask(store, ASK)
    worker.release([("j", "w#1")])
    record = store.record("j")
    assert (record["state"], record["attempts"], record["yields"], "yield" in record) == ("queued", "0", "1", False)
    assert record["yielded"] == ASK.reason
    [claim] = store.claim("v", "j")
    assert (claim.token, claim.attempts) == ("v#2", 0)
    assert ask(store, ASK, YieldAsk("j", "v#2", "")) == [YieldAnswer.NOT_HELD, YieldAnswer.ASKED]


def test_a_job_that_moves_returns_to_the_other_queue_and_its_work_counts_there(
    store: Store, worker: WorkerStore
) -> None:
    taken = b'[{"body": "old", "properties": {"priority": 9}}, "cpu.batch", "cpu.batch"]'
    store.client.hset(UNACKED[0], "t.2.0", taken)
    moved = b'{"body": "new", "properties": {"priority": 9}}'
    cell = work_cell("gpu", 3)
    to = Relocation("t.2.0", "gpu", moved, {"hardware_class": "gpu", "cell": cell, "work": "0.5"})
    gone = replace(to, tag="t.4.0")
    assert ask(store, replace(ASK, to=gone), replace(ASK, to=to)) == [YieldAnswer.NOT_HELD, YieldAnswer.ASKED]
    worker.release([("j", "w#1")])
    store.run(Call("queues/put_back", UNACKED, ["t.2.0"]))
    assert store.client.lrange(priority_list("gpu", 3), 0, -1) == [moved]
    assert store.record("j")["hardware_class"] == "gpu"
    assert store.client.hget(WORK, cell) == b"0.5"
    assert float(as_bytes(store.client.hget(WORK, CELL))) == 0


def test_a_request_ends_with_the_claim_of_a_worker_that_was_lost(store: Store, worker: WorkerStore) -> None:
    ask(store, ASK)
    worker.let_lapse([("j", "w#1")])
    store.claim("v", "j")
    assert "yield" not in store.record("j")
