"""Workers that leave: by a signal or a file, killed, or with a batch that hangs. No job is lost with them."""

import time
from pathlib import Path

import pytest
import redis

from broker.valkey.class_queue import ClassQueue
from broker.valkey.jobs import read_history
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.keys import DEVICES, UNACKED, job_key, priority_list, result_key
from taxiway.contract.wire import Envelope
from tests.narrowing import as_bytes
from tests.routing import eventually
from tests.scripting import is_held
from tests.stored import facts_of, fields_of
from tests.waiting import BUSY
from tests.working import (
    CLASS,
    LASTING,
    QUEUES,
    SLAB,
    Tower,
    add_callable,
    add_spinner,
    is_running,
    release,
    worker_process,
    worker_settings,
)
from workers.drain import SIGNAL
from workers.heartbeat import HUNG

pytestmark = pytest.mark.slow

LEASE = 1.0  # as QUEUES has it
ENDLESS = {"samples": [10**12], "seed": [1]}


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    """The small fleet with the model ages, which by its profile takes that."""
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("warm: [echo, slab]", "warm: [echo, slab, ages]"))
    ages = SLAB.replace("name: slab", "name: ages").replace("base: 0.0002", "base: 1000")
    add_callable(fleet.models, "ages", ages, code="slab")
    return fleet


def job_of(message: Envelope) -> str:
    return str(message.headers["id"])


def is_with(tower: Tower, job: str, worker: str) -> bool:
    """Whether the worker has the job, or anybody has answered it."""
    holder = as_bytes(tower.state.hget(job_key(job), "holder") or b"")
    return holder.startswith(worker.encode()) or bool(tower.state.exists(result_key(job)))


def test_a_worker_with_a_notice_runs_what_ends_in_time_and_gives_the_rest_back(fleet: Settings, tower: Tower) -> None:
    running, *short = messages = [tower.message("slab", LASTING), *(tower.message("echo", n) for n in range(5))]
    ages = tower.message("ages", {"samples": [10], "seed": [1]}, variant="python")
    tower.queue(*messages, ages)
    with worker_process(fleet) as first:
        eventually(lambda: is_running(tower, job_of(running)))
        first.process.send_signal(SIGNAL)
        eventually(lambda: facts_of(tower.state, first.name).draining)
        release(fleet)
        eventually(lambda: not is_held(tower.state, job_of(ages)))  # once the batch has ended
        assert first.process.wait(60) == 0
    assert tower.state.hexists(DEVICES, first.name) == 0
    answers = [tower.result(job_of(message), within=0.1) for message in (running, *short)]
    assert {answer.report.device for answer in answers} == {"cpu:0"}
    with worker_process(fleet, "--device", "cpu:1"):
        assert tower.result(job_of(ages)).report.batch == 1
    assert {tower.state.hget(job_key(job_of(message)), "attempts") for message in (*messages, ages)} == {b"1"}


def test_what_a_killed_worker_held_runs_elsewhere_soon_after_its_lease(fleet: Settings, tower: Tower) -> None:
    messages = [tower.message("slab", LASTING), *(tower.message("echo", n) for n in range(20))]
    tower.queue(*messages)
    with worker_process(fleet) as first:
        eventually(lambda: is_running(tower, job_of(messages[0])))
        first.process.kill()
        over = time.monotonic() + LEASE
    release(fleet)
    with worker_process(fleet, "--device", "cpu:1") as second:
        over = max(over, time.monotonic())
        eventually(lambda: all(is_with(tower, job_of(message), second.name) for message in messages))
        assert time.monotonic() - over < 2 + BUSY
        assert {tower.result(job_of(message)).report.device for message in messages} == {"cpu:1"}
    assert tower.state.hget(job_key(job_of(messages[0])), "attempts") == b"2"


def test_what_a_silent_worker_held_returns_to_the_front_in_its_order(settings: Settings, tmp_path: Path) -> None:
    fleet = worker_settings(settings, tmp_path)
    with Tower(fleet) as tower, redis.Redis.from_url(fleet.broker) as client:
        messages = [tower.message("echo", n) for n in range(30)]
        for message in messages:
            tower.queue(message)
        before = client.lrange(priority_list(CLASS, 1), 0, -1)
        queue = ClassQueue(fleet.broker, "silent", Limits(lease=300.0))
        for _ in range(12):
            queue.take(CLASS, 1)
        queue.take(CLASS, 3)
        assert queue.recover() == 0
        client.zadd(UNACKED[1], dict.fromkeys(client.zrange(UNACKED[1], 0, -1), 0))
        assert queue.recover() == 15
        assert client.lrange(priority_list(CLASS, 1), 0, -1) == before
        assert tower.unacknowledged() == 0
        queue.wake()
        queue._bell.close()


def test_a_worker_whose_batch_hangs_ends_itself_and_other_jobs_are_answered_elsewhere(
    fleet: Settings, tower: Tower
) -> None:
    fleet.queues.write_text(QUEUES.replace("lease: 1", "lease: 1, stall: 3"))
    add_spinner(fleet)
    with worker_process(fleet) as first:
        hanging = tower.message("spinner", {"turns": [10**15]})
        mates = [tower.message("spinner", {"turns": [n]}) for n in range(3)]
        tower.queue(hanging, *mates)
        assert first.process.wait(60) == HUNG
    tower.cancel(job_of(hanging))
    with worker_process(fleet, "--device", "cpu:1"):
        reports = [tower.result(job_of(mate)).report for mate in mates]
    assert {(report.device, report.batch) for report in reports} == {("cpu:1", 1)}  # each alone: any may be why
    for mate in mates:
        history = read_history(fields_of(tower.state, job_key(job_of(mate)))["history"])
        assert [holder.worker for holder in history] == [first.name]
