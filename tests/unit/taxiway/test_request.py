from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.request import MAX_NAME, Request, Terms, check_terms, parse_request
from taxiway.errors import InvalidRequestError
from tests.unit.strategies import json_values

ASKED = {"model": "sentiment", "inputs": "I like it"}


def test_a_model_and_inputs_are_a_request_with_every_term_left_open() -> None:
    request = parse_request(ASKED)
    assert request == Request(model="sentiment", inputs="I like it")
    assert (request.deadline, request.service, request.priority, request.tenant) == (None, None, None, "default")


def test_every_field_is_read() -> None:
    fields = ASKED | {
        "parameters": {"max_tokens": 5},
        "outputs": ["label"],
        "deadline": 2,
        "service": "live",
        "priority": "high",
        "budget": 0.01,
        "tenant": "lab",
        "locality": "edge",
        "idempotency_key": "order-7",
    }
    request = parse_request(fields)
    assert {name: getattr(request, name) for name in fields} == fields | {"outputs": ("label",)}


def test_none_stands_for_a_field_that_is_not_given() -> None:
    left_open = dict.fromkeys(("parameters", "outputs", "deadline", "tenant", "priority"))
    assert parse_request(ASKED | left_open) == parse_request(ASKED)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (
            {"deadline": float("nan")},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got nan",
        ),
        (
            {"deadline": float("inf")},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got inf",
        ),
        (
            {"deadline": 10**400},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got 1000",
        ),
        (
            {"deadline": 2592001},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got 2592001",
        ),
        (
            {"deadline": -1},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got -1",
        ),
        (
            {"deadline": 0},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got 0",
        ),
        (
            {"deadline": -1.0},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got -1",
        ),
        ({"budget": 10**5000}, "budget", "budget: expected a finite number > 0, got an integer of 16610 bits"),
        (
            {"deadline": True},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got True",
        ),
        (
            {"deadline": "5"},
            "deadline",
            "deadline: expected a number of seconds > 0 and at most 2592000 (30 days), got '5'",
        ),
        ({"budget": -0.5}, "budget", "budget: expected a finite number > 0, got -0.5"),
        ({"budget": float("-inf")}, "budget", "budget: expected a finite number > 0, got -inf"),
        ({"priority": "urgent"}, "priority", "priority: expected one of ['high', 'normal', 'low'], got 'urgent'"),
        ({"priority": ["high"]}, "priority", "priority: expected one of ['high', 'normal', 'low'], got ['high']"),
        ({"service": ""}, "service", "service: expected text of 1 to 256 printable characters, got ''"),
        ({"tenant": "a\nb"}, "tenant", "tenant: expected text of 1 to 256 printable characters, got 'a\\nb'"),
        ({"tenant": 5}, "tenant", "tenant: expected text of 1 to 256 printable characters, got 5"),
        ({"model": "x" * (MAX_NAME + 1)}, "model", "model: expected text of 1 to 256 printable characters, got 'xxx"),
        ({"model": None}, "model", "model: expected a value, got nothing"),
        ({"inputs": None}, "inputs", "inputs: expected a value, got nothing"),
        ({"outputs": "label"}, "outputs", "outputs: expected `array`, got `str`"),
        ({"parameters": [1]}, "parameters", "parameters: expected `object`, got `array`"),
        ({"parameters": {1: 2}}, "parameters", "parameters: expected `str`, got `int`"),
        ({"deadlin": 5}, "deadlin", "(did you mean deadline?)"),
        ({"queue": "gpu"}, "queue", "queue: expected no such field, but one of ['budget', 'deadline',"),
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
