"""Messages that were given up: who parks them, with what history, and what an operator does with them."""

import json
import uuid
from collections.abc import Iterator

import pytest
import redis

from broker.port import DeadLetter, Holder
from broker.valkey.jobs import Ending, Verdict
from broker.valkey.worker_store import WorkerStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.job import JobState, failure_meta, read_meta, read_result
from taxiway.contract.keys import DEAD, result_key
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from taxiway.errors import DeadLetteredError
from tests.command_line import CommandLine
from tests.routing import EchoFleet, eventually
from tests.scripting import Store, is_held, placed
from workers.stages.held import add_dead_letter


def lose(scripts: Store, worker: str, job: str, *, ran: bool) -> None:
    """A worker claims the job, runs it or not, and ends without a word."""
    [claim] = scripts.claim(worker, job, lease=0.02)
    assert claim.verdict is Verdict.RUN
    if ran:
        scripts.start((job, claim.token, 1.0))
    eventually(lambda: not is_held(scripts.client, job))


def test_a_dead_letter_names_the_workers_that_died_holding_its_job(settings: Settings, scripts: Store) -> None:
    began = scripts.client.time()[0]
    scripts.forward(placed("j"))
    lose(scripts, "a@host", "j", ran=True)
    lose(scripts, "b@host", "j", ran=False)
    [last] = scripts.claim("c@host", "j")
    worker = WorkerStore(settings.broker, "c@host", Limits())
    history = worker.history("j")
    assert [(holder.worker, holder.ran) for holder in history] == [("a@host", True), ("b@host", True)]
    assert began - 1 <= history[0].since <= history[1].since
    assert (last.attempts, last.blamed) == (1, 1)  # the second may have held other jobs
    add_dead_letter(worker, b"message", "given up", "j")
    [letter] = scripts.client.lrange(DEAD, 0, -1)
    assert json.loads(letter)["history"][0]["worker"] == "a@host"


def test_a_worker_that_gave_the_job_back_is_not_in_its_history(settings: Settings, scripts: Store) -> None:
    scripts.forward(placed("j"))
    [claim] = scripts.claim("a@host", "j")
    scripts.start(("j", claim.token, 1.0))
    scripts.release(("j", claim.token))
    [again] = scripts.claim("b@host", "j")
    assert (again.attempts, again.blamed) == (0, 0)
    assert WorkerStore(settings.broker, "b@host", Limits()).history("j") == ()


@pytest.fixture
def letters(state: redis.Redis) -> Iterator[redis.Redis]:
    """The store of `echo`, without dead letters before and after."""
    yield state
    state.delete(DEAD)


def run(echo: EchoFleet, *arguments: str, code: int = 0) -> str:
    """What `taxiway dead` prints."""
    answer = CommandLine()("dead", *arguments, "--url", echo.router.http)
    assert answer.exit_code == code, answer.output
    return answer.output


def park(echo: EchoFleet, *, ending: JobState = JobState.DEAD) -> str:
    """A job that ended so, and its message among the dead letters."""
    job = str(uuid.uuid4())
    message = infer_message(job, Request(model="echo", inputs="hello", deadline=30), reply="", origin="test")
    worker = WorkerStore(echo.settings.broker, "a@host", Limits())
    error = DeadLetteredError("given up after 3 attempts that ended without an answer")
    worker.finish([Ending(job, ending, failure_meta(job, error))])
    history = (Holder("a@host", 1.0, True), Holder("b@host", 2.0, False))
    worker.add_dead_letter(DeadLetter(error.message, 1e9, message, by="c@host", job=job, history=history))
    return job


def test_a_letter_is_listed_shown_and_dropped(echo: EchoFleet, letters: redis.Redis) -> None:
    job = park(echo)
    [listed] = json.loads(run(echo, "list", "--json"))
    assert (listed["job"], listed["by"], len(listed["history"])) == (job, "c@host", 2)
    assert listed["id"] in run(echo, "list")
    shown = json.loads(run(echo, "show", listed["id"], "--json"))
    assert shown["headers"]["id"] == job
    assert json.loads(shown["body"])[1]["inputs"] == "hello"
    assert "b@host" in run(echo, "show", listed["id"])
    run(echo, "drop", listed["id"])
    assert letters.llen(DEAD) == 0
    assert "no dead letter" in run(echo, "show", listed["id"], code=2)


def test_of_several_letters_those_that_can_be_are_replayed_under_their_ids_or_dropped(
    echo: EchoFleet, letters: redis.Redis
) -> None:
    job = park(echo)
    [listed] = json.loads(run(echo, "list", "--json"))
    said = run(echo, "replay", "lost", listed["id"], "gone", code=2)
    assert job in said
    assert "no dead letter 'lost'" in said
    assert "no dead letter 'gone'\nhint: `taxiway dead list` lists them" in said
    result = eventually(lambda: letters.get(result_key(job)))
    assert read_result(read_meta(result)).outputs == {"payload": "hello"}
    park(echo)
    [listed] = json.loads(run(echo, "list", "--json"))
    assert "no dead letter 'lost'" in run(echo, "drop", "lost", listed["id"], code=2)
    assert letters.llen(DEAD) == 0


def test_a_job_that_ended_otherwise_is_not_replayed(echo: EchoFleet, letters: redis.Redis) -> None:
    job = park(echo, ending=JobState.FAILED)
    before = letters.get(result_key(job))
    [listed] = json.loads(run(echo, "list", "--json"))
    assert "was not dead-lettered" in run(echo, "replay", listed["id"], code=2)
    assert letters.get(result_key(job)) == before
    assert letters.llen(DEAD) == 1


def test_what_cannot_be_read_is_shown_and_not_replayed(echo: EchoFleet, letters: redis.Redis) -> None:
    WorkerStore(echo.settings.broker, "a@host", Limits()).add_dead_letter(DeadLetter("not ours", 1e9, b"\xffgarbage"))
    [listed] = echo.http.get("/v2/dead").json()["letters"]
    assert "garbage" in echo.http.get(f"/v2/dead/{listed['id']}").json()["body"]
    refused = echo.http.post(f"/v2/dead/{listed['id']}/replay")
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
    assert echo.http.get("/v2/dead", params={"most": 0}).status_code == 400
    assert letters.llen(DEAD) == 1
