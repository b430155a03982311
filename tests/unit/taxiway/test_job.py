from typing import Any

import msgspec
import pytest
from hypothesis import given

from taxiway.contract import job
from taxiway.contract.values import to_wire
from taxiway.errors import ExecutionError, JobCancelledError, TaxiwayError
from tests.builders import a_result
from tests.unit.strategies import json_values

RESULT = a_result("sentiment:1", label=["a", b"\xff"])


def stored(result: job.Result) -> bytes:
    return job.success_meta("job-1", msgspec.structs.replace(result, outputs=to_wire(result.outputs)))


@pytest.mark.cases("kind, state, celery")
def test_an_error_ends_its_job_and_comes_back_as_itself(kind: type[TaxiwayError], state: str, celery: str) -> None:
    error = kind("text: expected text", field="text", message="kept")
    assert job.state_of(error) == state
    assert state in job.FINAL
    meta = job.read_meta(job.failure_meta("job-1", error))
    assert meta.status == celery
    with pytest.raises(kind, match="text: expected text") as caught:
        job.read_result(meta)
    assert caught.value.details == {"field": "text", "message": "kept"}


def test_every_state_has_its_word_in_celery() -> None:
    assert set(job.CELERY_STATUS) == set(job.JobState)


def test_a_result_is_read_as_it_was_written() -> None:
    assert job.read_result(job.read_meta(stored(RESULT))) == RESULT


@pytest.mark.parametrize(
    ("status", "result", "kind", "text"),
    [
        ("FAILURE", {"exc_type": "KeyError", "exc_message": ["a"]}, ExecutionError, "KeyError: a"),
        ("REVOKED", {"exc_message": ["revoked"]}, JobCancelledError, "revoked"),
    ],
)
def test_celerys_own_errors_are_ours(status: str, result: dict[str, Any], kind: type[TaxiwayError], text: str) -> None:
    with pytest.raises(kind, match=text):
        job.read_result(job.read_meta(msgspec.json.encode({"task_id": "j", "status": status, "result": result})))


@given(result=json_values)
def test_any_stored_result_is_an_answer_or_an_error_of_ours(result: Any) -> None:
    for status in ("SUCCESS", "FAILURE", "REVOKED"):
        raw = msgspec.json.encode({"task_id": "j", "status": status, "result": result})
        try:
            assert isinstance(job.read_result(job.read_meta(raw)), job.Result)
        except TaxiwayError as error:
            assert error.message


def test_a_record_is_read_from_the_stores_text_and_without_one_a_job_is_accepted() -> None:
    assert job.record_from("job-1", {}) == job.JobRecord(id="job-1", state=job.JobState.ACCEPTED)
    fields = {"state": "running", "level": "2", "attempts": "1", "accepted": "1732.5", "cell": "cpu|2", "work": "0.1"}
    assert job.record_from("job-1", fields) == job.JobRecord(
        id="job-1", state=job.JobState.RUNNING, level=2, attempts=1, accepted=1732.5
    )
