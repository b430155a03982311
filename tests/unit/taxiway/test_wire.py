"""Messages that ask, and records and results that answer."""

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taxiway.contract import job, wire
from taxiway.contract.request import MAX_NAME, Request, Terms, check_terms, parse_request
from taxiway.contract.values import to_wire
from taxiway.errors import InvalidRequestError, TaxiwayError
from tests.builders import a_result
from tests.unit.strategies import json_values

JSON = "application/json"
REQUEST = Request(model="sentiment", inputs=["a", b"\xff"], deadline=2.0, tenant="lab", outputs=("label",))
MESSAGE = wire.infer_message("job-1", REQUEST, reply="client-1", origin="me@host")


@pytest.mark.cases(
    "body, field", [(b'[["m", ' + b"[" * 900 + b"]" * 900 + b"], {}, {}]", "inputs"), (b"[" * 100_000, "body")]
)
def test_a_wrong_body_is_refused_by_the_field_that_is_wrong(body: bytes, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.read_request(body, JSON)
    assert caught.value.details["field"] == field


def test_another_content_type_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="content-type: expected application/json"):
        wire.read_request(b"", "application/x-python-serialize")


ARGUMENTS = st.tuples(json_values, json_values, st.just({}))


@given(body=st.binary() | (json_values | ARGUMENTS).map(lambda value: msgspec.json.encode(value)))
def test_any_body_is_a_request_or_an_invalid_request(body: bytes) -> None:
    try:
        assert isinstance(wire.read_request(body, JSON), Request)
    except InvalidRequestError as error:
        assert "field" in error.details


ENVELOPE: dict[str, Any] = msgspec.json.decode(MESSAGE)


@given(raw=st.binary() | json_values.map(lambda value: msgspec.json.encode(value)))
@example(raw=b"[" * 100_000)
@example(raw=b'{"body": "\\ud800", "headers": {}, "properties": {}}')
def test_any_bytes_are_an_envelope_or_an_invalid_request(raw: bytes) -> None:
    try:
        assert isinstance(wire.decode_envelope(raw), wire.Envelope)
    except InvalidRequestError as error:
        assert error.details == {"field": "message"}


@given(name=st.sampled_from(sorted(ENVELOPE)), value=json_values)
@example(name="body", value="é")
@example(name="body", value="a")
def test_any_change_to_an_envelope_is_a_payload_or_an_invalid_request(name: str, value: Any) -> None:
    try:
        assert isinstance(wire.decode_envelope(msgspec.json.encode(ENVELOPE | {name: value})).payload(), bytes)
    except InvalidRequestError as error:
        assert error.details["field"] in ("message", "body")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("inputs", ["\ud800", ["a", {"b": "\ud800"}], nested(5000), {1}, {"a": float("nan")}])
def test_inputs_that_have_no_form_on_the_wire_are_refused_before_they_are_sent(inputs: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.request_body(Request(model="m", inputs=inputs))
    assert caught.value.details["field"] == "inputs"


ASKED: dict[str, Any] = {"model": "sentiment", "inputs": "I like it"}


def test_a_term_that_is_left_out_or_none_is_open_and_every_other_is_read() -> None:
    terms: dict[str, Any] = {"parameters": {"max_tokens": 5}, "outputs": ["label"], "deadline": 2, "budget": 0.01}
    terms |= {"service": "live", "priority": "high", "tenant": "lab", "locality": "edge", "idempotency_key": "order-7"}
    assert parse_request(ASKED | dict.fromkeys(terms)) == parse_request(ASKED) == Request(**ASKED)
    assert parse_request(ASKED | terms) == Request(**ASKED, **(terms | {"outputs": ("label",)}))


@pytest.mark.cases(
    "fields, field, message",
    [
        (
            {"deadline": 10**400},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got 1000",
        ),
        ({"budget": 10**5000}, "budget", "budget: expected a finite number > 0, got an integer of 16610 bits"),
        ({"model": "x" * (MAX_NAME + 1)}, "model", "model: expected text of 1 to 256 printable characters, got 'xxx"),
        ({"parameters": {1: 2}}, "parameters", "parameters: expected `str`, got `int`"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(ASKED | fields)
    assert caught.value.details["field"] == field
    assert message in caught.value.message
    assert len(caught.value.message) < 300


@given(fields=st.dictionaries(st.sampled_from(sorted(Request.__struct_fields__)) | st.text(max_size=5), json_values))
def test_any_fields_are_a_request_or_an_invalid_request(fields: dict[str, Any]) -> None:
    try:
        assert isinstance(parse_request(fields), Request)
    except InvalidRequestError as error:
        assert isinstance(error.details["field"], str)


@pytest.mark.parametrize("fields", [{"deadline": float("nan")}, {"deadline": "x"}, {"priority": "x"}, {"tenant": 5}])
def test_terms_that_were_built_by_hand_are_checked_too(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        check_terms(Terms(**fields))


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
