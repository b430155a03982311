import enum
import hashlib
import json
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kombu.utils.json import dumps, loads

from taxiway.contract.request import parse_request
from taxiway.contract.values import (
    DATATYPES,
    Blobs,
    ResultBlobs,
    from_wire,
    is_tensor,
    may_refer,
    numbers,
    references,
    resolved,
    to_array,
    to_wire,
)
from taxiway.contract.wire import read_request, request_body
from taxiway.errors import InvalidRequestError, ResultExpiredError
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


@pytest.mark.cases("datatype, data, expected")
def test_a_tensors_data_may_be_flat_nested_or_bytes(datatype: str, data: Any, expected: list[Any]) -> None:
    array = to_array({"shape": [2], "datatype": datatype, "data": data}, "x")
    assert array.tolist() == expected
    assert array.dtype == np.dtype(DATATYPES[datatype])


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


def test_a_requests_reference_has_the_digest_and_a_results_the_address_at_the_interface() -> None:
    asked, answered = Blobs(limit=2), ResultBlobs(limit=2)
    reference, result = to_wire(b"abc", "inputs", asked), to_wire(b"abc", "x", answered)
    known = {"datatype": "BYTES", "bytes": 3}
    assert reference == known | {"ref": reference["ref"], "digest": hashlib.sha256(b"abc").hexdigest()}
    assert result == known | {"ref": result["ref"], "href": f"/v2/blobs/{result['ref']}"}


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
