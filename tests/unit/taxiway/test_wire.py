"""Messages that ask, records and results that answer, and errors by their names and codes."""

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.settings import TREE
from taxiway import errors
from taxiway.contract import job, wire
from taxiway.contract.request import MAX_NAME, Request, Terms, check_terms, parse_request
from taxiway.contract.values import to_wire
from taxiway.errors import (
    UNREADABLE,
    BrokerUnavailableError,
    ExecutionError,
    InvalidRequestError,
    TaxiwayError,
    error_from,
    error_of_code,
    flaw,
    unreadable,
)
from tests.builders import a_result, nested
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


@pytest.mark.parametrize(
    "fields",
    [
        *({"deadline": float("nan")}, {"deadline": "x"}, {"priority": "x"}, {"tenant": 5}),
        {"stream": np.array(["rows", "rows"])},
    ],
)
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


def kinds(root: type[TaxiwayError] = TaxiwayError) -> Iterator[type[TaxiwayError]]:
    if root.__module__ == errors.__name__:
        yield root
    for child in root.__subclasses__():
        yield from kinds(child)


KINDS = sorted(kinds(), key=lambda kind: kind.__name__)
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def test_the_table_of_errors_has_every_error_with_its_code_status_and_exit_code() -> None:
    rows = ROW.findall((TREE / "docs" / "errors.md").read_text(encoding="utf-8"))
    documented = {(name, code, int(status), int(exit_code)) for name, code, status, exit_code, _when, _do in rows}
    assert documented == {(k.__name__, k.code, k.status, k.exit_code) for k in KINDS}
    assert len(rows) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_by_its_name_by_its_code_and_from_a_pickle(kind: type[TaxiwayError]) -> None:
    details = {"field": "deadline", "message": "kept", "self": 1}
    for error in (error_from(kind.__name__, "no", details), error_of_code(kind.code, "no", details)):
        assert type(error) is kind
        assert (error.message, str(error), error.details) == ("no", "no", details)
    error = pickle.loads(pickle.dumps(kind("no", retry_after=2.0)))
    assert (type(error), error.message, error.retry_after) == (kind, "no", 2.0)


def test_a_foreign_error_is_an_execution_error_and_an_unknown_code_the_base_class() -> None:
    class Narrower(BrokerUnavailableError):
        """Does not stand for its parent, whose code it has."""

    error = error_from("ZeroDivisionError", "division by zero")
    assert (type(error), error.message) == (ExecutionError, "ZeroDivisionError: division by zero")
    assert type(error_of_code("teapot", "no")) is TaxiwayError
    assert type(error_of_code(Narrower.code, "no")) is BrokerUnavailableError


def test_a_wait_that_ran_out_is_a_timeout_to_python_too() -> None:
    assert issubclass(errors.ResultTimeoutError, TimeoutError)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: b"caf\xe9".decode(), "the byte 0xe9 at position 3"),
        (lambda: "\ud800".encode(), "a lone surrogate ('\\ud800') at character 0"),
        (lambda: Path("/nowhere/at/all").read_bytes(), "no such file or directory"),
        (lambda: Path("/").read_bytes(), "is a directory"),
    ],
)
def test_why_nothing_can_be_read_is_said_without_pythons_words(fault: Callable[[], object], said: str) -> None:
    with pytest.raises((OSError, UnicodeError)) as raised:
        fault()
    assert isinstance(raised.value, OSError | UnicodeError)
    assert flaw(raised.value) == said


class Part(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    size: Literal[1, 2] = 1
    by: dict[str, int] = {}


@pytest.mark.cases("text, field, message", [(b"[" * 10_000, "body", "body: expected JSON: ")])
def test_a_value_that_cannot_be_read_is_refused_with_the_field_first(text: bytes, field: str, message: str) -> None:
    with pytest.raises(UNREADABLE) as raised:
        msgspec.json.decode(text, type=list[Part] if text[:2] != b"[[" else Any)
    error = unreadable(raised.value)
    assert error.details["field"] == field
    assert error.message.startswith(message)


@given(st.dictionaries(st.text(), st.text(), min_size=1))
def test_a_key_that_cannot_be_read_is_named_by_its_mapping_whatever_its_text_is(values: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert({"name": "a", "by": values}, Part)
    assert unreadable(raised.value, "part").details["field"] == "part.by[...]"
