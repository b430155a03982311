"""Messages that were given up: who parks them, with what history, and what an operator does with them."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
import redis
from click.testing import CliRunner

from broker.port import DeadLetter, Holder
from broker.valkey.claims import Verdict, release_call, start_call
from broker.valkey.endings import Ending
from broker.valkey.worker_store import WorkerStore
from local.embedded import EmbeddedValkey
from tasks.settings import Settings, settings_from
from tasks.topology import Limits
from taxiway.cli import main
from taxiway.contract.job import JobState, failure_meta, read_meta, read_result
from taxiway.contract.keys import DEAD, result_key
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from taxiway.errors import DeadLetteredError
from tests.routing import EchoDevice, RouterProcess, eventually, router_process
from tests.scripting import Store, is_held, placed
from workers.stages.held import add_dead_letter


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with redis.Redis.from_url(settings.broker) as client:
        yield Store(client)


def lose(store: Store, worker: str, job: str, *, ran: bool) -> None:
    """A worker claims the job, runs it or not, and ends without a word."""
    [claim] = store.claim(worker, job, lease=0.02)
    assert claim.verdict is Verdict.RUN
    if ran:
        store.run(start_call("cpu:0", [(job, claim.token, 1.0)]))
    eventually(lambda: not is_held(store.client, job))


def test_a_dead_letter_names_the_workers_that_died_holding_its_job(settings: Settings, store: Store) -> None:
    began = store.client.time()[0]
    store.forward(placed("j"))
    lose(store, "a@host", "j", ran=True)
    lose(store, "b@host", "j", ran=False)
    [last] = store.claim("c@host", "j")
    worker = WorkerStore(settings.broker, "c@host", Limits())
    history = worker.history("j")
    assert [(holder.worker, holder.ran) for holder in history] == [("a@host", True), ("b@host", True)]
    assert began - 1 <= history[0].since <= history[1].since
    assert (last.attempts, last.blamed) == (1, 1)  # the second may have held other jobs
    add_dead_letter(worker, b"message", "given up", "j")
    [letter] = store.client.lrange(DEAD, 0, -1)
    assert json.loads(letter)["history"][0]["worker"] == "a@host"


def test_a_worker_that_gave_the_job_back_is_not_in_its_history(settings: Settings, store: Store) -> None:
    store.forward(placed("j"))
    [claim] = store.claim("a@host", "j")
    store.run(start_call("cpu:0", [("j", claim.token, 1.0)]))
    store.run(release_call([("j", claim.token)]))
    [again] = store.claim("b@host", "j")
    assert (again.attempts, again.blamed) == (0, 0)
    assert WorkerStore(settings.broker, "b@host", Limits()).history("j") == ()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, RouterProcess]]:
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedValkey(tmp_path_factory.mktemp("dead")))
        settings = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        router = stack.enter_context(router_process(settings))
        stack.enter_context(EchoDevice(settings))
        yield settings, router


@pytest.fixture
def state(fleet: tuple[Settings, RouterProcess]) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(fleet[0].broker) as client:
        yield client
        client.delete(DEAD)


def run(fleet: tuple[Settings, RouterProcess], *arguments: str, code: int = 0) -> str:
    """What `taxiway dead` prints."""
    answer = CliRunner().invoke(main, ["dead", *arguments, "--url", fleet[1].http])
    assert answer.exit_code == code, answer.output
    return answer.output


def park(fleet: tuple[Settings, RouterProcess], *, ending: JobState = JobState.DEAD) -> str:
    """A job that ended so, and its message among the dead letters."""
    settings, _ = fleet
    job = str(uuid.uuid4())
    message = infer_message(job, Request(model="echo", inputs="hello", deadline=30), reply="", origin="test")
    worker = WorkerStore(settings.broker, "a@host", Limits())
    error = DeadLetteredError("given up after 3 attempts that ended without an answer")
    worker.finish([Ending(job, ending, failure_meta(job, error))])
    history = (Holder("a@host", 1.0, True), Holder("b@host", 2.0, False))
    worker.add_dead_letter(DeadLetter(error.message, 1e9, message, by="c@host", job=job, history=history))
    return job


def test_a_letter_is_listed_shown_and_dropped(fleet: tuple[Settings, RouterProcess], state: redis.Redis) -> None:
    job = park(fleet)
    [listed] = json.loads(run(fleet, "list", "--json"))
    assert (listed["job"], listed["by"], len(listed["history"])) == (job, "c@host", 2)
    assert listed["id"] in run(fleet, "list")
    shown = json.loads(run(fleet, "show", listed["id"], "--json"))
    assert shown["headers"]["id"] == job
    assert json.loads(shown["body"])[1]["inputs"] == "hello"
    assert "b@host" in run(fleet, "show", listed["id"])
    run(fleet, "drop", listed["id"])
    assert state.llen(DEAD) == 0
    assert "no dead letter" in run(fleet, "show", listed["id"], code=2)


def test_a_replayed_job_starts_over_under_its_id(fleet: tuple[Settings, RouterProcess], state: redis.Redis) -> None:
    job = park(fleet)
    [listed] = json.loads(run(fleet, "list", "--json"))
    assert run(fleet, "replay", listed["id"]).strip() == job
    result = eventually(lambda: state.get(result_key(job)))
    assert read_result(read_meta(result)).outputs == {"payload": "hello"}
    assert state.llen(DEAD) == 0


def test_of_several_letters_those_that_can_be_are_replayed_or_dropped(
    fleet: tuple[Settings, RouterProcess], state: redis.Redis
) -> None:
    job = park(fleet)
    [listed] = json.loads(run(fleet, "list", "--json"))
    said = run(fleet, "replay", "lost", listed["id"], "gone", code=2)
    assert job in said
    assert "no dead letter 'lost'" in said
    assert "no dead letter 'gone'\nhint: `taxiway dead list` lists them" in said
    park(fleet)
    [listed] = json.loads(run(fleet, "list", "--json"))
    assert "no dead letter 'lost'" in run(fleet, "drop", "lost", listed["id"], code=2)
    assert state.llen(DEAD) == 0


def test_a_job_that_ended_otherwise_is_not_replayed(fleet: tuple[Settings, RouterProcess], state: redis.Redis) -> None:
    job = park(fleet, ending=JobState.FAILED)
    before = state.get(result_key(job))
    [listed] = json.loads(run(fleet, "list", "--json"))
    assert "was not dead-lettered" in run(fleet, "replay", listed["id"], code=2)
    assert state.get(result_key(job)) == before
    assert state.llen(DEAD) == 1


def test_what_cannot_be_read_is_shown_and_not_replayed(
    fleet: tuple[Settings, RouterProcess], state: redis.Redis
) -> None:
    WorkerStore(fleet[0].broker, "a@host", Limits()).add_dead_letter(DeadLetter("not ours", 1e9, b"\xffgarbage"))
    with httpx.Client(base_url=fleet[1].http, trust_env=False) as http:
        [listed] = http.get("/v2/dead").json()["letters"]
        assert "garbage" in http.get(f"/v2/dead/{listed['id']}").json()["body"]
        refused = http.post(f"/v2/dead/{listed['id']}/replay")
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
        assert http.get("/v2/dead", params={"most": 0}).status_code == 400
    assert state.llen(DEAD) == 1
