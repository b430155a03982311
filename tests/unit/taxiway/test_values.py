from __future__ import annotations

import enum
import json
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kombu.utils.json import dumps, loads

from taxiway.contract.values import DATATYPES, from_wire, is_tensor, numbers, to_array, to_wire
from taxiway.errors import InvalidRequestError
from tests.unit.strategies import json_scalars

values = st.recursive(
    json_scalars.filter(lambda v: v == v and v not in (float("inf"), float("-inf"))) | st.binary(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=12,
).filter(lambda value: "__type__" not in repr(value))


def through_json(wire: Any) -> Any:
    return json.loads(json.dumps(wire, allow_nan=False))


@given(value=values)
def test_plain_values_and_bytes_come_back_as_they_were(value: Any) -> None:
    assert from_wire(through_json(to_wire(value))) == value


@given(value=values)
def test_celerys_own_json_reads_what_we_write(value: Any) -> None:
    assert loads(json.dumps(to_wire(value))) == value


@given(value=values)
def test_what_celerys_own_json_writes_is_read(value: Any) -> None:
    assert from_wire(json.loads(dumps(value))) == value


@pytest.mark.parametrize("name", sorted(DATATYPES.values()))
@pytest.mark.parametrize("order", ["<", ">"])
@given(data=st.data())
def test_an_array_comes_back_with_its_type_shape_and_values(
    name: str, order: Literal["<", ">"], data: st.DataObject
) -> None:
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
        float("nan"),
        float("inf"),
        np.float32("nan"),
        np.longdouble(1),
        np.complex64(1),
        np.array(["a"]),
        np.array([None]),
        np.array([1], "uint32"),
        np.array([1], "datetime64[s]"),
        {1: 2},
        {b"a": 2},
        {1, 2},
        object(),
        [object()],
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


@pytest.mark.parametrize(
    ("datatype", "data", "expected"),
    [
        ("FP32", [1, 2.5], [1.0, 2.5]),
        ("FP32", [[1], [2]], [1.0, 2.0]),
        ("UINT8", [0, 255], [0, 255]),
        ("BOOL", [True, False], [True, False]),
        ("INT64", [2**62, -(2**62)], [2**62, -(2**62)]),
        ("FP16", b"\x00\x3c\x00\x40", [1.0, 2.0]),
    ],
)
def test_a_tensors_data_may_be_flat_nested_or_bytes(datatype: str, data: Any, expected: list[Any]) -> None:
    array = to_array({"shape": [2], "datatype": datatype, "data": data}, "x")
    assert array.tolist() == expected
    assert array.dtype == np.dtype(DATATYPES[datatype])


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": [1], "datatype": "FP8", "data": [1]},
        {"shape": [1], "datatype": ["FP32"], "data": [1]},
        {"shape": 1, "datatype": "FP32", "data": [1]},
        {"shape": [-1], "datatype": "FP32", "data": [1]},
        {"shape": ["1"], "datatype": "FP32", "data": [1]},
        {"shape": [True], "datatype": "FP32", "data": [1]},
        {"shape": [10**30], "datatype": "FP32", "data": [1]},
        {"shape": [3], "datatype": "FP32", "data": [1, 2]},
        {"shape": [3], "datatype": "FP32", "data": b"\0" * 8},
        {"shape": [2], "datatype": "FP32", "data": b"\0" * 7},
        {"shape": [3], "datatype": "FP32", "data": [[1], [2, 3]]},
        {"shape": [1], "datatype": "FP32", "data": ["1"]},
        {"shape": [1], "datatype": "FP32", "data": [None]},
        {"shape": [1], "datatype": "FP32", "data": {"a": 1}},
        {"shape": [1], "datatype": "INT8", "data": [300]},
        {"shape": [1], "datatype": "UINT8", "data": [-1]},
        {"shape": [1], "datatype": "INT8", "data": [1.5]},
        {"shape": [1], "datatype": "INT64", "data": [2**70]},
        {"shape": [1], "datatype": "FP16", "data": [1e9]},
        {"shape": [1], "datatype": "BOOL", "data": [1]},
        {"shape": [1], "datatype": "FP32", "data": [True]},
    ],
)
def test_a_tensor_that_its_datatype_or_shape_cannot_hold_is_refused(tensor: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"inputs\.x: expected") as caught:
        to_array(tensor, "inputs.x")
    assert caught.value.details == {"field": "inputs.x"}


def test_an_array_of_the_wanted_type_is_not_copied() -> None:
    array = np.zeros(3, np.float32)
    assert numbers(array, "FP32", "x") is array
