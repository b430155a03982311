from __future__ import annotations

from typing import Any

import msgspec
import pytest
from celery import Celery
from celery.backends.base import Backend
from hypothesis import given

from taxiway import errors
from taxiway.contract.job import (
    CELERY_STATUS,
    FINAL,
    JobRecord,
    JobState,
    Result,
    RunReport,
    failure_meta,
    read_meta,
    read_result,
    record_from,
    state_of,
    success_meta,
)
from taxiway.contract.values import to_wire
from taxiway.errors import ExecutionError, InvalidRequestError, JobCancelledError, TaxiwayError
from tests.unit.strategies import json_values

REPORT = RunReport(
    hardware_class="cpu.batch",
    variant="onnx-int8",
    device="cpu:0",
    emulated=False,
    batch=4,
    queue_wait=0.01,
    run_time=0.02,
    cost=1e-6,
    reason="cheapest",
)
RESULT = Result(model="sentiment:1", outputs={"label": ["a", b"\xff"]}, report=REPORT)


def stored(result: Result) -> bytes:
    return success_meta("job-1", msgspec.structs.replace(result, outputs=to_wire(result.outputs)))


@pytest.fixture(scope="module")
def backend() -> Backend:
    """Celery's own reader of results, as a plain producer has it."""
    return Celery("plain", broker="memory://", backend="cache+memory://", set_as_current=False).backend


@pytest.mark.parametrize(
    ("error", "state", "celery"),
    [
        (errors.ExecutionError("no"), JobState.FAILED, "FAILURE"),
        (errors.InvalidRequestError("no"), JobState.FAILED, "FAILURE"),
        (errors.DeadlineExceededError("no"), JobState.EXPIRED, "FAILURE"),
        (errors.DeadLetteredError("no"), JobState.DEAD, "FAILURE"),
        (errors.JobCancelledError("no"), JobState.CANCELLED, "REVOKED"),
    ],
)
def test_an_error_ends_a_job_in_its_state(error: TaxiwayError, state: JobState, celery: str) -> None:
    assert state_of(error) is state
    assert state in FINAL
    assert read_meta(failure_meta("job-1", error)).status == celery


def test_every_state_has_its_word_in_celery() -> None:
    assert set(CELERY_STATUS) == set(JobState)


def test_a_result_is_read_as_it_was_written() -> None:
    assert read_result(read_meta(stored(RESULT))) == RESULT


def test_celery_reads_a_result_as_success(backend: Backend) -> None:
    meta = backend.decode_result(stored(RESULT))
    assert meta["status"] == "SUCCESS"
    assert meta["result"]["outputs"] == {"label": ["a", b"\xff"]}
    assert meta["task_id"] == "job-1"


@pytest.mark.parametrize("kind", [errors.InvalidRequestError, errors.DeadlineExceededError, errors.JobCancelledError])
def test_an_error_comes_back_as_itself_with_its_details(kind: type[TaxiwayError]) -> None:
    meta = read_meta(failure_meta("job-1", kind("text: expected text", field="text", message="kept")))
    with pytest.raises(kind, match="text: expected text") as caught:
        read_result(meta)
    assert caught.value.details == {"field": "text", "message": "kept"}


def test_celery_raises_the_error_itself_where_taxiway_is_installed(backend: Backend) -> None:
    meta = backend.meta_from_decoded(backend.decode(failure_meta("job-1", InvalidRequestError("no such field"))))
    assert isinstance(meta["result"], InvalidRequestError)
    assert str(meta["result"]) == "no such field"


def test_a_foreign_error_is_an_execution_error() -> None:
    meta = read_meta(b'{"task_id": "j", "status": "FAILURE", "result": {"exc_type": "KeyError", "exc_message": ["a"]}}')
    with pytest.raises(ExecutionError, match="KeyError: a"):
        read_result(meta)


def test_celerys_own_revocation_is_a_cancelled_job() -> None:
    with pytest.raises(JobCancelledError, match="revoked"):
        read_result(read_meta(b'{"task_id": "j", "status": "REVOKED", "result": {"exc_message": ["revoked"]}}'))


@given(result=json_values)
def test_any_stored_result_is_an_answer_or_an_error_of_ours(result: Any) -> None:
    for status in ("SUCCESS", "FAILURE", "REVOKED"):
        raw = msgspec.json.encode({"task_id": "j", "status": status, "result": result})
        try:
            assert isinstance(read_result(read_meta(raw)), Result)
        except TaxiwayError as error:
            assert error.message


def test_a_record_is_read_from_the_stores_text() -> None:
    fields = {"state": "running", "level": "2", "attempts": "1", "accepted": "1732.5", "cell": "cpu|2", "work": "0.1"}
    assert record_from("job-1", fields) == JobRecord(
        id="job-1", state=JobState.RUNNING, level=2, attempts=1, accepted=1732.5
    )


def test_a_job_without_a_record_is_accepted_and_not_placed() -> None:
    assert record_from("job-1", {}) == JobRecord(id="job-1", state=JobState.ACCEPTED)
