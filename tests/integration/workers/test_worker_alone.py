"""Workers that a test starts in its own way, stops, or leaves without something."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from broker.port import DeadLetter
from local.embedded import EmbeddedValkey
from router.decide.facts import FleetFacts, snapshot_from
from router.decide.snapshot import FleetSnapshot
from tasks.settings import TREE, Settings
from taxiway.contract.job import JobState
from taxiway.contract.keys import DEAD, DEVICES, HEARTBEATS, job_key, result_key
from taxiway.errors import DeviceFaultError, TaxiwayError
from tests.command_line import program
from tests.graphs import onnx_variant, text_graph, write_model
from tests.routing import eventually
from tests.scripting import is_held
from tests.stored import all_facts, facts_of, fields_of, record_of, scores
from tests.working import (
    CLASS,
    LASTING,
    QUEUES,
    SLAB,
    Tower,
    WorkerProcess,
    add_callable,
    add_slow,
    add_spinner,
    is_running,
    release,
    worker_process,
    worker_settings,
)
from workers.decide.faults import RETRIES
from workers.stages.device import OUT_OF_MEMORY
from workers.worker import BROKEN


def state_of_job(tower: Tower, job: str) -> JobState:
    return record_of(tower.state, job).state


def test_a_batch_ends_before_its_most_urgent_row_is_due(fleet: Settings, tower: Tower) -> None:
    add_slow(fleet.models, base=0.05, slope=0.32)
    with worker_process(fleet):
        others = [tower.message("slow", number, variant="paced") for number in range(9)]
        urgent = tower.message("slow", "urgent", variant="paced", deadline_at=time.time() + 2.5)
        tower.queue(*others, urgent)
        assert tower.result(urgent.headers["id"]).report.batch < 10  # all ten take 3.25 s


def test_a_device_stays_busy_in_the_snapshot_with_a_cancelled_batch_that_cannot_be_ended(
    fleet: Settings, tower: Tower
) -> None:
    add_spinner(fleet, base=50.0)
    with worker_process(fleet) as worker:
        job = tower.order("spinner", {"turns": [10**15]})
        eventually(lambda: is_running(tower, job))
        assert (facts_of(tower.state, worker.name).occupied, snapshot(tower).work) == (0.0, {})
        eventually(lambda: facts_of(tower.state, worker.name).blocked > 35.0)  # more urgent work waits for it
        tower.cancel(job)
        eventually(lambda: facts_of(tower.state, worker.name).occupied)
        assert 35.0 < snapshot(tower).work[CLASS][0] < 50.0


def snapshot(tower: Tower) -> FleetSnapshot:
    """What a router reads of the fleet now."""
    seconds, microseconds = tower.state.time()
    devices = {name: raw.encode() for name, raw in fields_of(tower.state, DEVICES).items()}
    beats = {name.decode(): at for name, at in scores(tower.state, HEARTBEATS).items()}
    return snapshot_from(FleetFacts(seconds + microseconds / 1e6, devices, beats, {}))


def test_a_job_that_was_ended_without_notice_while_it_waited_runs_once_at_most(fleet: Settings, tower: Tower) -> None:
    fleet.queues.write_text(QUEUES.replace("lease: 1", "lease: 60"))
    with worker_process(fleet):
        running = tower.order("slab", LASTING)
        eventually(lambda: is_running(tower, running))
        job = tower.order("echo", 1)
        eventually(lambda: is_held(tower.state, job))
        tower.state.hset(job_key(job), "state", "cancelled")  # without notice to the worker, which checks after 20 s
        release(fleet)
        tower.result(running)
        eventually(lambda: tower.unacknowledged() == 0)
        assert tower.state.exists(result_key(job)) == 0


@pytest.fixture
def slow(fleet: Settings) -> Settings:
    """The fleet with the model heavy, whose first use takes some seconds when it is loaded."""
    text = SLAB.replace("name: slab", "name: heavy") + "examples: [{samples: [80_000_000], seed: [1]}]\n"
    add_callable(fleet.models, "heavy", text, code="slab")
    return fleet


HEAVY = {"variant": "python", "inputs": {"samples": [10], "seed": [1]}}


def test_others_are_answered_while_a_variant_loads_and_its_jobs_run_once_then(slow: Settings, tower: Tower) -> None:
    with worker_process(slow) as worker:
        heavy = [tower.order("heavy", **HEAVY) for _ in range(20)]
        eventually(lambda: tower.unacknowledged() == 20)
        for n in range(5):
            tower.queue(*(messages := [tower.message("echo", f"row {n}") for _ in range(20)]))
            assert {tower.result(one.headers["id"]).outputs["payload"] for one in messages} == {f"row {n}"}
        assert not any(tower.state.exists(result_key(job)) for job in heavy)
        assert warm(tower, worker) == {"echo:1/echo", "slab:1/python"}
        with worker_process(slow, "--device", "cpu:1"):
            answers = [tower.result(job, within=60) for job in heavy]
        eventually(lambda: "heavy:1/python" in warm(tower, worker))
    assert {answer.report.device for answer in answers} == {"cpu:0"}
    assert all(0 < answer.report.load_time <= answer.report.queue_wait for answer in answers)
    assert {tower.state.hget(job_key(job), "attempts") for job in heavy} == {b"1"}


def test_a_worker_that_is_stopped_while_it_loads_returns_its_jobs(slow: Settings, tower: Tower) -> None:
    with worker_process(slow) as worker:
        tower.order("heavy", **HEAVY)
        eventually(lambda: tower.unacknowledged() == 1)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0
    assert (tower.waiting(), tower.unacknowledged()) == (1, 0)


def warm(tower: Tower, worker: WorkerProcess) -> set[str]:
    """What the worker's heartbeat says that it has loaded."""
    return set(facts_of(tower.state, worker.name).warm)


def test_a_job_that_ends_its_workers_is_given_up(fleet: Settings, tower: Tower) -> None:
    job = tower.order("echo", "poison")
    tower.state.hset(job_key(job), "attempts", 3)
    with worker_process(fleet), pytest.raises(TaxiwayError, match="given up"):
        tower.result(job)
    assert state_of_job(tower, job) is JobState.DEAD
    assert tower.state.llen(DEAD) == 1


@pytest.fixture
def hungry(fleet: Settings) -> Settings:
    """The fleet with the model hungry: the sum of so many zeros, all of which it holds at once."""
    fleet.queues.write_text(QUEUES.replace("[python, echo]", "[python, echo, onnx]"))
    graph = text_graph("(int64[1] n) => (float[1] sum) { zeros = ConstantOfShape (n) sum = ReduceSum (zeros) }")
    specs = {
        "inputs": [{"name": "n", "datatype": "INT64", "shape": [-1]}],
        "outputs": [{"name": "sum", "datatype": "FP32", "shape": [-1]}],
    }
    variants = {"onnx": {**onnx_variant(0.001), "memory": 0, "max_batch": 1}}
    write_model(fleet.models, "hungry", graph, **specs, variants=variants)
    return fleet


def test_a_job_whose_device_has_no_memory_runs_again_and_says_so_at_last(hungry: Settings, tower: Tower) -> None:
    with worker_process(hungry):
        began = time.monotonic()
        job = tower.order("hungry", {"n": [10**14]}, variant="onnx")
        with pytest.raises(DeviceFaultError, match="out of memory"):
            tower.result(job)
        assert time.monotonic() - began > RETRIES.first * (0.5 + 1)
        assert tower.result(tower.order("hungry", {"n": [3]}, variant="onnx")).outputs == {"sum": [0.0]}


def test_a_worker_whose_device_has_no_memory_left_hands_its_jobs_back_and_ends(hungry: Settings, tower: Tower) -> None:
    good, *starved = (tower.message("hungry", {"n": [n]}, variant="onnx") for n in (3, 10**14, 10**14, 10**14))
    tower.queue(good, *starved)
    with worker_process(hungry) as worker:
        assert worker.process.wait(timeout=60) == OUT_OF_MEMORY
    assert tower.result(str(good.headers["id"])).outputs == {"sum": [0.0]}
    assert tower.waiting() == len(starved)
    for job in (str(message.headers["id"]) for message in starved):
        assert not is_held(tower.state, job)
        assert tower.state.hget(job_key(job), "holder")  # it was not released: it runs alone from now on


def test_a_class_whose_device_is_absent_is_refused(fleet: Settings) -> None:
    done = program("workers", "--class", "gpu.realtime", "--device", "cuda:31", settings=fleet)
    assert done.returncode == 3
    assert "no NVIDIA device cuda:31" in done.stderr and "--emulate" in done.stderr


def test_the_celery_command_serves_a_class_and_asks_no_other_worker(
    fleet: Settings, tower: Tower, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-E", "-n", "plain@%h", "-l", "INFO"]
    environment = {**os.environ, **fleet.environment(), "TAXIWAY_CLASS": CLASS}
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, cwd=TREE, env=environment, stderr=file) as process:
        try:
            assert tower.result(tower.order("echo", "hello"), within=120).outputs == {"payload": "hello"}
        finally:
            process.terminate()
            assert process.wait(60) == 0
    assert "Connected to" in log.read_text()
    assert "mingle" not in log.read_text()


def test_an_outage_while_a_job_runs_costs_neither_the_job_nor_a_second_run(settings: Settings, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        fleet = worker_settings(replace(settings, broker=server.url), tmp_path)
        with Tower(fleet) as tower, worker_process(fleet) as worker:
            job = tower.order("slab", {"samples": [20_000_000], "seed": [1]})
            eventually(lambda: is_running(tower, job))
            server.stop()
            time.sleep(2)
            server.start()
            tower.result(job)
            assert tower.state.hget(job_key(job), "attempts") == b"1"
            assert tower.result(tower.order("echo", "after"), within=30).outputs == {"payload": "after"}
            assert worker.process.poll() is None


def test_a_worker_whose_connections_are_cut_goes_on_without_a_word_of_celerys_settings(
    fleet: Settings, tower: Tower, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file, worker_process(fleet, log=file):
        tower.result(tower.order("echo", "before"))
        for kind in ("normal", "pubsub"):
            tower.state.client_kill_filter(_type=kind, skipme=True)
        assert tower.result(tower.order("echo", "after")).outputs == {"payload": "after"}
        eventually(lambda: "Connected to" in log.read_text().partition("Connection to broker lost")[2])
    assert "DeprecationWarning" not in log.read_text()


def rejected(tower: Tower) -> int:
    """Messages that the workers say they rejected."""
    return sum(one.done[CLASS].rejected for one in all_facts(tower.state) if CLASS in one.done)


@pytest.mark.usefixtures("worker")
def test_a_message_that_no_router_signed_is_parked_counted_and_not_run(tower: Tower) -> None:
    message = tower.message("echo", "forged")
    message.headers["taxiway"] = message.headers["taxiway"].replace('"echo"', '"another"')
    tower.state.hset(job_key(message.headers["id"]), "state", JobState.QUEUED)  # the job that the message names
    tower.queue(message)
    letter = eventually(lambda: tower.state.lindex(DEAD, 0))
    assert "signed by a router" in msgspec.json.decode(letter, type=DeadLetter).reason
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    assert tower.state.get(result_key(message.headers["id"])) is None
    eventually(lambda: rejected(tower) == 1)


FAILING = """
import time
from workers.worker import start_thread

def body():
    raise ValueError("the loop broke")

start_thread("finish", body)
time.sleep(20)
"""


def test_a_process_ends_when_one_of_its_loops_fails_and_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], cwd=TREE, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == BROKEN
    assert "the loop broke" in done.stderr
