"""A job that comes alone to an idle worker runs on the thread that fetched it. What holds for any other holds for it.

The model spinner is short by its profile, and each job here takes far longer.
"""

import signal
import time
from pathlib import Path

import pytest
import redis

from tasks.settings import Settings
from taxiway.contract.keys import job_key
from tests.routing import eventually
from tests.scripting import is_held
from tests.stored import facts_of
from tests.working import QUEUES, Tower, add_spinner, is_running, worker_process, worker_settings
from workers.heartbeat import HUNG
from workers.stages.device import ALONE_AT_MOST

LEASE = 1.0  # as QUEUES has it
ENDLESS = {"turns": [10**15]}


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("warm: [echo, slab]", "warm: [echo, spinner]"))
    add_spinner(fleet, base=ALONE_AT_MOST / 4)
    return fleet


def spin(tower: Tower, inputs: object) -> str:
    """A job of the spinner that runs now."""
    job = tower.order("spinner", inputs, variant="onnx")
    eventually(lambda: is_held(tower.state, job))
    return job


def lasting(tower: Tower) -> str:
    """A job of some two seconds, by what a short one took."""
    turns = 100_000
    took = tower.result(tower.order("spinner", {"turns": [turns]}, variant="onnx"), within=120).report.run_time
    return spin(tower, {"turns": [round(turns * 4 * LEASE / took)]})


def commands(state: redis.Redis) -> dict[str, int]:
    return {name.removeprefix("cmdstat_"): stated["calls"] for name, stated in state.info("commandstats").items()}


def test_jobs_one_after_another_take_a_packet_to_wait_and_a_call_to_end(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet):
        for n in range(5):
            assert tower.result(tower.order("echo", n)).outputs == {"payload": n}
        before, began = commands(tower.state), time.monotonic()
        for n in range(20):
            assert tower.result(tower.order("echo", n)).outputs == {"payload": n}
        after, seconds = commands(tower.state), time.monotonic() - began
    scripts = after["evalsha"] - before["evalsha"]
    assert 40 <= scripts < 50 + 5 * seconds  # a second's heartbeat has some; 60 with a take that finds nothing
    assert after["client|reply"] - before.get("client|reply", 0) >= 15


def test_it_keeps_its_lease_and_runs_once(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet), worker_process(fleet, "--device", "cpu:1"):
        job = lasting(tower)
        assert tower.result(job, within=120).report.run_time > LEASE
    assert tower.state.hget(job_key(job), "attempts") == b"1"


def test_a_worker_that_is_stopped_twice_returns_it(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as first:
        job = spin(tower, ENDLESS)
        first.process.send_signal(signal.SIGTERM)
        eventually(lambda: facts_of(tower.state, first.name).draining)
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
    assert (tower.waiting(), tower.unacknowledged()) == (1, 0)
    assert not is_held(tower.state, job)


def test_a_worker_with_one_that_hangs_ends_itself_and_shows_it_as_running(fleet: Settings, tower: Tower) -> None:
    fleet.queues.write_text(fleet.queues.read_text().replace("lease: 1", "lease: 1, stall: 3"))
    with worker_process(fleet) as first:
        job = spin(tower, ENDLESS)
        eventually(lambda: is_running(tower, job))
        assert first.process.wait(60) == HUNG
    tower.cancel(job)


def test_what_comes_meanwhile_is_left_to_an_idle_worker(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet), worker_process(fleet, "--device", "cpu:1"):
        job = spin(tower, ENDLESS)
        for n in range(5):
            assert tower.result(tower.order("echo", n)).outputs == {"payload": n}
        tower.cancel(job)
