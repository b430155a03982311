"""What a request's values may be is one rule, which the client and the router go by before anything is run."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.limits import DEEPEST, MOST_CONTAINERS, MOST_VALUES, check_values, surely_fits
from taxiway.contract.request import parse_request
from taxiway.contract.values import from_wire
from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(st.characters(exclude_categories=())) | st.binary(),
    lambda below: st.lists(below) | st.dictionaries(st.text(st.characters(exclude_categories=())), below),
)


def nested(levels: int, innermost: Any = "a") -> Any:
    value = innermost
    for level in range(levels):
        value = [value] if level % 2 else {"below": value}
    return value


@given(values)
def test_a_value_that_passes_can_be_written_and_read(value: Any) -> None:
    try:
        check_values(value, "inputs")
    except TaxiwayError as error:
        assert "surrogate" in error.message
        with pytest.raises(UnicodeEncodeError):
            json.dumps(value, ensure_ascii=False, default=repr).encode()
    else:
        json.dumps(value, ensure_ascii=False, default=repr).encode()
        from_wire(value)


@given(values, st.booleans(), st.integers(0, 2 * DEEPEST))
def test_json_that_surely_fits_holds_what_passes(value: Any, ascii_only: bool, levels: int) -> None:
    encoded = json.dumps(nested(levels, value), ensure_ascii=ascii_only, default=repr).encode(errors="replace")
    if surely_fits(encoded):
        check_values(json.loads(encoded), "inputs")


def test_plain_short_json_surely_fits() -> None:
    assert surely_fits(json.dumps({"inputs": {"text": "hello", "ids": [1, 2]}}).encode())
    assert not surely_fits(json.dumps("a\ud800").encode())
    assert not surely_fits(json.dumps([0] * MOST_VALUES).encode())


def test_levels_are_counted_and_both_figures_are_reported() -> None:
    check_values(nested(DEEPEST), "inputs")
    with pytest.raises(InvalidRequestError, match=f"inputs: expected at most {DEEPEST} levels .*, got 520$"):
        check_values(nested(520), "inputs")
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InvalidRequestError, match=r"got at least 10000$"):
        check_values(endless, "inputs")


@pytest.mark.parametrize("text", ["a\ud800", {"\udfff": 1}, [["x", "\ud83d"]]])
def test_text_that_utf_8_cannot_encode_is_refused_wherever_it_stands(text: Any) -> None:
    with pytest.raises(InvalidRequestError, match="inputs: expected text that UTF-8 can encode, got a lone surrogate"):
        parse_request({"model": "echo", "inputs": text})
    with pytest.raises(InvalidRequestError, match="parameters: expected text that UTF-8 can encode"):
        parse_request({"model": "echo", "inputs": "", "parameters": {"a": text}})


@pytest.mark.parametrize(
    ("value", "most"), [([0] * (MOST_VALUES + 9), MOST_VALUES), ([[]] * (MOST_CONTAINERS + 9), MOST_CONTAINERS)]
)
def test_too_many_values_are_refused_with_both_figures(value: list[Any], most: int) -> None:
    with pytest.raises(RequestTooLargeError, match=rf"expected at most {most} .*, got {most + 10}:") as caught:
        check_values(value, "inputs")
    assert (caught.value.details["most"], caught.value.details["got"]) == (most, most + 10)


def test_a_million_numbers_are_looked_at_in_less_time_than_they_take_to_read() -> None:
    numbers = [1.5] * (MOST_VALUES - 1)
    began = time.process_time()
    check_values(numbers, "inputs")
    assert time.process_time() - began < 0.1
