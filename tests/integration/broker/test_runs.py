"""What workers write of a run, and how its holder is asked to yield it, on a real Valkey server."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from broker.valkey import Call
from broker.valkey.jobs import Ending, Relocation, Verdict, YieldAnswer, YieldAsk, YieldRequest, yield_call
from broker.valkey.worker_store import MOST_REPORTS, JobNotice, RunUpdate, WorkerStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.job import JobState, RunProgress, read_meta, result_in
from taxiway.contract.keys import UNACKED, WORK, blob_key, job_key, priority_list, result_key, stream_key, work_cell
from taxiway.contract.stream import MOST_PIECES, Lost, Piece, Progress, read_piece
from tests.narrowing import as_bytes
from tests.scripting import CELL, KEEP, Store, placed

HALF = RunProgress(fraction=0.5, message="half", partial=[1.5], left=3.0)


@pytest.fixture
def worker(settings: Settings, store: Store) -> WorkerStore:
    """A worker that holds and runs the job `j`, and listens."""
    worker = WorkerStore(settings.broker, "w", Limits())
    assert worker.notices(0.05) == []
    store.forward(placed("j"))
    store.claim("w", "j")
    store.start(("j", "w#1", 1.0))
    return worker


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
        store.start(("j", claim.token, 1.0))
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


ASK = YieldAsk("j", "w#1", "live chats wait")
REQUEST = YieldRequest(5.0, "live chats wait")


def ask(store: Store, *asks: YieldAsk) -> list[int]:
    return [YieldAnswer(one) for one in store.run(yield_call(5.0, asks))]


def test_the_holder_of_a_job_is_asked_once(store: Store, worker: WorkerStore) -> None:
    over, unknown = YieldAsk("j", "w#2", ""), YieldAsk("other", "w#1", "")
    assert ask(store, over, unknown, ASK, ASK) == [*[YieldAnswer.NOT_HELD] * 2, YieldAnswer.ASKED, YieldAnswer.NOT_HELD]
    heard = next(one for _ in range(20) for one in worker.notices(0.5))  # its subscription is confirmed first
    assert heard == JobNotice("j", "w#1", REQUEST)


def test_a_holder_that_did_not_hear_is_told_when_it_renews_its_claim(store: Store, worker: WorkerStore) -> None:
    assert worker.renew([("j", "w#1"), ("j", "v#1")]) == [True, False]
    ask(store, ASK)
    (stated,) = worker.renew([("j", "w#1")])
    assert isinstance(stated, YieldRequest)
    assert (stated.reason, 0 < stated.seconds <= 5) == (REQUEST.reason, True)


def test_no_job_yields_to_one_that_a_worker_took_meanwhile(store: Store, worker: WorkerStore) -> None:
    store.forward(placed("live"))
    for_live = YieldAsk("j", "w#1", "live chats wait", waiting="live")
    store.claim("v", "live")
    assert ask(store, for_live) == [YieldAnswer.NOT_WAITING]
    store.release(("live", "v#1"))
    assert ask(store, for_live) == [YieldAnswer.ASKED]


def test_a_job_yields_to_one_that_waits_at_its_worker_until_that_begins(store: Store, worker: WorkerStore) -> None:
    store.forward(placed("live"))
    store.claim("w", "live")
    for_live = YieldAsk("j", "w#1", "", waiting="live", held="w#1")
    assert ask(store, replace(for_live, held="v#1")) == [YieldAnswer.NOT_WAITING]
    assert ask(store, for_live) == [YieldAnswer.ASKED]
    store.start(("live", "w#1", 1.0))
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


def test_a_stream_is_bounded_and_a_slow_reader_learns_what_it_lost(settings: Settings, store: Store) -> None:
    worker, progress = WorkerStore(settings.broker, "worker", Limits()), Progress()
    for n in range(2 * MOST_PIECES):
        worker.append([("job", Piece(1, 2 * n, "ab"))])
    entries: Any = store.client.xrange(stream_key("job"))
    pieces = [piece for _, fields in entries if isinstance(piece := read_piece(fields), Piece)]
    assert MOST_PIECES <= len(pieces) < MOST_PIECES + 200
    lost, *rest = [event for n, piece in enumerate(pieces) for event in progress.take(f"{n}-0", piece)]
    assert lost == Lost(pieces[0].at)
    assert rest == ["ab"] * len(pieces)
