"""A worker stays a Celery worker: its remote control, its events and its shutdowns, seen by real Celery clients."""

import signal
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tasks.settings import Settings
from taxiway.contract.keys import INFER, job_key, result_key
from taxiway.errors import ExecutionError
from tests.integration.celery.test_table import celery_process
from tests.producing import hearing, infer, payload
from tests.routing import eventually, router_process
from tests.stored import facts_of
from tests.waiting import until
from tests.working import CLASS, LASTING, LONG, Tower, WorkerProcess, inspect, is_running, release, worker_process


def running(tower: Tower, inputs: Mapping[str, Any] = LASTING) -> str:
    """A lasting job that runs."""
    job = tower.order("slab", inputs)
    eventually(lambda: is_running(tower, job))
    return job


def test_inspect_shows_what_runs_and_what_waits(
    fleet: Settings, worker: WorkerProcess, tower: Tower, producer: Celery
) -> None:
    busy = running(tower)
    waiting = tower.order("echo", "next")
    inspection = inspect(producer, worker)
    eventually(lambda: inspection.reserved()[worker.name])
    assert [task["id"] for task in inspection.active()[worker.name]] == [busy]
    assert [task["id"] for task in inspection.reserved()[worker.name]] == [waiting]
    assert inspection.query_task(busy)[worker.name][busy][0] == "active"
    assert INFER in inspection.registered()[worker.name]
    release(fleet)
    tower.result(busy)
    tower.result(waiting)
    eventually(lambda: not inspection.active()[worker.name] and not inspection.reserved()[worker.name])
    assert inspection.stats()[worker.name]["total"] == {INFER: 2}


def test_a_queue_that_is_cancelled_is_left_alone_until_it_is_added_again(
    worker: WorkerProcess, tower: Tower, producer: Celery
) -> None:
    inspection = inspect(producer, worker)
    producer.control.cancel_consumer(CLASS)
    eventually(lambda: not inspection.active_queues()[worker.name])
    job = tower.order("echo", "later")
    assert not until(lambda: bool(tower.state.exists(result_key(job))), timeout=0.5)
    eventually(lambda: tower.waiting() == 1)  # also if it was taken before the worker knew
    producer.control.add_consumer(CLASS)
    assert tower.result(job).outputs == {"payload": "later"}


@pytest.mark.usefixtures("worker")
def test_an_eta_is_kept_and_the_results_of_a_group_are_collected(tower: Tower, producer: Celery) -> None:
    later = datetime.now(UTC) + timedelta(seconds=1)
    sent = [
        producer.send_task(INFER, kwargs={"model": "echo", "inputs": n}, eta=later if n == 0 else None)
        for n in range(3)
    ]
    assert tower.route("echo") == 3
    assert [result.get(timeout=60)["outputs"]["payload"] for result in sent[1:]] == [1, 2]
    assert sent[0].get(timeout=60)["outputs"]["payload"] == 0
    assert datetime.now(UTC) >= later
    eventually(lambda: tower.unacknowledged() == 0)


def test_what_is_scheduled_returns_to_the_queue_at_a_warm_shutdown(
    fleet: Settings, tower: Tower, producer: Celery
) -> None:
    with worker_process(fleet) as worker:
        producer.send_task(INFER, kwargs={"model": "echo", "inputs": 1}, countdown=60)
        tower.route("echo")
        inspection = inspect(producer, worker)
        eventually(lambda: inspection.scheduled()[worker.name])
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0
    assert (tower.waiting(), tower.unacknowledged()) == (1, 0)


def test_a_shutdown_by_remote_control_finishes_what_is_here(fleet: Settings, tower: Tower, producer: Celery) -> None:
    with worker_process(fleet) as worker:
        busy = running(tower)
        waiting = [tower.order("echo", n) for n in range(3)]
        eventually(lambda: tower.unacknowledged() == 4)
        producer.control.shutdown([worker.name])
        eventually(lambda: facts_of(tower.state, worker.name).draining)
        release(fleet)
        assert worker.process.wait(60) == 0
    assert {tower.result(job, within=0.1).report.device for job in (busy, *waiting)} == {"cpu:0"}
    assert (tower.waiting(), tower.unacknowledged()) == (0, 0)


def test_a_cold_shutdown_leaves_in_the_queue_what_did_not_run(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as worker:
        jobs = [running(tower, LONG), tower.order("echo", "next")]
        eventually(lambda: tower.unacknowledged() == 2)
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(60)
    assert tower.unacknowledged() == 0
    assert tower.waiting() >= 1  # what ran may have ended before Celery's thread came to the signal
    with worker_process(fleet):
        assert all(tower.result(job) for job in jobs)


def test_what_a_killed_worker_held_runs_elsewhere_each_job_alone(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as first:
        busy = running(tower)
        waiting = [tower.order("paced", n) for n in range(5)]
        eventually(lambda: tower.unacknowledged() == 6)
        first.process.kill()
        first.process.wait()
    assert [tower.state.hget(job_key(job), "attempts") for job in (busy, *waiting)] == [b"1", *[None] * 5]
    release(fleet)
    with worker_process(fleet):
        results = [tower.result(job) for job in (busy, *waiting)]
    assert {result.report.batch for result in results} == {1}  # one of them may be why the worker ended


@pytest.mark.usefixtures("worker")
def test_no_more_is_held_than_the_next_batches_need(fleet: Settings, tower: Tower) -> None:
    tower.result(tower.order("paced", 0))  # what waits for a load takes no room from others
    busy = running(tower)
    tower.queue(*(tower.message("paced", n) for n in range(100)))
    eventually(lambda: tower.unacknowledged() == 1 + 2 * 16)
    assert tower.waiting() == 100 - 2 * 16
    release(fleet)
    tower.result(busy)


@pytest.mark.usefixtures("worker")
def test_task_events_report_every_job_in_order(tower: Tower, producer: Celery) -> None:
    received: list[dict[str, Any]] = []
    with hearing(producer, received.append):
        eventually(lambda: received)  # a heartbeat
        long, short = running(tower, LONG), tower.order("echo", "hello")
        bad = tower.order("slab", {"samples": [0], "seed": [1]})
        with pytest.raises(ExecutionError):
            tower.result(bad)
        expired = tower.order("echo", "late", deadline_at=1.0)
        unwanted = tower.message("echo", "unwanted")
        tower.cancel(cancelled := unwanted.headers["id"])
        tower.queue(unwanted)

        def streamed(job: str) -> list[str]:
            return [event["type"].removeprefix("task-") for event in list(received) if event.get("uuid") == job]

        eventually(lambda: streamed(short)[-1:] == ["succeeded"] and streamed(bad)[-1:] == ["failed"])
        eventually(lambda: streamed(expired)[-1:] == ["failed"] and streamed(cancelled)[-1:] == ["revoked"])
    assert streamed(long) == streamed(short) == ["received", "started", "succeeded"]
    assert streamed(bad) == ["received", "started", "failed"]
    last = {event["uuid"]: event for event in received if event["type"] in ("task-failed", "task-revoked")}
    assert last[expired]["exception"].startswith("DeadlineExceededError(")
    assert (last[cancelled]["expired"], last[cancelled]["terminated"]) == (False, False)
    assert last[cancelled]["exception"].startswith("JobCancelledError(")
    first = next(event for event in received if event.get("uuid") == short)
    assert (first["name"], first["hostname"].split("@")[0]) == (INFER, f"{CLASS}.cpu-0")


def test_task_signals_are_sent_for_jobs_with_a_link_and_no_others(
    fleet: Settings, producer: Celery, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    source = f"""
        from celery.signals import task_prerun
        from workers.app import app

        @task_prerun.connect
        def note(task_id, **_):
            with open({str(seen)!r}, "a") as file:
                print(task_id, file=file)
    """
    variables = fleet.environment() | {"TAXIWAY_CLASS": CLASS}
    with celery_process(tmp_path, "watched", source, "worker", "-n", "watched@%h", **variables), router_process(fleet):
        eventually(producer.control.inspect().ping, within=120)
        linked = infer(producer, 1).apply_async(link=producer.signature("lab.next", queue="lab.linked"))
        plain = infer(producer, 2).apply_async()
        assert [payload(linked), payload(plain)] == [1, 2]
        eventually(lambda: linked.id in seen.read_text())
    assert plain.id not in seen.read_text()
