from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.inference.protocol import DECODED_BYTES, DECODED_VALUES, read_infer, request_of
from taxiway.contract.limits import ELEMENTS, LARGE, WHOLE_VALUES_DIVISOR, count_values
from taxiway.contract.values import to_array
from taxiway.errors import InvalidRequestError, RequestTooLargeError

PADDING = json.dumps({"x": "x" * LARGE, "others": [0] * DECODED_VALUES})


def body(data: object, shape: list[int], datatype: str = "FP32", large: bool = True) -> bytes:
    """An infer request with one tensor, whose JSON is large, and has more than a few values, or not."""
    head = json.dumps({"name": "a", "shape": shape, "datatype": datatype})[:-1]
    text = data if isinstance(data, str) else json.dumps(data)
    return f'{{"inputs":[{head},"data":{text}}}],"parameters":{PADDING if large else "{}"}}}'.encode()


def read(content: bytes) -> np.ndarray:
    (tensor,) = request_of("m", read_infer(content)).inputs
    return to_array(tensor, "a")


NUMBERS = st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans())
def test_large_json_is_read_as_small_json_is(data: st.DataObject, shape: list[int], nested: bool) -> None:
    count = int(np.prod(shape))
    flat = np.asarray(data.draw(st.lists(NUMBERS, min_size=count, max_size=count)), np.float32)
    value = flat.reshape(shape).tolist() if nested else flat.tolist()

    small, large = read(body(value, shape, large=False)), read(body(value, shape))

    assert np.array_equal(small, large) and small.dtype == large.dtype


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", [[1, 2], [3]]), ("FP32", [1, [2]]), ("FP32", [[1], [2], [3]]), ("FP32", "null"), ("FP32", [None]),
        ("INT8", [1, 300]), ("INT64", [0.5, 1]), ("FP32", ["1"]), ("FP32", [{}]), ("BOOL", [0, 1]), ("FP99", [1, 2]),
        ("FP32", [1, 2, 3]), ("FP32", "7"),
    ],
)  # fmt: skip
def test_what_small_json_may_not_have_large_json_may_not_have(datatype: str, data: object) -> None:
    for large in (False, True):
        with pytest.raises(InvalidRequestError):
            read(body(data, [2], datatype, large=large))


@pytest.mark.parametrize("coding", ["base64", None])
def test_a_long_text_is_read_at_once(coding: str | None) -> None:
    text = "ab12" * LARGE
    parameters = {"content_type": coding} if coding else {}
    tensor = {"name": "a", "shape": [1], "datatype": "BYTES", "data": [text], "parameters": parameters}

    (read,) = read_infer(json.dumps({"inputs": [tensor]}).encode()).inputs

    assert read.data == [text] and read.parameters == parameters


@given(st.lists(st.text('e0E[],{}:1"\\'), max_size=40), st.integers(0, 40))
def test_texts_hold_no_values_however_long_they_are(texts: list[str], numbers: int) -> None:
    plain = {"texts": ["" for _ in texts], "numbers": [0] * numbers}

    assert count_values(json.dumps(plain | {"texts": texts}).encode()) == count_values(json.dumps(plain).encode())


def test_numbers_at_the_seams_of_pieces_stay_whole() -> None:
    values = list(range(10**6, 10**6 + 3 * DECODED_BYTES // 8))

    assert read(body(values, [len(values)], "INT64")).tolist() == values


def test_truths_are_read_in_pieces_too() -> None:
    assert read(body([True, False, True], [3], "BOOL")).tolist() == [True, False, True]


def test_beside_tensors_of_numbers_json_holds_a_fifth_of_the_values() -> None:
    count = ELEMENTS - 2 * DECODED_VALUES
    numbers = body([0] * count, [count], "INT8")
    texts = body(["a"] * (ELEMENTS // WHOLE_VALUES_DIVISOR + 1), [1], "BYTES")

    assert read(numbers).size == count
    with pytest.raises(RequestTooLargeError, match=f"at most {ELEMENTS // WHOLE_VALUES_DIVISOR} values"):
        read_infer(texts)


@pytest.mark.parametrize("number", ["1e308", "-1.5E-320", "1e0000300", "9" * 4000])
def test_numbers_that_take_long_to_read_count_as_many(number: str) -> None:
    content = body(f"[{','.join([number] * 10_000)}]", [10_000], "FP64")

    with pytest.raises(RequestTooLargeError):
        read_infer(content)


def test_text_that_looks_like_such_numbers_counts_as_text() -> None:
    text = "deadbeef" * 2000 + "1e308" * 20_000 + "e000000 " * 20_000

    assert read_infer(body(json.dumps([text]), [1], "BYTES")).inputs[0].data == [text]
