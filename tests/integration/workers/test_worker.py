"""A real worker process on a real Valkey, behind the smallest router that can sign."""

import time
from contextlib import suppress

import msgspec
import pytest
from celery import Celery, signature

from broker.port import DeadLetter
from tasks.heartbeat import empty, held_of
from tasks.settings import Settings
from tasks.ticket import Promise
from taxiway.contract.job import JobState, failure_meta, read_meta
from taxiway.contract.keys import DEAD, job_key, result_key
from taxiway.contract.wire import CLAIMABLE
from taxiway.errors import DeadlineExceededError, ExecutionError, JobCancelledError, TaxiwayError
from tests.routing import eventually
from tests.stored import facts_of, record_of
from tests.working import CLASS, LASTING, LONG, Site, Tower, WorkerProcess, inspect, is_running, release


@pytest.fixture
def fleet(site: Site) -> Settings:
    return site.fleet


@pytest.fixture(autouse=True)
def tower(site: Site) -> Tower:
    return site.tower


@pytest.fixture
def worker(site: Site) -> WorkerProcess:
    return site.worker


def state_of_job(tower: Tower, job: str) -> JobState:
    return record_of(tower.state, job).state


def test_a_job_is_answered_with_where_it_ran(tower: Tower) -> None:
    job = tower.order("echo", "hello")
    result = tower.result(job)
    assert result.outputs == {"payload": "hello"}
    assert (result.model, result.report.hardware_class, result.report.variant) == ("echo:1", CLASS, "echo")
    assert (result.report.device, result.report.emulated, result.report.batch) == ("cpu:0", False, 1)
    assert result.report.queue_wait >= 0 and result.report.cost > 0
    assert result.report.reason == "the test says so"
    assert state_of_job(tower, job) is JobState.SUCCEEDED


def test_jobs_that_wait_together_run_together(site: Site, tower: Tower) -> None:
    tower.result(tower.order("paced", "loaded"))
    busy = tower.order("slab", LASTING)
    eventually(lambda: is_running(tower, busy))
    messages = [tower.message("paced", f"row {n}") for n in range(32)]
    tower.queue(*messages)
    eventually(lambda: tower.unacknowledged() == 1 + len(messages))
    release(site.fleet)
    batches = [tower.result(m.headers["id"]).report.batch for m in messages]
    assert max(batches) == 16
    assert sum(batch == 16 for batch in batches) >= 16


def test_rows_of_one_request_run_in_several_batches_and_come_back_in_order(tower: Tower) -> None:
    rows = [f"row {n}" for n in range(40)]
    result = tower.result(tower.order("paced", rows))
    assert result.outputs["payload"] == rows
    assert result.report.batch == 16


def test_a_worker_takes_few_jobs_of_many_rows_so_that_others_may_pass_or_move_them(tower: Tower) -> None:
    for _ in range(5):
        tower.result(tower.order("paced", ["x"] * 96))
    jobs = [tower.order("paced", ["x"] * 96) for _ in range(40)]  # of six batches each
    eventually(lambda: tower.waiting() < 40)
    assert tower.unacknowledged() <= 3
    tower.result(jobs[-1])


def test_a_request_with_one_failing_row_fails_and_names_the_row(tower: Tower) -> None:
    job = tower.order("slab", {"samples": [1000, 0, 1000], "seed": [1, 2, 3]})
    with pytest.raises(ExecutionError, match=r"row 1: .*division by zero") as raised:
        tower.result(job)
    assert raised.value.details["row"] == 1


def test_how_its_jobs_kept_what_was_promised_is_counted_and_widens_what_is_promised_next(
    tower: Tower, worker: WorkerProcess
) -> None:
    def promised(at_most: float) -> Promise:
        return Promise(CLASS, time.time(), 0.1, at_most)

    before = facts_of(tower.state, worker.name)
    was = held_of(before.done[CLASS].latency.get("bound", empty())) if CLASS in before.done else (0, 0)
    for at_most in (60.0, 1e-6):
        tower.result(tower.order("echo", "a promise", promise=promised(at_most)))
    over = time.time() - 1
    with pytest.raises(DeadlineExceededError):
        tower.result(tower.order("echo", "late", deadline_at=over, promise=Promise(CLASS, over - 20, 0.1, 1.0)))

    def counted() -> bool:
        facts = facts_of(tower.state, worker.name)
        figures = facts.done[CLASS].latency.get("bound", empty()) if CLASS in facts.done else empty()
        return held_of(figures) == (was[0] + 1, was[1] + 3)

    eventually(counted)
    assert (facts_of(tower.state, worker.name).residual_of("echo:1/echo", 1) or 0) > 150, "it took 200 times as long"


def test_a_job_that_was_cancelled_while_it_waited_is_dropped(tower: Tower) -> None:
    message = tower.message("echo", "no more")
    job = message.headers["id"]
    tower.state.set(result_key(job), failure_meta(job, JobCancelledError("cancelled")))
    tower.queue(message)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    with pytest.raises(JobCancelledError):
        tower.result(job)


def test_what_a_job_that_was_cancelled_while_it_ran_would_have_answered_is_dropped(tower: Tower) -> None:
    job = tower.order("slab", LASTING)
    eventually(lambda: is_running(tower, job))
    tower.cancel(job)
    eventually(lambda: tower.unacknowledged() == 0)
    assert state_of_job(tower, job) is JobState.CANCELLED
    with pytest.raises(JobCancelledError):
        tower.result(job)


def test_copies_of_one_message_run_once(tower: Tower) -> None:
    message = tower.message("slab", LONG)
    job = message.headers["id"]
    tower.queue(message, message, message)
    tower.result(job)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    assert tower.state.hget(job_key(job), "attempts") == b"1"


def test_a_message_is_claimed_for_the_job_of_its_ticket_alone(tower: Tower) -> None:
    message = tower.message("echo", "its own")
    message.properties[CLAIMABLE] = {"job": "another", "deadline_at": 0.0}
    tower.queue(message)
    assert tower.result(message.headers["id"]).outputs["payload"] == "its own"
    assert tower.state.hget(job_key("another"), "holder") == b""
    assert tower.state.exists(result_key("another")) == 0


def test_a_ticket_for_another_class_is_parked(tower: Tower) -> None:
    tower.order("echo", "elsewhere", variants={"gpu.realtime": "echo"})
    letter = eventually(lambda: tower.state.lindex(DEAD, 0))
    assert f"expected a ticket for {CLASS}" in msgspec.json.decode(letter, type=DeadLetter).reason


@pytest.mark.parametrize("task", ["celery.map", "os.system"])
def test_another_task_is_never_run_and_ends_no_job(tower: Tower, task: str) -> None:
    message = tower.message("echo", "hello")
    message.headers["task"] = task
    tower.state.hset(job_key(message.headers["id"]), "state", JobState.QUEUED)  # the job that the message names
    tower.queue(message)
    eventually(lambda: tower.state.llen(DEAD) == 1)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    assert tower.state.get(result_key(message.headers["id"])) is None


@pytest.mark.parametrize("followed", [False, True])  # what a link follows comes by Celery's own consumer
def test_a_job_revoked_by_celery_is_not_run(site: Site, tower: Tower, producer: Celery, followed: bool) -> None:
    busy = tower.order("slab", LASTING)
    eventually(lambda: is_running(tower, busy))
    link = [signature("lab.next", queue="lab.link", app=producer)] if followed else None
    message = tower.message("slab", LONG, canvas={"callbacks": link})
    message.headers["ignore_result"] = followed
    tower.queue(message)
    job = str(message.headers["id"])
    eventually(lambda: tower.unacknowledged() == 2)
    producer.control.revoke(job)
    eventually(lambda: job in inspect(producer, site.worker).revoked()[site.worker.name])
    release(site.fleet)
    with pytest.raises(JobCancelledError):
        tower.result(job)
    assert state_of_job(tower, job) is JobState.CANCELLED
    assert read_meta(tower.await_meta(job)).status == "REVOKED"


def test_a_worker_reports_its_device_and_its_warm_variants(worker: WorkerProcess, tower: Tower) -> None:
    facts = facts_of(tower.state, worker.name)
    assert (facts.hardware_class, facts.device, facts.kind, facts.emulated) == (CLASS, "cpu:0", "cpu", False)
    assert {"echo:1/echo", "slab:1/python"} <= set(facts.warm)
    assert facts.memory_total > facts.memory_free > 0
    assert {"echo", "python"} <= set(facts.runtimes)


def test_a_variant_that_cannot_load_fails_its_jobs_and_not_the_worker(worker: WorkerProcess, tower: Tower) -> None:
    job = tower.order("slab", {"samples": [10], "seed": [1]}, variant="missing")
    with pytest.raises(ExecutionError, match=r"slab:1/missing is unavailable on this device: .*no callable 'nowhere'"):
        tower.result(job)

    def unavailable() -> bool:
        facts = facts_of(tower.state, worker.name)
        return "slab:1/missing" in facts.unavailable

    eventually(unavailable)
    assert tower.result(tower.order("echo", "still here")).outputs == {"payload": "still here"}


def test_a_device_is_shown_as_used_while_a_long_batch_still_runs(worker: WorkerProcess, tower: Tower) -> None:
    tower.order("slab", LASTING)
    eventually(lambda: facts_of(tower.state, worker.name).utilisation > 0.9)


def test_no_number_of_a_request_ends_its_worker(tower: Tower) -> None:
    jobs = [
        tower.order(model, inputs, level=3, parameters=parameters)
        for n in (10**400, -(10**400), 2**70, 1e308)
        for model, inputs, parameters in (
            ("echo", {"payload": n}, {}),
            ("echo", n, {"n": n}),
            ("paced", {"payload": n, "units": n}, {}),
            ("slab", {"samples": [n], "seed": [n]}, {}),
            ("slab", [{"name": "samples", "shape": [n], "datatype": "INT64", "data": [n]}], {}),
        )
    ]
    for job in jobs:
        with suppress(TaxiwayError):
            tower.result(job)
    assert tower.result(tower.order("echo", "after")).outputs == {"payload": "after"}
