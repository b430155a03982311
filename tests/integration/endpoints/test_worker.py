"""A real worker process that drives an endpoint: a scripted engine on a real socket, and a real Valkey."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.valkey import run
from broker.valkey.jobs import YieldAsk, yield_call
from tasks.heartbeat import DeviceFacts, Use
from tasks.models.chats import most_tokens
from tasks.queues.endpoints import Tariff
from tasks.settings import Settings
from taxiway.contract.job import Tokens
from taxiway.contract.keys import job_key, learned_key, result_key, stream_key
from taxiway.contract.stream import Piece, read_piece
from taxiway.errors import DeadlineExceededError, DeviceFaultError, JobCancelledError, TaxiwayError
from tests.builders import a_chat, add_engine_models
from tests.command_line import program
from tests.engine import Engine, serving
from tests.narrowing import as_bytes
from tests.queues import engine_class, queues_of
from tests.routing import eventually
from tests.stored import all_facts
from tests.waiting import BUSY
from tests.working import CLASS, Tower, WorkerProcess, worker_process, worker_settings

VARIANT = {"variant": "engine"}


class Server:
    """The engine's server, which can be stopped and started again on its port."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._stack = engine, ExitStack()

    def start(self) -> None:
        self._stack.enter_context(serving(self._engine))

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture(autouse=True)
def server(engine: Engine) -> Iterator[Server]:
    started = Server(engine)
    started.start()
    yield started
    started.stop()


def engine_fleet(base: Settings, folder: Path, engine: Engine) -> Settings:
    """Settings of a fleet with that engine, whose worker needs ENGINE_KEY."""
    models = {"talk": {"server": "served", "variant": "engine"}, "vector": "served", "rank": "served"}
    own: Any = {"key_env": "ENGINE_KEY", "headers": {"X-Team": "lab"}, "priority": True, "health": {"every": 0.2}}
    limits = {"lease": 1, "stall": 4, "grace": 6}
    queues = queues_of({CLASS: engine_class(engine.url, models=models, **own)}, limits=limits)
    configured = worker_settings(base, folder, queues)
    add_engine_models(configured.models, "talk", "vector", "rank")
    return configured


@pytest.fixture
def fleet(
    settings: Settings, tmp_path: Path, engine: Engine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    monkeypatch.setenv("ENGINE_KEY", "sk-1")
    return engine_fleet(settings, tmp_path, engine)


@dataclass(frozen=True)
class Site:
    """A worker that lives through several tests, its engine, and what stands before it."""

    tower: Tower
    engine: Engine


@pytest.fixture(scope="module")
def lasting_site(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(Engine()) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KEY", "sk-1")
        fleet = engine_fleet(lasting, tmp_path_factory.mktemp("site"), engine)
        with Tower(fleet) as tower, worker_process(fleet):
            yield Site(tower, engine)


@pytest.fixture
def site(lasting_site: Site) -> Iterator[Site]:
    """It without work, before and after a test; its engine has not been asked anything."""
    lasting_site.engine.forget()
    yield lasting_site
    settled(lasting_site.tower, lasting_site.engine)


def order(tower: Tower, text: str, **terms: Any) -> str:
    return tower.order("talk", a_chat(text), **VARIANT, **terms)


def facts(tower: Tower) -> DeviceFacts:
    (found,) = all_facts(tower.state)
    return found


def configured(tower: Tower, job: str) -> list[Piece]:
    entries: Any = tower.state.xrange(stream_key(job))
    pieces = [read_piece(fields) for _, fields in entries]
    return [replace(piece, tokens=0) for piece in pieces if isinstance(piece, Piece)]


def settled(tower: Tower, engine: Engine) -> None:
    """The endpoint runs nothing, and the worker holds no message."""
    eventually(lambda: engine.running == 0 and tower.unacknowledged() == 0)


def test_a_chat_is_answered_with_message_usage_and_share(site: Site) -> None:
    tower, engine = site.tower, site.engine
    result = tower.result(order(tower, "Hello dear world", parameters={"max_tokens": 9}))
    assert result.outputs["message"] == {"role": "assistant", "content": "Hello dear world "}
    assert result.outputs["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    assert (result.outputs["tokens"], result.outputs["finish-reason"]) == (3, "stop")
    assert (result.report.device, result.report.emulated, result.report.batch) == ("endpoint:0", False, 1)
    (_, headers, body) = engine.asked[0]
    assert (headers["authorization"], headers["x-team"]) == ("bearer sk-1", "lab")
    assert (body["model"], body["stream"], body["max_tokens"]) == ("served", True, 9)
    assert body["priority"] == 1  # the level
    tower.result(tower.order("talk", a_chat("hi"), **VARIANT, level=2))
    assert engine.chats[-1]["priority"] == 2
    seen = facts(tower)
    assert (seen.kind, seen.runtimes, seen.fault) == ("endpoint", ("openai",), "")
    assert set(seen.warm) == {"talk:1/engine", "vector:1/engine", "rank:1/engine"}
    pairs = {"query": ["who", "who"], "document": ["he", "she"]}
    assert tower.result(tower.order("rank", pairs, **VARIANT)).outputs["score"] == [2, 3]


def test_rows_run_side_by_side_and_never_more_than_there_are_slots(site: Site) -> None:
    tower, engine = site.tower, site.engine
    jobs = [order(tower, f"wait=0.2 {n} done") for n in range(10)]
    texts = [tower.result(job).outputs["text"] for job in jobs]
    assert texts == [f"{n} done " for n in range(10)]
    assert engine.most == 4
    rows = tower.result(tower.order("vector", ["a", "bb", "ccc", "dddd", "eeeee"], **VARIANT)).outputs["embedding"]
    assert list(np.frombuffer(rows["data"], "<f4")) == [1, 1, 2, 1, 3, 1, 4, 1, 5, 1]
    assert tower.result(jobs[4]).report.batch > 1


def test_a_cancelled_job_closes_its_connection_at_once(site: Site) -> None:
    tower, engine = site.tower, site.engine
    job, other = order(tower, "one stall"), order(tower, "wait=0.5 one two")
    eventually(lambda: engine.running == 2)
    cancelled = time.monotonic()
    tower.cancel(job)
    eventually(lambda: engine.aborts)
    assert engine.aborts["one stall"] - cancelled < 1 + BUSY
    assert tower.result(other).outputs["text"] == "one two "
    with pytest.raises(JobCancelledError):
        tower.result(job)


def test_a_job_that_expires_while_it_runs_closes_its_connection(site: Site) -> None:
    tower, engine = site.tower, site.engine
    due = time.time() + 1
    job = order(tower, "one stall", deadline_at=due)
    with pytest.raises(DeadlineExceededError):
        tower.result(job)
    eventually(lambda: engine.aborts)
    assert engine.aborts["one stall"] - time.monotonic() + time.time() - due < 1 + BUSY


def test_a_failed_run_is_repeated_and_the_last_failure_is_reported(site: Site) -> None:
    tower, engine = site.tower, site.engine
    for fault in ("status=500", "one break", "one cut", "one garble"):
        with pytest.raises(DeviceFaultError, match="talk:1/engine: the "):
            tower.result(order(tower, fault))
        assert [one["messages"][0]["content"] for one in engine.chats].count(fault) == 3
        assert tower.result(order(tower, "well again")).outputs["text"] == "well again "


@pytest.mark.parametrize("fault", ["one stall", "one break"])
def test_a_stream_that_stalls_or_breaks_restarts_from_its_beginning(site: Site, fault: str) -> None:
    tower, engine = site.tower, site.engine
    engine.script = fault
    job = order(tower, "two three", stream=True)
    eventually(lambda: configured(tower, job))
    engine.script = ""
    assert tower.result(job).outputs["text"] == "two three "
    pieces = eventually(lambda: (seen := configured(tower, job)) and seen[-1].text.endswith("three ") and seen)
    assert pieces[0] == Piece(1, 0, "one ")
    assert pieces[-1].attempt > 1


@pytest.mark.parametrize(("prompt", "asked"), [("think=hm wait=0.1 one two three", 1), ("wait=0.1 one two three", 2)])
def test_an_answer_with_more_than_text_does_not_yield_and_one_of_an_unknown_engine_begins_again(
    site: Site, prompt: str, asked: int
) -> None:
    tower, engine = site.tower, site.engine
    job = order(tower, prompt, stream=True)
    eventually(lambda: configured(tower, job))
    holder = as_bytes(tower.state.hget(job_key(job), "holder")).decode().partition(" ")[0]
    run(tower.state, yield_call(5.0, [YieldAsk(job, holder, "others wait")]))
    assert tower.result(job).outputs["text"] == "one two three "
    assert engine.came[prompt] == asked


@pytest.mark.usefixtures("worker")
def test_an_endpoint_that_is_gone_takes_no_work_and_loses_none(tower: Tower, engine: Engine, server: Server) -> None:
    running = order(tower, "wait=0.2 one two three four five six")
    eventually(lambda: engine.running == 1)
    server.stop()
    stopped = time.monotonic()
    eventually(lambda: "cannot connect" in facts(tower).fault)
    assert time.monotonic() - stopped < 2 + BUSY
    assert facts(tower).classes == ()
    waiting = order(tower, "later")
    eventually(lambda: tower.waiting() == 2)  # the one that ran has come back, and neither is taken
    server.start()
    assert tower.result(waiting).outputs["text"] == "later "
    assert tower.result(running).outputs["text"] == "one two three four five six "
    eventually(lambda: not facts(tower).fault)


@pytest.mark.usefixtures("worker")
def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_says(tower: Tower, engine: Engine) -> None:
    engine.script, engine.retry_after = "status=429", "2"
    began = time.monotonic()
    job = order(tower, "at last")
    eventually(lambda: engine.chats)
    eventually(lambda: (known := facts(tower).endpoint) is not None and 0 < known.pause <= 2)
    eventually(lambda: facts(tower).blocked > 0)
    assert facts(tower).fault == ""
    engine.script = ""
    assert tower.result(job).outputs["text"] == "at last "
    assert time.monotonic() - began > 1.8
    assert len(engine.chats) == 2


@pytest.mark.usefixtures("worker")
def test_an_engine_that_loads_its_model_serves_soon_after_and_no_attempt_is_counted(
    tower: Tower, engine: Engine
) -> None:
    engine.script = "status=503 Loading model"
    job = order(tower, "loaded")
    eventually(lambda: "Loading model" in facts(tower).fault)
    eventually(lambda: len(engine.chats) > 3)  # more often than a job may be attempted
    engine.script = ""
    began = time.monotonic()
    assert tower.result(job).outputs["text"] == "loaded "
    assert time.monotonic() - began < 2 + BUSY


@pytest.mark.usefixtures("worker")
def test_an_edited_endpoint_is_used_without_a_restart_and_what_runs_ends_where_it_began(
    tower: Tower, engine: Engine, fleet: Settings
) -> None:
    written = fleet.queues.read_text()
    running = [order(tower, f"wait=1 {n} two three four five six") for n in range(4)]
    eventually(lambda: engine.running == 4)
    other = Engine(models=["renamed"])
    with serving(other):
        moved = written.replace(engine.url, other.url).replace('"slots": 4', '"slots": 2').replace("served", "renamed")
        fleet.queues.write_text(moved.replace('"X-Team": "lab"', '"X-Team": "field"'))
        jobs = [order(tower, f"wait=0.1 {n} here") for n in range(6)]
        assert [tower.result(job).outputs["text"] for job in jobs] == [f"{n} here " for n in range(6)]
        assert [tower.result(job).outputs["text"] for job in running] == [
            f"{n} two three four five six " for n in range(4)
        ]
        assert (len(engine.chats), len(other.chats), other.most) == (4, 6, 2)
        assert {headers["x-team"] for _, headers, _ in other.asked} == {"field"}
        assert {body["model"] for body in other.chats} == {"renamed"}
        fleet.queues.write_text(written)
        eventually(lambda: tower.result(order(tower, "home again")) and len(engine.chats) > 4)


def test_a_replica_that_leaves_queues_yaml_takes_no_work_until_it_is_back(
    tower: Tower, engine: Engine, fleet: Settings
) -> None:
    alone = fleet.queues.read_text()
    paired = alone.replace(f'"{engine.url}"', f'["http://127.0.0.1:1/v1", "{engine.url}"]').replace(
        '"slots": 4', '"slots": 2'
    )
    fleet.queues.write_text(paired)
    with worker_process(fleet, "--device", "endpoint:1"):
        assert tower.result(order(tower, "second")).outputs["text"] == "second "
        fleet.queues.write_text(alone)
        gone = "no endpoint:1: the class has 1 endpoint(s) in queues.yaml now"
        eventually(lambda: facts(tower).fault == gone)
        job = order(tower, "later")
        fleet.queues.write_text("hardware: wrong")
        fleet.queues.write_text(paired.replace('"slots": 2', '"slots": 2, "addresses": 1'))
        assert tower.result(job).outputs["text"] == "later "


def test_a_draining_worker_finishes_what_ends_in_time_and_requeues_the_rest(
    tower: Tower, engine: Engine, worker: WorkerProcess
) -> None:
    assert tower.result(order(tower, "warm")).outputs["text"] == "warm "
    short, long = (
        order(tower, "wait=0.3 one two"),
        order(tower, "wait=1 one two three four five six seven eight nine ten"),
    )
    eventually(lambda: engine.running == 2)
    worker.process.terminate()
    assert tower.result(short).outputs["text"] == "one two "
    worker.process.wait(60)
    assert tower.waiting() == 1
    assert not tower.state.exists(result_key(long))
    eventually(lambda: len(engine.aborts) == 1)  # the engine sees the end of the connection a little later


def test_an_endpoint_without_its_key_is_an_error_at_the_start(fleet: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KEY")
    ended = program("workers", "--class", "cpu.batch", settings=fleet)
    assert ended.returncode != 0
    assert "ENGINE_KEY: expected the API key of the class's endpoint" in ended.stderr


TARIFF = {CLASS: Tariff(input=0.01, cached=0.001, output=0.1, request=1.0)}


def spending(tower: Tower) -> float:
    """What the tenant spent today, of whose budget the job was expected to take 5 dollars."""
    return float(tower.state.hget("taxiway:spent:today", "lab") or 0)


def placed_with_budget(tower: Tower, job: str) -> None:
    tower.state.hset("taxiway:spent:today", "lab", 5)
    tower.state.hset(job_key(job), mapping={"spent": "taxiway:spent:today", "tenant": "lab", "cost": 5})


@pytest.mark.usefixtures("worker")
def test_a_job_is_billed_by_the_tokens_that_the_engine_counts(tower: Tower, engine: Engine) -> None:
    job = order(tower, "wait=0.3 one two", tariffs=TARIFF)
    placed_with_budget(tower, job)
    report = tower.result(job).report
    assert report.tokens == Tokens(input=3, output=2)
    device_time = report.cost - (1 + 3 * 0.01 + 2 * 0.1)
    assert 0 < device_time < 0.05
    eventually(lambda: spending(tower) == pytest.approx(report.cost))
    done = eventually(lambda: facts(tower).done.get(CLASS))
    assert done.used["talk:1"] == Use(rows=1, input=3, output=2)
    assert sum(done.latency["first"][:-1]) == sum(done.latency["token"][:-1]) == 1
    settled(tower, engine)


def test_no_number_of_a_request_or_of_an_engine_ends_the_worker(
    worker: WorkerProcess, tower: Tower, engine: Engine
) -> None:
    vast, memory = 10**400, rss(worker)
    for limit in ("max_tokens", "max_completion_tokens"):
        with contextlib.suppress(TaxiwayError):
            tower.result(tower.order("talk", a_chat("hi", **{limit: vast}), **VARIANT, level=3))
    with pytest.raises(DeviceFaultError, match="malformed: at most 5 tokens do not end"):
        tower.result(order(tower, "endless", parameters={"max_tokens": 5}))
    assert rss(worker) - memory < 256e6  # a few answers of 16 MiB, in pieces and joined
    most = most_tokens(a_chat("one two"))
    assert most is not None
    engine.usage = {"prompt_tokens": vast, "completion_tokens": 10**15}
    report = tower.result(order(tower, "one two", tariffs=TARIFF, parameters={"max_tokens": 9})).report
    assert report.tokens == Tokens(input=most, output=9)
    assert report.cost == pytest.approx(1 + most * 0.01 + 9 * 0.1, abs=0.05)
    eventually(lambda: CLASS in facts(tower).done)
    eventually(lambda: facts(tower).done[CLASS].used["talk:1"].excess > 10**15)
    engine.usage = {"prompt_tokens": -5, "completion_tokens": -(10**12)}
    assert tower.result(order(tower, "last")).outputs["usage"]["total_tokens"] == 0
    assert worker.process.poll() is None
    settled(tower, engine)


def rss(worker: WorkerProcess) -> int:
    """Bytes that the worker holds in memory."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_a_job_is_not_repeated_more_often_than_its_budget_bears(site: Site) -> None:
    tower, engine = site.tower, site.engine
    jobs = [order(tower, f"one break {runs}", tariffs=TARIFF, runs=runs) for runs in (1, 2)]
    for job in jobs:
        with pytest.raises(DeviceFaultError):
            tower.result(job)
    assert [engine.came[f"one break {runs}"] for runs in (1, 2)] == [1, 2]


@pytest.mark.usefixtures("worker")
def test_a_cancelled_job_is_billed_for_what_came(tower: Tower, engine: Engine) -> None:
    job = order(tower, "one two stall", tariffs=TARIFF)
    placed_with_budget(tower, job)
    eventually(lambda: engine.running == 1)
    eventually(lambda: tower.state.hget(job_key(job), "state") == b"running")
    tower.cancel(job)
    eventually(lambda: 1.2 < spending(tower) < 1.5)  # a request, its prompt of about three tokens, two tokens
    done = eventually(lambda: facts(tower).done.get(CLASS))
    assert done.used["talk:1"].aborted == 1
    settled(tower, engine)


@pytest.mark.usefixtures("worker")
def test_a_limit_that_the_engine_states_keeps_jobs_in_their_queue(tower: Tower, engine: Engine) -> None:
    engine.headers = {"x-ratelimit-limit-requests": "120", "x-ratelimit-remaining-requests": "1"}
    tower.result(order(tower, "first"))  # one more may be sent at once, then two a second
    engine.headers = {}
    began = time.monotonic()
    jobs = [order(tower, f"{n} done") for n in range(12)]
    eventually(lambda: tower.waiting() > 0)
    assert [tower.result(job).outputs["text"] for job in jobs] == [f"{n} done " for n in range(12)]
    assert time.monotonic() - began > 1.0
    allowed = eventually(lambda: (configured := facts(tower).endpoint) and configured.allowed)
    assert allowed.requests == 2.0
    assert len(engine.chats) == 13
    settled(tower, engine)


def test_what_was_learned_of_an_engine_outlives_its_worker(fleet: Settings, tower: Tower, engine: Engine) -> None:
    with worker_process(fleet, "--device", "endpoint:0") as worker:
        for n in range(8):
            tower.result(order(tower, f"wait=0.2 {n} one two three"))
        curve = eventually(lambda: (configured := facts(tower).endpoint) and configured.curves.get("talk:1/engine"))
        assert curve.step + curve.slope == pytest.approx(0.2, rel=0.4)
        worker.process.terminate()
        eventually(lambda: tower.state.exists(learned_key(engine.url)))
    with worker_process(fleet, "--device", "endpoint:0"):
        again = eventually(lambda: (configured := facts(tower).endpoint) and configured.curves.get("talk:1/engine"))
    assert again.step + again.slope == pytest.approx(0.2, rel=0.4)
