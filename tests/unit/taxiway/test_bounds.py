"""What a request's values may be is one rule, which the client and the router go by before anything is run."""

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.limits import (
    DEEPEST,
    ELEMENTS,
    LARGE,
    MOST_CONTAINERS,
    MOST_VALUES,
    RANK,
    check_json,
    check_values,
    count_values,
    elements_of,
    surely_fits,
)
from taxiway.contract.request import parse_request
from taxiway.contract.values import from_wire
from taxiway.contract.wire import decode_envelope
from taxiway.errors import QUOTED, InvalidRequestError, RequestTooLargeError, TaxiwayError, quoted

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


JSON = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
)


def values_in(value: object) -> int:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(values_in, below))


@given(JSON)
def test_json_has_no_more_values_than_its_commas_and_brackets_say(value: object) -> None:
    assert values_in(value) <= count_values(msgspec.json.encode(value))


def test_json_of_too_many_values_is_refused_and_a_long_text_is_not() -> None:
    check_json(b'["' + b"a" * 2**24 + b'"]', 10)
    check_json(msgspec.json.encode({"inputs": ',[{\\" 1e308 ' * ELEMENTS}))
    with pytest.raises(RequestTooLargeError, match=r"limits\.elements") as caught:
        check_json(b"1," * LARGE, 10)
    assert caught.value.details["limit"] == "elements"


@pytest.mark.parametrize(
    "shape",
    ["x", [-1], [1.0], [True], [None], [2**63], [10**5000], [1] * (RANK + 1), [2**32, 2**32], [2**62, 2]],
)
def test_what_is_no_shape_of_a_tensor_is_refused_at_once(shape: object) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match="expected a shape") as caught:
        elements_of(shape, "inputs.x")
    assert time.thread_time() - began < 0.1
    assert len(caught.value.message) < 2 * QUOTED


@given(st.recursive(JSON | st.binary(), lambda below: st.lists(below) | st.tuples(below)))
def test_a_value_is_quoted_in_few_characters(value: object) -> None:
    assert len(quoted(value)) <= QUOTED


def test_a_large_value_is_quoted_without_a_look_at_all_of_it() -> None:
    integer, mapping = 10**100_000, dict.fromkeys(range(10**6))
    for value in ("a" * 2**24, b"a" * 2**24, integer, [integer] * 5, [[1] * 10**6] * 5, mapping):
        began = time.thread_time()
        assert 0 < len(quoted(value)) <= QUOTED
        assert time.thread_time() - began < 0.01, type(value)


def test_a_message_of_too_many_headers_is_no_message() -> None:
    with pytest.raises(InvalidRequestError, match=f"at most {ELEMENTS} values"):
        decode_envelope(b'{"body":"","headers":{"a":[%s]},"properties":{}}' % b",".join([b"1"] * (ELEMENTS + 1)))
