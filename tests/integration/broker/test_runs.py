"""What workers write of a run, on a real Valkey server: under the claim's token, and no longer than the job lasts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from broker.valkey.claims import Verdict, start_call
from broker.valkey.endings import Ending
from broker.valkey.runs import MOST_REPORTS, RunUpdate
from broker.valkey.worker_store import WorkerStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.job import JobState, read_meta
from taxiway.contract.keys import blob_key, job_key, result_key, stream_key
from taxiway.contract.progress import RunProgress, result_in
from taxiway.contract.stream import read_piece
from tests.narrowing import as_bytes
from tests.scripting import KEEP, Store, placed

HALF = RunProgress(fraction=0.5, message="half", partial=[1.5], left=3.0)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with redis.Redis.from_url(settings.broker) as client:
        yield Store(client)


@pytest.fixture
def worker(settings: Settings, store: Store) -> WorkerStore:
    """A worker that holds and runs the job `j`."""
    store.forward(placed("j"))
    store.claim("w", "j")
    store.run(start_call("cpu:0", [("j", "w#1", 1.0)]))
    return WorkerStore(settings.broker, "w", Limits())


def update(token: str = "w#1", *, progress: RunProgress | None = HALF, celery: bool = True) -> RunUpdate:
    return RunUpdate(token, 12.5, progress, celery)


def keep(worker: WorkerStore, number: int, token: str = "w#1") -> bool:
    facts = msgspec.json.encode({"key": blob_key(f"c{number}")})
    return worker.keep_checkpoint("j", token, blob_key(f"c{number}"), b"state", facts, 20.0 + number)


def kept(store: Store) -> list[int]:
    return [number for number in range(9) if store.client.exists(blob_key(f"c{number}"))]


def test_a_report_is_on_the_record_in_the_stream_and_in_celery_s_backend(store: Store, worker: WorkerStore) -> None:
    worker.append([("j", update())])
    record = store.record("j")
    assert (record["ran"], msgspec.json.decode(record["progress"], type=RunProgress)) == ("12.5", HALF)
    entries: Any = store.client.xrange(stream_key("j"))
    ((_, fields),) = entries
    assert read_piece(fields) == HALF
    meta = as_bytes(store.client.get(result_key("j")))
    assert (read_meta(meta).status, result_in(meta)) == ("PROGRESS", None)


def test_a_report_of_a_claim_that_is_over_or_for_no_celery_producer_writes_no_state(
    store: Store, worker: WorkerStore
) -> None:
    worker.append([("j", update("v#1"))])
    assert "progress" not in store.record("j")
    worker.append([("j", update(celery=False)), ("j", update(progress=None))])
    assert store.client.get(result_key("j")) is None
    assert store.client.xlen(stream_key("j")) == 1


def test_the_result_replaces_celery_s_state_and_a_late_report_does_not_replace_the_result(
    store: Store, worker: WorkerStore
) -> None:
    worker.append([("j", update())])
    assert worker.finish([Ending("j", JobState.SUCCEEDED, b"answer", "w#1")]) == [True]
    worker.append([("j", update())])
    assert store.client.get(result_key("j")) == b"answer"
    assert worker.finish([Ending("j", JobState.CANCELLED, b"late", "")]) == [False]
    assert store.client.get(result_key("j")) == b"answer"


def test_a_stream_keeps_few_reports(store: Store, worker: WorkerStore) -> None:
    long = RunProgress(fraction=0.5, message="x" * 2000)
    for _ in range(20 * MOST_REPORTS):
        worker.append([("j", update(progress=long))])
    assert store.client.xlen(stream_key("j")) < 3 * MOST_REPORTS


def test_the_last_two_checkpoints_are_kept_until_the_job_ends(store: Store, worker: WorkerStore) -> None:
    for number in (1, 2, 3, 3):
        assert keep(worker, number)
    assert kept(store) == [2, 3]
    earlier = worker.earlier_runs("j")
    assert earlier.ran == 23.0
    assert [msgspec.json.decode(facts)["key"] for facts in earlier.checkpoints] == [blob_key("c3"), blob_key("c2")]
    assert 0 < store.client.ttl(blob_key("c3")) <= store.client.ttl(job_key("j")) <= KEEP
    worker.finish([Ending("j", JobState.SUCCEEDED, b"answer", "w#1")])
    assert kept(store) == []


def test_a_checkpoint_of_a_claim_that_is_over_is_deleted_and_the_others_stay(store: Store, worker: WorkerStore) -> None:
    keep(worker, 1)
    worker.let_lapse([("j", "w#1")])
    store.claim("v", "j")
    assert not keep(worker, 2)
    assert kept(store) == [1]
    assert keep(worker, 3, "v#2")
    assert kept(store) == [1, 3]


def test_a_job_that_gets_on_is_never_given_up_however_many_workers_it_outlives(
    store: Store, worker: WorkerStore
) -> None:
    for number in range(2, 9):
        worker.let_lapse([("j", f"w#{number - 1}")])
        [claim] = store.claim("w", "j")
        assert claim.attempts == 1 and claim.blamed == 1
        store.run(start_call("cpu:0", [("j", claim.token, 1.0)]))
        keep(worker, number, claim.token)


def test_a_job_without_a_router_s_record_that_reported_is_not_taken_for_one_that_ended(
    store: Store, settings: Settings
) -> None:
    store.claim("w", "unrecorded")
    worker = WorkerStore(settings.broker, "w", Limits())
    worker.append([("unrecorded", update())])
    worker.release([("unrecorded", "w#1")])
    [claim] = store.claim("v", "unrecorded")
    assert claim.verdict is Verdict.RUN
