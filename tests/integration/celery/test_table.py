"""What docs/celery.md states and no other test shows: plain Celery before a real router and worker."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from celery import Celery, chain, chord, group
from celery.result import AsyncResult
from kombu import Connection

from broker.port import DeadLetter
from tasks.settings import TREE, Settings
from taxiway.contract.keys import DEAD, DEFAULT_QUEUE, INFER
from tests.narrowing import present
from tests.producing import infer, payload
from tests.routing import eventually, router_process
from tests.working import LASTING, LONG, Site, Tower, WorkerProcess, inspect, release


@pytest.fixture(scope="module")
def router(lasting_site: Site) -> Iterator[None]:
    with router_process(lasting_site.fleet):
        yield


@pytest.fixture
def fleet(site: Site) -> Settings:
    """The one that `producer` writes to."""
    return site.fleet


@pytest.fixture(autouse=True)
def served(site: Site, router: None) -> WorkerProcess:
    """The worker of a fleet whose router places what arrives."""
    return site.worker


def running(producer: Celery, worker: WorkerProcess, inputs: Any = LASTING) -> AsyncResult[Any]:
    """A lasting job that `inspect active` shows."""
    sent = infer(producer, inputs, "slab").apply_async()
    inspection = inspect(producer, worker)
    eventually(lambda: sent.id in [task["id"] for task in (inspection.active() or {}).get(worker.name, ())])
    return sent


def next_of(connection: Connection, name: str) -> Any:
    """The next message of a queue, acknowledged."""
    with connection.SimpleQueue(name) as queue:
        message = queue.get(timeout=60)
        message.ack()
    return message


def state_of(answer: AsyncResult[Any]) -> str:
    return answer.state


def test_a_result_stays_pending_until_it_is_there_and_is_stored_whether_or_not_it_is_ignored(
    fleet: Settings, served: WorkerProcess, producer: Celery
) -> None:
    busy = running(producer, served)
    assert state_of(busy) == "PENDING"
    release(fleet)
    ignored = infer(producer, "kept").apply_async(ignore_result=True)
    assert busy.get(timeout=60)["model"] == "slab:1"
    assert state_of(busy) == "SUCCESS"
    assert payload(producer.AsyncResult(ignored.id)) == "kept"


def test_chains_groups_and_chords_of_infer_signatures_run(producer: Celery) -> None:
    assert payload(chain(infer(producer, "first"), infer(producer, "second")).apply_async()) == "second"
    answers = group(infer(producer, n) for n in range(3)).apply_async().get(timeout=60)
    assert [answer["outputs"]["payload"] for answer in answers] == [0, 1, 2]
    header = [infer(producer, n) for n in range(3)]
    assert payload(chord(header, body=infer(producer, "all ended")).apply_async()) == "all ended"


def test_links_receive_the_answer_and_error_links_are_called(producer: Celery) -> None:
    linked, failed = (producer.signature(f"lab.{name}", queue=f"lab.{name}") for name in ("linked", "failed"))
    with producer.connection_for_write() as connection:
        for queue in ("lab.linked", "lab.failed"):
            with connection.SimpleQueue(queue) as left:
                left.clear()
        assert payload(infer(producer, "hello").apply_async(link=linked)) == "hello"
        with pytest.raises(Exception, match="division by zero"):
            infer(producer, {"samples": [0], "seed": [1]}, "slab").apply_async(link_error=failed).get(timeout=60)
        answer, error = next_of(connection, "lab.linked"), next_of(connection, "lab.failed")
    assert answer.payload[0][0]["outputs"] == {"payload": "hello"}
    assert error.headers["task"] == "lab.failed"


@pytest.mark.parametrize("options", [{"serializer": "klingon"}, {"countdown": "soon"}])
def test_an_error_link_that_cannot_be_sent_is_given_up(
    fleet: Settings, producer: Celery, options: dict[str, Any]
) -> None:
    failed = producer.signature("lab.failed", queue="lab.failed", **options)
    sent = infer(producer, {"samples": [0], "seed": [1]}, "slab").apply_async(link_error=failed)
    with pytest.raises(Exception, match="division by zero"):
        sent.get(timeout=60)
    with Tower(fleet) as tower:
        letter = msgspec.json.decode(eventually(lambda: tower.state.lindex(DEAD, 0)), type=DeadLetter)
    assert "what follows from the task could not be sent" in letter.reason
    assert letter.job == sent.id
    assert payload(infer(producer, "next").apply_async()) == "next"


def test_a_job_past_its_expires_fails_and_does_not_run(served: WorkerProcess, producer: Celery) -> None:
    running(producer, served)
    expired = infer(producer, LONG, "slab").apply_async(expires=0.3)
    with pytest.raises(Exception, match="deadline of"):
        expired.get(timeout=60)
    assert (expired.state, type(expired.result).__name__) == ("FAILURE", "DeadlineExceededError")


def test_what_follows_a_job_fails_with_it_when_its_deadline_passes(producer: Celery) -> None:
    assert payload(infer(producer, "ready").apply_async()) == "ready"
    late = infer(producer, LASTING, "slab").set(expires=1)
    for canvas in (
        chain(late.clone(), infer(producer, "second")),
        chord([infer(producer, "in time"), late.clone()], body=infer(producer, "all ended")),
    ):
        follows = canvas.apply_async().id  # by its id alone, or Celery looks at the states of what comes before it
        with pytest.raises(Exception, match="deadline of"):
            AsyncResult(follows, app=producer).get(timeout=60)
    with producer.connection_for_write() as connection:
        with connection.SimpleQueue("lab.late") as left:
            left.clear()
        late.clone().apply_async(link_error=producer.signature("lab.late", queue="lab.late"))
        assert next_of(connection, "lab.late").headers["task"] == "lab.late"


def test_what_follows_a_refused_request_fails_with_its_error(producer: Celery) -> None:
    refused, after = infer(producer, "first", "ehco"), infer(producer, "second")
    for canvas in (
        chain(refused.clone(), after.clone(), after.clone()),
        chain(refused.clone(), chord([after.clone(), after.clone()], body=after.clone())),
        chord([after.clone(), refused.clone()], body=after.clone()),
    ):
        follows = canvas.apply_async().id  # by its id alone, or Celery looks at the states of what comes before it
        with pytest.raises(Exception, match="unknown model 'ehco'"):
            AsyncResult(follows, app=producer).get(timeout=60)
    assert payload(infer(producer, "next").apply_async()) == "next"


def test_links_that_name_NoQueue_are_sent_to_celerys_default_queue(producer: Celery) -> None:
    with producer.connection_for_write() as connection:
        with connection.SimpleQueue(DEFAULT_QUEUE) as left:
            left.clear()
        infer(producer, "hello").apply_async(link=producer.signature("lab.linked"))
        assert next_of(connection, DEFAULT_QUEUE).headers["task"] == "lab.linked"
        for model in ("slab", "ehco"):  # one fails on its worker, and one is refused by the router
            failing = infer(producer, {"samples": [0], "seed": [1]}, model)
            failing.apply_async(link_error=producer.signature(f"lab.{model}"))
            assert next_of(connection, DEFAULT_QUEUE).headers["task"] == f"lab.{model}"


def test_an_error_link_whose_queue_is_not_there_or_not_ours_holds_up_nothing(producer: Celery) -> None:
    for queue in ("lab.nowhere.declared", DEAD):
        sent = infer(producer, "first", "ehco").apply_async(link_error=producer.signature("lab.lost", queue=queue))
        with pytest.raises(Exception, match="unknown model 'ehco'"):
            sent.get(timeout=30)
    assert payload(infer(producer, "next").apply_async()) == "next"


def test_a_chord_fails_when_a_job_in_its_header_is_revoked(served: WorkerProcess, producer: Celery) -> None:
    header = [infer(producer, "first"), infer(producer, LASTING, "slab")]
    collected = chord(header, body=infer(producer, "all ended")).apply_async()
    inspection, parts = inspect(producer, served), cast(Any, collected.parent).results
    revoked: AsyncResult[Any] = parts[1]
    eventually(lambda: revoked.id in [task["id"] for task in inspection.active()[served.name]])
    revoked.revoke(terminate=True)
    with pytest.raises(Exception, match="TaskRevokedError"):
        AsyncResult(collected.id, app=producer).get(timeout=60)


@pytest.mark.parametrize("terminate", [False, True])
def test_revoke_ends_a_job_that_waits_and_with_terminate_one_that_runs(
    fleet: Settings, served: WorkerProcess, producer: Celery, terminate: bool
) -> None:
    busy = running(producer, served)
    revoked = busy if terminate else infer(producer, LONG, "slab").apply_async()
    inspection = inspect(producer, served)
    eventually(lambda: terminate or inspection.reserved()[served.name])
    revoked.revoke(terminate=terminate)
    if not terminate:  # it ends once it would run
        eventually(lambda: revoked.id in inspection.revoked()[served.name])
        release(fleet)
    eventually(lambda: state_of(revoked) == "REVOKED")
    assert payload(infer(producer, "next").apply_async()) == "next"


def test_task_time_limits_rate_limits_and_pool_commands_change_nothing(served: WorkerProcess, producer: Celery) -> None:
    control = producer.control
    assert control.rate_limit(INFER, "1/h", reply=True, timeout=60, destination=[served.name])
    for command in (control.pool_grow, control.pool_shrink):
        assert served.name in present(command(1, reply=True, timeout=60, destination=[served.name]))[0]
    (scaled,) = present(control.autoscale(2, 1, reply=True, timeout=60, destination=[served.name]))
    assert "error" in scaled[served.name]
    limited = infer(producer, LONG, "slab").apply_async(time_limit=0.2, soft_time_limit=0.1)
    assert limited.get(timeout=60)["model"] == "slab:1"
    assert [payload(infer(producer, n).apply_async()) for n in range(3)] == [0, 1, 2]


def test_a_failure_of_the_model_is_final_whatever_the_retry_policy(served: WorkerProcess, producer: Celery) -> None:
    def runs() -> int:
        return int(inspect(producer, served).stats()[served.name]["total"].get(INFER, 0))

    before = runs()
    failing = infer(producer, {"samples": [0], "seed": [1]}, "slab").apply_async(retry=True)
    with pytest.raises(Exception, match="division by zero"):
        failing.get(timeout=60)
    assert runs() == before + 1


@contextmanager
def celery_process(folder: Path, module: str, source: str, *words: str, **variables: str) -> Iterator[None]:
    """`celery -A module words` over a module of this source; stopped at the end."""
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "celery", "-A", module, *words]
    environment = os.environ | variables | {"PYTHONPATH": f"{folder}:{TREE}"}
    log = folder / f"{module}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


def test_beat_submits_jobs_on_its_schedule(fleet: Settings, producer: Celery, tmp_path: Path) -> None:
    source = f"""
        from celery import Celery

        app = Celery(broker={fleet.broker!r}, backend={fleet.broker!r})
        request = {{"model": "echo", "inputs": "scheduled"}}
        options = {{"queue": "taxiway.arrivals", "task_id": "nightly"}}
        app.conf.beat_schedule = {{
            "nightly": {{"task": "taxiway.infer", "schedule": 1.0, "kwargs": request, "options": options}}
        }}
    """
    with celery_process(tmp_path, "nightly", source, "beat", "--schedule", str(tmp_path / "schedule")):
        assert payload(producer.AsyncResult("nightly")) == "scheduled"
