"""A real worker process that generates: jobs join and leave a running batch, and answers are streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery

from broker.valkey import run
from broker.valkey.records import Ending, finish_call
from broker.valkey.worker_store import WorkerStore
from tasks.heartbeat import DeviceFacts
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import Settings
from tasks.topology import Limits
from taxiway.contract.job import KEEP, MOST_PIECES, JobState, Lost, Piece, Progress, Restarted, failure_meta, read_piece
from taxiway.contract.keys import DEVICES, job_key, stream_key
from taxiway.errors import InvalidRequestError, JobCancelledError
from tests.decoding import tiny_model
from tests.narrowing import as_bytes
from tests.producing import stop_listening
from tests.routing import eventually
from tests.scripting import is_held
from tests.stored import facts_of
from tests.working import QUEUES, Tower, WorkerProcess, worker_process, worker_settings
from workers.drain import SIGNAL
from workers.port import Placed, open_pipeline, open_runtime

PROMPT = {"variant": "onnx", "parameters": {"max_tokens": 40}}
ENDLESS = {"variant": "onnx", "parameters": {"max_tokens": 1600}}
"""A generation of some ten seconds: long enough for whatever is to happen meanwhile."""


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    base = worker_settings(settings, tmp_path, QUEUES.replace("[python, echo]", "[python, echo, onnx]"))
    tiny_model(base.models, layers=8, hidden=4096)
    return base


def streamed(tower: Tower, job: str) -> list[Piece]:
    """The pieces in the job's stream."""
    entries: Any = tower.state.xrange(stream_key(job))
    return [read_piece(fields) for _, fields in entries]


def whole(tower: Tower, job: str, text: str) -> list[Piece]:
    """The pieces in the job's stream, once they are the whole text."""
    return eventually(lambda: (pieces := streamed(tower, job)) and "".join(p.text for p in pieces) == text and pieces)


def running(tower: Tower) -> int:
    """Rows on the device, as the worker's heartbeat says."""
    return sum(msgspec.json.decode(raw, type=DeviceFacts).running for raw in tower.state.hvals(DEVICES))


def state_of(tower: Tower, job: str) -> str:
    return as_bytes(tower.state.hget(job_key(job), "state") or b"").decode()


def cancel(tower: Tower, job: str) -> None:
    """What a router does."""
    ending = Ending(job, JobState.CANCELLED, failure_meta(job, JobCancelledError("cancelled")))
    assert run(tower.state, finish_call([ending], keep_result=60, keep_record=60)) == [1]


@pytest.mark.usefixtures("worker")
def test_an_answer_does_not_depend_on_the_rows_that_ran_with_it(tower: Tower, fleet: Settings) -> None:
    messages = [tower.message("tiny", f"prompt {n}", **PROMPT) for n in range(20)]
    tower.queue(*messages)
    answers = [tower.result(m.headers["id"]) for m in messages]
    assert max(answer.report.batch for answer in answers) > 4
    model = load_catalogue(fleet.models).resolve("tiny")
    placed = Placed("tiny", "fp32", "decoder", ArtefactStore(fleet.cache).files(model, "onnx"), "cpu")
    runtime, pipeline = open_runtime("onnx", placed), open_pipeline(model, model.variants["onnx"], placed)
    runtime.load()
    item = pipeline.prepare({"prompt": "prompt 7"}, {"max_tokens": 40, "temperature": 0})
    assert answers[7].outputs["text"] == pipeline.run(runtime, [item])[0]["text"]


@pytest.mark.usefixtures("worker")
def test_a_short_answer_joins_a_long_one_and_ends_before_it(tower: Tower) -> None:
    long = tower.order("tiny", "long", **ENDLESS)
    eventually(lambda: state_of(tower, long) == "running")
    short = tower.result(tower.order("tiny", "short", **PROMPT))
    assert short.report.batch == 2
    assert state_of(tower, long) == "running"
    cancel(tower, long)


@pytest.mark.usefixtures("worker")
def test_other_models_run_between_the_steps_of_a_long_answer(tower: Tower) -> None:
    long = tower.order("tiny", "long", **ENDLESS)
    eventually(lambda: state_of(tower, long) == "running")
    assert [tower.result(tower.order("echo", n)).outputs["payload"] for n in range(5)] == list(range(5))
    assert state_of(tower, long) == "running"
    cancel(tower, long)


@pytest.mark.usefixtures("worker")
def test_a_cancelled_generation_leaves_the_device_and_is_acknowledged(tower: Tower) -> None:
    job = tower.order("tiny", "long", **ENDLESS)
    eventually(lambda: running(tower) == 1)
    cancel(tower, job)
    eventually(lambda: running(tower) == 0 and tower.unacknowledged() == 0)
    assert state_of(tower, job) == "cancelled"
    assert not is_held(tower.state, job)


def test_a_revoked_generation_leaves_the_device(tower: Tower, worker: WorkerProcess, fleet: Settings) -> None:
    job = tower.order("tiny", "long", **ENDLESS)
    eventually(lambda: running(tower) == 1)
    with Celery("lab", broker=fleet.broker, backend=fleet.state, set_as_current=False) as app:
        app.control.revoke(job, destination=[worker.name])
        eventually(lambda: running(tower) == 0 and tower.unacknowledged() == 0)
        stop_listening(app)
    with pytest.raises(JobCancelledError):
        tower.result(job)


@pytest.mark.usefixtures("worker")
def test_an_answer_is_streamed_as_it_grows_and_the_stream_expires_soon(tower: Tower) -> None:
    job = tower.order("tiny", "tell me", variant="onnx", stream=True, parameters={"max_tokens": 400})
    first = eventually(lambda: streamed(tower, job))
    result = tower.result(job)
    pieces = whole(tower, job, result.outputs["text"])
    assert pieces[: len(first)] == first
    assert len(first) < len(pieces)
    assert 0 < tower.state.ttl(stream_key(job)) <= KEEP


@pytest.mark.usefixtures("worker")
def test_an_answer_without_a_streaming_reader_has_no_stream(tower: Tower) -> None:
    job = tower.order("tiny", "tell me later", **PROMPT)
    tower.result(job)
    assert not tower.state.exists(stream_key(job))


@pytest.mark.usefixtures("worker")
def test_only_one_generated_answer_can_be_streamed(tower: Tower) -> None:
    with pytest.raises(InvalidRequestError, match="a request of one row, got 2") as several:
        tower.result(tower.order("tiny", ["one", "two"], stream=True, **PROMPT))
    with pytest.raises(InvalidRequestError, match="a model that generates text, got echo:1"):
        tower.result(tower.order("echo", "hello", stream=True))
    assert several.value.details["field"] == "stream"


def test_an_answer_whose_worker_is_killed_restarts_and_says_so(fleet: Settings, tower: Tower) -> None:
    asked = {"variant": "onnx", "stream": True, "parameters": {"max_tokens": 500}}
    with worker_process(fleet) as first:
        job = tower.order("tiny", "tell me", **asked)
        eventually(lambda: len(streamed(tower, job)) > 3)
        first.process.kill()
        first.process.wait()
    with worker_process(fleet):
        result = tower.result(job, within=60)
    progress = Progress()
    events = [event for n, piece in enumerate(streamed(tower, job)) for event in progress.take(f"{n}-0", piece)]
    events += progress.end(result)
    (restart,) = [n for n, event in enumerate(events) if isinstance(event, Restarted)]
    assert events[restart] == Restarted(2)
    assert "".join(map(str, events[restart + 1 :])) == result.outputs["text"]
    assert result.outputs["text"].startswith("".join(map(str, events[:restart])))


def test_a_stream_is_bounded_and_a_slow_reader_learns_what_it_lost(fleet: Settings, tower: Tower) -> None:
    store, progress = WorkerStore(fleet.state, "worker", Limits()), Progress()
    for n in range(2 * MOST_PIECES):
        store.append([("job", Piece(1, 2 * n, "ab"))])
    pieces = streamed(tower, "job")
    assert MOST_PIECES <= len(pieces) < MOST_PIECES + 200
    lost, *rest = [event for n, piece in enumerate(pieces) for event in progress.take(f"{n}-0", piece)]
    assert lost == Lost(pieces[0].at)
    assert rest == ["ab"] * len(pieces)


def test_models_that_do_not_fit_together_take_turns(settings: Settings, tmp_path: Path) -> None:
    short = "[echo]\n    memory: 150MiB"
    queues = QUEUES.replace("[python, echo]", "[python, echo, onnx]").replace("[echo, slab]", short)
    base = worker_settings(settings, tmp_path, queues)
    tiny_model(base.models, memory="100MiB")
    slab = base.models / "slab" / "model.yaml"
    slab.write_text(slab.read_text().replace("memory: 0", "memory: 60MiB"))
    with Tower(base) as tower, worker_process(base) as worker:
        jobs = []
        for n in range(12):
            jobs += [tower.order("tiny", f"prompt {n}", **PROMPT), tower.order("slab", {"samples": [10], "seed": [n]})]
        answers = [tower.result(job, within=60) for job in jobs]
        facts = facts_of(tower.state, worker.name)
    assert {answer.model for answer in answers} == {"tiny:1", "slab:1"}
    assert not {"tiny:1/onnx", "slab:1/python"} <= set(facts.warm)


def test_a_worker_that_leaves_at_once_gives_its_running_generation_back(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as worker:
        job = tower.order("tiny", "long", **ENDLESS)
        eventually(lambda: state_of(tower, job) == "running")
        worker.process.send_signal(SIGNAL)
        eventually(lambda: facts_of(tower.state, worker.name).draining)
        worker.process.send_signal(SIGNAL)  # for the second time: now
        assert worker.process.wait(60) == 0
    assert (state_of(tower, job), tower.waiting(), is_held(tower.state, job)) == ("queued", 1, False)
