from typing import Any

import msgspec
import pytest
from celery import Celery
from celery.backends.base import Backend
from hypothesis import given

from taxiway import errors
from taxiway.contract import job
from taxiway.contract.values import to_wire
from taxiway.errors import ExecutionError, InvalidRequestError, JobCancelledError, TaxiwayError
from tests.builders import a_result
from tests.unit.strategies import json_values

RESULT = a_result("sentiment:1", label=["a", b"\xff"])


def stored(result: job.Result) -> bytes:
    return job.success_meta("job-1", msgspec.structs.replace(result, outputs=to_wire(result.outputs)))


@pytest.fixture(scope="module")
def backend() -> Backend:
    """Celery's own reader of results, as a plain producer has it."""
    return Celery("plain", broker="memory://", backend="cache+memory://", set_as_current=False).backend


@pytest.mark.parametrize(
    ("error", "state", "celery"),
    [
        (errors.ExecutionError("no"), job.JobState.FAILED, "FAILURE"),
        (errors.InvalidRequestError("no"), job.JobState.FAILED, "FAILURE"),
        (errors.DeadlineExceededError("no"), job.JobState.EXPIRED, "FAILURE"),
        (errors.DeadLetteredError("no"), job.JobState.DEAD, "FAILURE"),
        (errors.JobCancelledError("no"), job.JobState.CANCELLED, "REVOKED"),
    ],
)
def test_an_error_ends_a_job_in_its_state(error: TaxiwayError, state: job.JobState, celery: str) -> None:
    assert job.state_of(error) is state
    assert state in job.FINAL
    assert job.read_meta(job.failure_meta("job-1", error)).status == celery


def test_every_state_has_its_word_in_celery() -> None:
    assert set(job.CELERY_STATUS) == set(job.JobState)


def test_a_result_is_read_as_it_was_written() -> None:
    assert job.read_result(job.read_meta(stored(RESULT))) == RESULT


def test_celery_reads_a_result_as_success(backend: Backend) -> None:
    meta = backend.decode_result(stored(RESULT))
    assert meta["status"] == "SUCCESS"
    assert meta["result"]["outputs"] == {"label": ["a", b"\xff"]}
    assert meta["task_id"] == "job-1"


@pytest.mark.parametrize("kind", [errors.InvalidRequestError, errors.DeadlineExceededError, errors.JobCancelledError])
def test_an_error_comes_back_as_itself_with_its_details(kind: type[TaxiwayError]) -> None:
    meta = job.read_meta(job.failure_meta("job-1", kind("text: expected text", field="text", message="kept")))
    with pytest.raises(kind, match="text: expected text") as caught:
        job.read_result(meta)
    assert caught.value.details == {"field": "text", "message": "kept"}


def test_celery_raises_the_error_itself_where_taxiway_is_installed(backend: Backend) -> None:
    meta = backend.meta_from_decoded(backend.decode(job.failure_meta("job-1", InvalidRequestError("no such field"))))
    assert isinstance(meta["result"], InvalidRequestError)
    assert str(meta["result"]) == "no such field"


def test_a_foreign_error_is_an_execution_error() -> None:
    meta = job.read_meta(
        b'{"task_id": "j", "status": "FAILURE", "result": {"exc_type": "KeyError", "exc_message": ["a"]}}'
    )
    with pytest.raises(ExecutionError, match="KeyError: a"):
        job.read_result(meta)


def test_celerys_own_revocation_is_a_cancelled_job() -> None:
    with pytest.raises(JobCancelledError, match="revoked"):
        job.read_result(job.read_meta(b'{"task_id": "j", "status": "REVOKED", "result": {"exc_message": ["revoked"]}}'))


@given(result=json_values)
def test_any_stored_result_is_an_answer_or_an_error_of_ours(result: Any) -> None:
    for status in ("SUCCESS", "FAILURE", "REVOKED"):
        raw = msgspec.json.encode({"task_id": "j", "status": status, "result": result})
        try:
            assert isinstance(job.read_result(job.read_meta(raw)), job.Result)
        except TaxiwayError as error:
            assert error.message


def test_a_record_is_read_from_the_stores_text() -> None:
    fields = {"state": "running", "level": "2", "attempts": "1", "accepted": "1732.5", "cell": "cpu|2", "work": "0.1"}
    assert job.record_from("job-1", fields) == job.JobRecord(
        id="job-1", state=job.JobState.RUNNING, level=2, attempts=1, accepted=1732.5
    )


def test_a_job_without_a_record_is_accepted_and_not_placed() -> None:
    assert job.record_from("job-1", {}) == job.JobRecord(id="job-1", state=job.JobState.ACCEPTED)
