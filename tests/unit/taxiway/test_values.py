"""Values on the wire: their forms, their bounds and what is said of them."""

import enum
import json
import time
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kombu.utils.json import dumps, loads

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
from taxiway.contract.values import (
    DATATYPES,
    Blobs,
    from_wire,
    is_tensor,
    may_refer,
    numbers,
    references,
    resolved,
    to_array,
    to_wire,
)
from taxiway.contract.wire import decode_envelope, read_request, request_body
from taxiway.errors import QUOTED, InvalidRequestError, RequestTooLargeError, ResultExpiredError, TaxiwayError, quoted
from tests.unit.strategies import json_scalars

values = st.recursive(
    json_scalars.filter(lambda v: v == v and v not in (float("inf"), float("-inf"))) | st.binary(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=12,
).filter(lambda value: "__type__" not in repr(value))


def through_json(wire: Any) -> Any:
    return json.loads(json.dumps(wire, allow_nan=False))


@given(value=values)
def test_plain_values_and_bytes_come_back_as_they_were_also_by_celerys_own_json(value: Any) -> None:
    assert from_wire(through_json(to_wire(value))) == value
    assert loads(json.dumps(to_wire(value))) == value
    assert from_wire(json.loads(dumps(value))) == value


@pytest.mark.parametrize("name", sorted(DATATYPES.values()))
@pytest.mark.parametrize("order", ["<", ">"])
@given(data=st.data())
def test_an_array_comes_back_as_it_was(name: str, order: Literal["<", ">"], data: st.DataObject) -> None:
    dtype = np.dtype(name).newbyteorder(order)
    array = data.draw(arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=4)))
    for view in (array, array.T, array[..., ::2] if array.ndim else array):
        tensor = from_wire(through_json(to_wire(view)))
        assert is_tensor(tensor)
        back = to_array(tensor, "x")
        assert back.dtype == np.dtype(name)
        np.testing.assert_array_equal(back, view, strict=False)
        assert back.shape == view.shape


class Colour(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(1.5), 1.5),
        (np.float32(0.5), 0.5),
        (np.int8(-3), -3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.bytes_(b"ab"), b"ab"),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcd")[::2], b"ac"),
        (Colour.RED, "red"),
        (Size.BIG, 3),
        ((1, (2,)), [1, [2]]),
    ],
)
def test_a_scalar_of_another_kind_becomes_a_plain_one(value: Any, plain: Any) -> None:
    back = from_wire(through_json(to_wire(value)))
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), np.float32("nan"), np.longdouble(1), np.complex64(1), np.array([None])),
        *(np.array(["a"]), np.array([1], "uint32"), np.array([1], "datetime64[s]")),
        *({1: 2}, {b"a": 2}, {1, 2}, object(), [object()]),
    ],
)
def test_a_value_without_a_form_on_the_wire_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="parameters: expected") as caught:
        to_wire(value, "parameters")
    assert caught.value.details == {"field": "parameters"}


@pytest.mark.parametrize(
    ("tag", "value"),
    [("base64", "é"), ("base64", "a"), ("base64", 5), ("bytes", "\ud800"), ("bytes", None), ("uuid", "x"), ([], "x")],
)
def test_a_tagged_value_that_does_not_decode_is_refused(tag: Any, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="inputs: expected"):
        from_wire([{"__type__": tag, "__value__": value}])


@pytest.mark.cases(
    "tensor",
    [{"shape": [10**30], "datatype": "FP32", "data": [1]}, {"shape": [1], "datatype": "INT64", "data": [2**70]}],
)
def test_a_tensor_that_its_datatype_or_shape_cannot_hold_is_refused(tensor: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"inputs\.x: expected") as caught:
        to_array(tensor, "inputs.x")
    assert caught.value.details == {"field": "inputs.x"}


JSON = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.binary(max_size=64)
VALUES = st.recursive(
    JSON, lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=4), below, max_size=4)
)


def read(value: object, kept: dict[str, bytes | bytearray | memoryview]) -> Any:
    """What a reader on the other side of the wire gets."""
    return resolved(from_wire(json.loads(msgspec.json.encode(value))), kept)


@given(VALUES, st.integers(-1, 64), st.integers(0, 8))
def test_whatever_travels_beside_its_message_is_read_as_if_it_had_not(value: object, limit: int, texts: int) -> None:
    blobs = Blobs(limit, texts)
    assert read(to_wire(value, "inputs", blobs), blobs.contents) == from_wire(to_wire(value))


def test_an_array_of_the_wanted_type_that_lies_in_order_is_not_copied() -> None:
    array, blobs = np.zeros(1000, np.float32), Blobs(limit=10)
    to_wire(array, "inputs", blobs)
    (content,) = blobs.contents.values()
    array[0] = 1.0
    assert np.frombuffer(content, np.float32)[0] == 1.0
    assert numbers(array, "FP32", "x") is array


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_integers_are_kept_whole_or_refused(values: list[int]) -> None:
    if all(-128 <= value <= 127 for value in values):
        assert numbers(values, "INT8", "x").tolist() == values
    else:
        with pytest.raises(InvalidRequestError, match="expected INT8 numbers"):
            numbers(values, "INT8", "x")
    with pytest.raises(InvalidRequestError, match="expected FP16 numbers, got values from"):
        numbers([1.0, 70000.0], "FP16", "x")


def test_a_large_text_in_a_list_travels_beside_its_message_where_that_is_asked_for() -> None:
    inputs = {"a": ["é" * 9, "short"], "b": "é" * 9}
    blobs, whole = Blobs(texts=8), Blobs(limit=8)
    wire, inline = to_wire(inputs, "inputs", blobs), to_wire(inputs, "inputs", whole)
    assert (list(blobs.contents.values()), whole.contents) == ([("é" * 9).encode()], {})
    assert (wire["a"][0]["datatype"], wire["a"][1], wire["b"], inline) == ("TEXT", "short", "é" * 9, inputs)


def test_a_text_beside_its_message_that_is_no_text_is_refused() -> None:
    blobs = Blobs(limit=0)
    reference = to_wire(b"\xff", "inputs", blobs) | {"datatype": "TEXT"}
    with pytest.raises(InvalidRequestError, match="UTF-8"):
        resolved(reference, blobs.contents)


def test_a_request_is_read_back_with_its_references() -> None:
    blobs = Blobs(limit=2)
    body = request_body(parse_request({"model": "m", "inputs": {"a": [b"abc", "text"]}}), blobs)
    request = read_request(body, "application/json")
    assert may_refer(body)
    assert [found.ref for found in references(request.inputs)] == list(blobs.contents)
    assert resolved(request.inputs, blobs.contents) == {"a": [b"abc", "text"]}
    assert not may_refer(request_body(parse_request({"model": "m", "inputs": ["text", 'a "ref": in text']})))


@pytest.mark.parametrize("content", [b"abd", b"ab", b"abcd", b"", None])
def test_other_bytes_than_were_signed_for_are_refused_and_none_have_expired(content: bytes | None) -> None:
    reference = to_wire(b"abc", "inputs", Blobs(limit=2))
    with pytest.raises(ResultExpiredError if content is None else InvalidRequestError, match=reference["ref"]):
        resolved(reference, {reference["ref"]: content})


@pytest.mark.parametrize(
    "fields", [{"ref": "job:1"}, {"ref": 7}, {"bytes": -1}, {"bytes": "3"}, {"datatype": 1}, {"digest": None}]
)
def test_a_malformed_reference_is_refused(fields: dict[str, object]) -> None:
    reference = {"ref": "0" * 32, "bytes": 3, "datatype": "BYTES", "digest": ""} | fields
    with pytest.raises(InvalidRequestError, match="ref"):
        list(references([reference]))


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(st.characters(exclude_categories=())) | st.binary(),
    lambda below: st.lists(below) | st.dictionaries(st.text(st.characters(exclude_categories=())), below),
)


def nested(levels: int, innermost: Any = "a") -> Any:
    value = innermost
    for level in range(levels):
        value = [value] if level % 2 else {"below": value}
    return value


@given(anything)
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


@given(anything, st.booleans(), st.integers(0, 2 * DEEPEST))
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


PLAIN = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
)


def values_in(value: object) -> int:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(values_in, below))


@given(PLAIN)
def test_json_has_no_more_values_than_its_commas_and_brackets_say(value: object) -> None:
    assert values_in(value) <= count_values(msgspec.json.encode(value))


def test_json_of_too_many_values_is_refused_and_a_long_text_is_not() -> None:
    check_json(b'["' + b"a" * 2**24 + b'"]', 10)
    check_json(msgspec.json.encode({"inputs": ',[{\\" 1e308 ' * ELEMENTS}))
    with pytest.raises(RequestTooLargeError, match=r"limits\.elements") as caught:
        check_json(b"1," * LARGE, 10)
    assert caught.value.details["limit"] == "elements"


@pytest.mark.parametrize(
    "shape", ["x", [-1], [1.0], [True], [None], [2**63], [10**5000], [1] * (RANK + 1), [2**32, 2**32], [2**62, 2]]
)
def test_what_is_no_shape_of_a_tensor_is_refused_at_once(shape: object) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match="expected a shape") as caught:
        elements_of(shape, "inputs.x")
    assert time.thread_time() - began < 0.1
    assert len(caught.value.message) < 2 * QUOTED


@given(st.recursive(PLAIN | st.binary(), lambda below: st.lists(below) | st.tuples(below)))
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
