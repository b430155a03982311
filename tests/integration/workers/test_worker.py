"""A real worker process on a real Valkey, behind the smallest router that can sign."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
from celery import Celery, chord, signature
from onnx import TensorProto, helper

from broker.port import DeadLetter
from local.embedded import EmbeddedValkey
from router.decide.facts import FleetFacts, snapshot_from
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import DeviceFacts, empty, held_of
from tasks.settings import TREE, Settings
from tasks.ticket import Promise
from taxiway.contract.job import JobState, failure_meta, read_meta
from taxiway.contract.keys import ARRIVALS, DEAD, DEVICES, HEARTBEATS, INFER, job_key, reply_channel, result_key
from taxiway.contract.wire import decode_envelope
from taxiway.errors import (
    DeadlineExceededError,
    DeviceFaultError,
    ExecutionError,
    InvalidRequestError,
    JobCancelledError,
    TaxiwayError,
)
from tests.routing import eventually
from tests.scripting import is_held
from tests.stored import facts_of, fields_of, record_of, scores
from tests.working import (
    CLASS,
    LASTING,
    LONG,
    QUEUES,
    SLAB,
    Tower,
    WorkerProcess,
    add_callable,
    add_spinner,
    inspect,
    is_running,
    let_go,
    worker_process,
    worker_settings,
)
from workers.decide.faults import RETRIES
from workers.stages.retries import OUT_OF_MEMORY


def state_of_job(tower: Tower, job: str) -> JobState:
    return record_of(tower.state, job).state


@pytest.mark.usefixtures("worker")
def test_a_job_is_answered_with_where_it_ran(tower: Tower) -> None:
    job = tower.order("echo", "hello")
    result = tower.result(job)
    assert result.outputs == {"payload": "hello"}
    assert (result.model, result.report.hardware_class, result.report.variant) == ("echo:1", CLASS, "echo")
    assert (result.report.device, result.report.emulated, result.report.batch) == ("cpu:0", False, 1)
    assert result.report.queue_wait >= 0 and result.report.cost > 0
    assert result.report.reason == "the test says so"
    assert state_of_job(tower, job) is JobState.SUCCEEDED


@pytest.mark.usefixtures("worker")
def test_a_plain_celery_result_is_read_by_celery(tower: Tower, producer: Celery) -> None:
    sent = producer.send_task(INFER, kwargs={"model": "echo", "inputs": ["a", {"b": 1}]})
    assert tower.route("echo") == 1
    assert sent.get(timeout=20)["outputs"] == {"payload": ["a", {"b": 1}]}


@pytest.mark.usefixtures("worker")
def test_a_client_receives_its_result_on_its_channel(tower: Tower) -> None:
    with tower.state.pubsub() as channel:
        channel.subscribe(reply_channel("me"))
        eventually(lambda: channel.get_message(timeout=0.1))
        job = tower.order("echo", "hello", reply="me")
        heard = eventually(lambda: channel.get_message(ignore_subscribe_messages=True, timeout=0.1))
    assert read_meta(heard["data"]).task_id == job


@pytest.mark.usefixtures("worker")
def test_jobs_that_wait_together_run_together(tower: Tower) -> None:
    messages = [tower.message("paced", f"row {n}") for n in range(32)]
    tower.queue(*messages)
    batches = [tower.result(m.headers["id"]).report.batch for m in messages]
    assert max(batches) == 16
    assert sum(batch == 16 for batch in batches) >= 16


def test_a_batch_ends_before_its_most_urgent_row_is_due(fleet: Settings, tower: Tower) -> None:
    text = (TREE / "models" / "paced" / "model.yaml").read_text().replace("name: paced", "name: slow")
    text = text.replace("entry: paced", "entry: paced=0.05+0.32").replace(
        "base: 0.005, slope: 0.0001", "base: 0.05, slope: 0.32"
    )
    (fleet.models / "slow").mkdir()
    (fleet.models / "slow" / "model.yaml").write_text(text)
    with worker_process(fleet):
        others = [tower.message("slow", number, variant="paced") for number in range(9)]
        urgent = tower.message("slow", "urgent", variant="paced", deadline_at=time.time() + 2.5)
        tower.queue(*others, urgent)
        assert tower.result(urgent.headers["id"]).report.batch < 10  # all ten take 3.25 s


@pytest.mark.usefixtures("worker")
def test_rows_of_one_request_run_in_several_batches_and_come_back_in_order(tower: Tower) -> None:
    rows = [f"row {n}" for n in range(40)]
    result = tower.result(tower.order("paced", rows))
    assert result.outputs["payload"] == rows
    assert result.report.batch == 16


@pytest.mark.usefixtures("worker")
def test_a_worker_takes_few_jobs_of_many_rows_so_that_others_may_pass_or_move_them(tower: Tower) -> None:
    for _ in range(5):
        tower.result(tower.order("paced", ["x"] * 96))
    jobs = [tower.order("paced", ["x"] * 96) for _ in range(40)]  # of six batches each
    eventually(lambda: tower.waiting() < 40)
    assert tower.unacknowledged() <= 3
    tower.result(jobs[-1])


@pytest.mark.usefixtures("worker")
def test_a_failing_item_does_not_affect_the_rest_of_its_batch(tower: Tower) -> None:
    good = [tower.message("slab", {"samples": [1000], "seed": [n]}) for n in range(6)]
    bad = tower.message("slab", {"samples": [0], "seed": [1]})
    tower.queue(*good[:3], bad, *good[3:])
    with pytest.raises(ExecutionError, match="division by zero"):
        tower.result(bad.headers["id"])
    for message in good:
        assert tower.result(message.headers["id"]).outputs["estimate"] is not None


@pytest.mark.usefixtures("worker")
def test_a_request_with_one_failing_row_fails_and_names_the_row(tower: Tower) -> None:
    job = tower.order("slab", {"samples": [1000, 0, 1000], "seed": [1, 2, 3]})
    with pytest.raises(ExecutionError, match=r"row 1: .*division by zero") as raised:
        tower.result(job)
    assert raised.value.details["row"] == 1


@pytest.mark.usefixtures("worker")
def test_a_wrong_input_names_its_field_in_the_error(tower: Tower) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        tower.result(tower.order("slab", {"samples": ["many"], "seed": [1]}))
    assert raised.value.details["field"] == "inputs.samples"


@pytest.mark.usefixtures("worker")
def test_copies_of_a_wrong_request_are_answered_once(tower: Tower) -> None:
    message = tower.message("slab", {"samples": ["many"], "seed": [1]})
    tower.queue(message, message)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    with pytest.raises(InvalidRequestError):
        tower.result(message.headers["id"])


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


@pytest.mark.usefixtures("worker")
def test_a_job_past_its_deadline_is_not_run(tower: Tower) -> None:
    job = tower.order("echo", "too late", deadline_at=time.time() - 1)
    with pytest.raises(DeadlineExceededError):
        tower.result(job)
    assert state_of_job(tower, job) is JobState.EXPIRED
    eventually(lambda: tower.unacknowledged() == 0)


@pytest.mark.usefixtures("worker")
def test_a_job_that_was_cancelled_while_it_waited_is_dropped(tower: Tower) -> None:
    message = tower.message("echo", "no more")
    job = message.headers["id"]
    tower.state.set(result_key(job), failure_meta(job, JobCancelledError("cancelled")))
    tower.queue(message)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    with pytest.raises(JobCancelledError):
        tower.result(job)


@pytest.mark.usefixtures("worker")
def test_what_a_job_that_was_cancelled_while_it_ran_would_have_answered_is_dropped(tower: Tower) -> None:
    job = tower.order("slab", LASTING)
    eventually(lambda: is_running(tower, job))
    tower.cancel(job)
    eventually(lambda: tower.unacknowledged() == 0)
    assert state_of_job(tower, job) is JobState.CANCELLED
    with pytest.raises(JobCancelledError):
        tower.result(job)


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
        assert 35.0 < snapshot(tower).ahead(CLASS, 0) < 50.0


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
        let_go(fleet)
        tower.result(running)
        eventually(lambda: tower.unacknowledged() == 0)
        assert tower.state.exists(result_key(job)) == 0


@pytest.mark.usefixtures("worker")
def test_copies_of_one_message_run_once(tower: Tower) -> None:
    message = tower.message("slab", LONG)
    job = message.headers["id"]
    tower.queue(message, message, message)
    tower.result(job)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    assert tower.state.hget(job_key(job), "attempts") == b"1"


@pytest.mark.usefixtures("worker")
def test_a_job_longer_than_its_lease_runs_once(tower: Tower, fleet: Settings) -> None:
    job = tower.order("slab", {"samples": [40_000_000], "seed": [1]})
    with worker_process(fleet, "--device", "cpu:1"):
        assert tower.result(job, within=60).report.run_time > 1.0
    assert tower.state.hget(job_key(job), "attempts") == b"1"


def test_a_worker_that_stops_finishes_what_it_holds(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as first:
        running = tower.order("slab", LASTING)
        eventually(lambda: is_running(tower, running))
        waiting = [tower.order("echo", f"row {n}") for n in range(20)]
        eventually(lambda: tower.unacknowledged() == 21)
        first.process.send_signal(signal.SIGTERM)
        eventually(lambda: facts_of(tower.state, first.name).draining)
        let_go(fleet)
        assert first.process.wait(60) == 0
    assert [tower.result(job, within=0.1).report.device for job in (running, *waiting)] == ["cpu:0"] * 21
    assert (tower.waiting(), tower.unacknowledged()) == (0, 0)
    assert tower.state.hexists(DEVICES, first.name) == 0


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


@pytest.mark.usefixtures("worker")
def test_a_ticket_for_another_class_is_parked(tower: Tower) -> None:
    tower.order("echo", "elsewhere", variants={"gpu.realtime": "echo"})
    letter = eventually(lambda: tower.state.lindex(DEAD, 0))
    assert f"expected a ticket for {CLASS}" in msgspec.json.decode(letter, type=DeadLetter).reason


@pytest.mark.parametrize("task", ["celery.map", "os.system"])
@pytest.mark.usefixtures("worker")
def test_another_task_is_never_run_and_ends_no_job(tower: Tower, task: str) -> None:
    message = tower.message("echo", "hello")
    message.headers["task"] = task
    tower.state.hset(job_key(message.headers["id"]), "state", JobState.QUEUED)  # the job that the message names
    tower.queue(message)
    eventually(lambda: tower.state.llen(DEAD) == 1)
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    assert tower.state.get(result_key(message.headers["id"])) is None


@pytest.mark.usefixtures("worker")
def test_a_link_a_chain_and_an_errback_are_followed(tower: Tower, producer: Celery) -> None:
    linked = signature("lab.next", queue="lab.link", app=producer)
    failed = signature("lab.failed", queue="lab.errback", app=producer)
    follow = {"callbacks": [linked], "chain": [signature("lab.then", queue="lab.chain", app=producer)]}
    good = tower.order("echo", "hello", canvas=follow)
    bad = tower.order("slab", {"samples": [0], "seed": [1]}, canvas={"errbacks": [failed]})
    assert tower.result(good).outputs == {"payload": "hello"}
    with pytest.raises(ExecutionError, match="division by zero"):
        tower.result(bad)
    for queue in ("lab.link", "lab.chain"):
        raw = eventually(partial(tower.state.lindex, queue, 0))
        args, _, _ = msgspec.json.decode(decode_envelope(raw).payload())
        assert args[0]["outputs"] == {"payload": "hello"}
    eventually(lambda: tower.state.llen("lab.errback") == 1)


@pytest.mark.usefixtures("worker")
def test_a_chord_is_completed(tower: Tower, producer: Celery) -> None:
    header = [producer.signature(INFER, kwargs={"model": "echo", "inputs": n}, queue=ARRIVALS) for n in range(3)]
    chord(header, app=producer)(producer.signature("lab.collect", queue="lab.collect"))
    assert tower.route("echo") == 3
    raw = eventually(lambda: tower.state.lindex("lab.collect", 0))
    args, _, _ = msgspec.json.decode(decode_envelope(raw).payload())
    assert [answer["outputs"]["payload"] for answer in args[0]] == [0, 1, 2]


@pytest.mark.parametrize("followed", [False, True])  # what a link follows comes by Celery's own consumer
def test_a_job_revoked_by_celery_is_not_run(fleet: Settings, tower: Tower, producer: Celery, followed: bool) -> None:
    with worker_process(fleet) as worker:
        busy = tower.order("slab", LASTING)
        eventually(lambda: is_running(tower, busy))
        link = [signature("lab.next", queue="lab.link", app=producer)] if followed else None
        message = tower.message("slab", LONG, canvas={"callbacks": link})
        message.headers["ignore_result"] = followed
        tower.queue(message)
        job = str(message.headers["id"])
        eventually(lambda: tower.unacknowledged() == 2)
        producer.control.revoke(job)
        eventually(lambda: job in inspect(producer, worker).revoked()[worker.name])
        let_go(fleet)
        with pytest.raises(JobCancelledError):
            tower.result(job)
        assert state_of_job(tower, job) is JobState.CANCELLED
        assert read_meta(tower.await_meta(job)).status == "REVOKED"
        eventually(lambda: tower.unacknowledged() == 0)


def test_a_worker_reports_its_device_and_its_warm_variants(worker: WorkerProcess, tower: Tower) -> None:
    facts = facts_of(tower.state, worker.name)
    assert (facts.hardware_class, facts.device, facts.kind, facts.emulated) == (CLASS, "cpu:0", "cpu", False)
    assert facts.warm == ("echo:1/echo", "slab:1/python")
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
    assert {tower.state.hget(job_key(job), "attempts") for job in heavy} == {b"1"}


def test_a_worker_that_is_stopped_while_it_loads_returns_its_jobs(slow: Settings, tower: Tower) -> None:
    with worker_process(slow) as worker:
        tower.order("heavy", **HEAVY)
        eventually(lambda: tower.unacknowledged() == 1)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0
    assert (tower.waiting(), tower.unacknowledged()) == (1, 0)


def rejected(tower: Tower) -> int:
    """Messages that the workers say they rejected."""
    facts = [msgspec.json.decode(raw, type=DeviceFacts) for raw in tower.state.hvals(DEVICES)]
    return sum(one.done[CLASS].rejected for one in facts if CLASS in one.done)


def warm(tower: Tower, worker: WorkerProcess) -> set[str]:
    """What the worker's heartbeat says that it has loaded."""
    return set(facts_of(tower.state, worker.name).warm)


def test_a_device_is_shown_as_used_while_a_long_batch_still_runs(worker: WorkerProcess, tower: Tower) -> None:
    tower.order("slab", LASTING)
    eventually(lambda: facts_of(tower.state, worker.name).utilisation > 0.9)


def test_a_job_that_ends_its_workers_is_given_up(fleet: Settings, tower: Tower) -> None:
    job = tower.order("echo", "poison")
    tower.state.hset(job_key(job), "attempts", 3)
    with worker_process(fleet), pytest.raises(TaxiwayError, match="given up"):
        tower.result(job)
    assert state_of_job(tower, job) is JobState.DEAD
    assert tower.state.llen(DEAD) == 1


def test_no_number_of_a_request_ends_its_worker(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as worker:
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
        assert worker.process.poll() is None


HUNGRY = """
name: hungry
version: 1
summary: The sum of so many zeros, all of which it holds at once.
licence: Apache-2.0
pipeline: tensors
inputs: [{{name: n, datatype: INT64, shape: [-1]}}]
outputs: [{{name: sum, datatype: FP32, shape: [-1]}}]
reference: onnx
artefacts: {{graph: {{kind: file, path: hungry.onnx, sha256: {sha256}, licence: Apache-2.0}}}}
variants:
  onnx:
    runtime: onnx
    artefacts: {{graph: graph}}
    memory: 0
    max_batch: 1
    profiles: {{cpu: {{base: 0.001, slope: 0.0001}}}}
"""


@pytest.fixture
def hungry(fleet: Settings) -> Settings:
    """The fleet with a model that asks for as much memory as its input says."""
    fleet.queues.write_text(QUEUES.replace("[python, echo]", "[python, echo, onnx]"))
    zeros = helper.make_node("ConstantOfShape", ["n"], ["zeros"])
    added = helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=1)
    n = helper.make_tensor_value_info("n", TensorProto.INT64, [1])
    total = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1])
    graph = helper.make_graph([zeros, added], "hungry", [n], [total])
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    folder = fleet.models / "hungry"
    folder.mkdir()
    (folder / "hungry.onnx").write_bytes(raw)
    (folder / "model.yaml").write_text(HUNGRY.format(sha256=hashlib.sha256(raw).hexdigest()))
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
    done = start(fleet, "--class", "gpu.realtime", "--device", "cuda:31")
    assert done.returncode == 3
    assert "no NVIDIA device cuda:31" in done.stderr and "--emulate" in done.stderr


def test_an_unknown_class_is_refused(fleet: Settings) -> None:
    done = start(fleet, "--class", "gpu.huge")
    assert done.returncode == 2
    assert "TAXIWAY_CLASS: expected one of ['cpu.batch', 'gpu.realtime'], got 'gpu.huge'" in done.stderr


def start(fleet: Settings, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers", *options]
    environment = {**os.environ, **fleet.environment()}
    return subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=60, check=False)


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
