import contextlib
import gzip
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.bodies import inflate
from api.inference import protocol
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.limits import DEEPEST, ELEMENTS, LARGE, WHOLE_VALUES_DIVISOR, count_values
from taxiway.contract.values import to_array, to_wire
from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError

VECTORS = TensorSpec("vector", "FP32", (-1, 2))
LABELS = TensorSpec("label", "BYTES", (-1,))
STATE = TensorSpec("state", "FP32", (2, -1, 1), batch_axis=1)
TOP = TensorSpec("top", "BYTES", (-1, 2))


@pytest.mark.cases("spec, value, shape, data")
def test_an_output_always_has_its_batch_axis(
    spec: TensorSpec, value: object, shape: list[int], data: list[object]
) -> None:
    output = protocol.output_tensor(spec, value)
    assert (output.shape, output.data) == (shape, data)


@pytest.mark.parametrize("opened", [b"[", b'{"a":'])
@pytest.mark.parametrize("levels", [DEEPEST, 500, 900, 980, 100_000])
def test_json_of_any_depth_is_read_or_refused(opened: bytes, levels: int) -> None:
    value = opened * levels + b"1" + (b"]" if opened == b"[" else b"}") * levels
    tensor = b'{"inputs": [{"name": "a", "shape": [1], "datatype": "%s", "data": [%s]}]}'
    with pytest.raises(InvalidRequestError):
        protocol.request_of("m", protocol.read_infer(tensor % (b"BYTES", value)))
    for body in (tensor % (b"FP32", value), b'{"inputs": [], "parameters": {"a": %s}}' % value):
        with contextlib.suppress(InvalidRequestError):
            protocol.request_of("m", protocol.read_infer(body))


@given(st.lists(st.integers(-2, 4), max_size=3), st.lists(st.floats() | st.text(max_size=3) | st.none(), max_size=6))
def test_any_tensor_is_read_or_refused(shape: list[int], data: list[float | str | None]) -> None:
    for datatype in ("FP32", "INT8", "BYTES", "FP99"):
        try:
            asked = protocol.InferRequest([protocol.InputTensor("vector", shape, datatype, data)])
            to_wire(protocol.request_of("m", asked).inputs)
        except TaxiwayError as error:
            assert isinstance(error, InvalidRequestError)


PADDING = json.dumps({"x": "x" * LARGE, "others": [0] * protocol.DECODED_VALUES})


def body(data: object, shape: list[int], datatype: str = "FP32", large: bool = True) -> bytes:
    """An infer request with one tensor, whose JSON is large, and has more than a few values, or not."""
    head = json.dumps({"name": "a", "shape": shape, "datatype": datatype})[:-1]
    text = data if isinstance(data, str) else json.dumps(data)
    return f'{{"inputs":[{head},"data":{text}}}],"parameters":{PADDING if large else "{}"}}}'.encode()


def read(content: bytes) -> np.ndarray:
    (tensor,) = protocol.request_of("m", protocol.read_infer(content)).inputs
    return to_array(tensor, "a")


NUMBERS = st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans())
def test_large_json_is_read_as_small_json_is(data: st.DataObject, shape: list[int], nested: bool) -> None:
    count = int(np.prod(shape))
    flat = np.asarray(data.draw(st.lists(NUMBERS, min_size=count, max_size=count)), np.float32)
    value = flat.reshape(shape).tolist() if nested else flat.tolist()
    small, large = read(body(value, shape, large=False)), read(body(value, shape))
    assert np.array_equal(small, large) and small.dtype == large.dtype


@pytest.mark.cases("datatype, data")
def test_what_small_json_may_not_have_large_json_may_not_have(datatype: str, data: object) -> None:
    for large in (False, True):
        with pytest.raises(InvalidRequestError):
            read(body(data, [2], datatype, large=large))


@pytest.mark.parametrize("coding", ["base64", None])
def test_a_long_text_is_read_at_once(coding: str | None) -> None:
    text = "ab12" * LARGE
    parameters = {"content_type": coding} if coding else {}
    tensor = {"name": "a", "shape": [1], "datatype": "BYTES", "data": [text], "parameters": parameters}
    (read,) = protocol.read_infer(json.dumps({"inputs": [tensor]}).encode()).inputs
    assert read.data == [text] and read.parameters == parameters


@given(st.lists(st.text('e0E[],{}:1"\\'), max_size=40), st.integers(0, 40))
def test_texts_hold_no_values_however_long_they_are(texts: list[str], numbers: int) -> None:
    plain = {"texts": ["" for _ in texts], "numbers": [0] * numbers}
    assert count_values(json.dumps(plain | {"texts": texts}).encode()) == count_values(json.dumps(plain).encode())


def test_numbers_at_the_seams_of_pieces_stay_whole_and_so_do_truths() -> None:
    assert read(body([True, False, True], [3], "BOOL")).tolist() == [True, False, True]
    values = list(range(10**6, 10**6 + 3 * protocol.DECODED_BYTES // 8))
    assert read(body(values, [len(values)], "INT64")).tolist() == values


def test_beside_tensors_of_numbers_json_holds_a_fifth_of_the_values() -> None:
    count = ELEMENTS - 2 * protocol.DECODED_VALUES
    numbers = body([0] * count, [count], "INT8")
    texts = body(["a"] * (ELEMENTS // WHOLE_VALUES_DIVISOR + 1), [1], "BYTES")
    assert read(numbers).size == count
    with pytest.raises(RequestTooLargeError, match=f"at most {ELEMENTS // WHOLE_VALUES_DIVISOR} values"):
        protocol.read_infer(texts)


@pytest.mark.parametrize("number", ["1e308", "-1.5E-320", "1e0000300", "9" * 4000])
def test_numbers_that_take_long_to_read_count_as_many(number: str) -> None:
    content = body(f"[{','.join([number] * 10_000)}]", [10_000], "FP64")
    with pytest.raises(RequestTooLargeError):
        protocol.read_infer(content)
    text = "deadbeef" * 2000 + number[:5] * 20_000 + "e000000 " * 20_000
    assert protocol.read_infer(body(json.dumps([text]), [1], "BYTES")).inputs[0].data == [text], "but text is text"


@pytest.mark.parametrize("name", ["shared_memory_region", "classification"])
def test_an_output_that_would_not_be_in_the_body_as_it_is_is_refused_by_name(name: str) -> None:
    wanted = protocol.WantedOutput(name="n", parameters={name: 8})
    with pytest.raises(InvalidRequestError, match=rf"outputs\.n\.{name}: expected none, as it is not supported"):
        protocol.request_of("m", protocol.InferRequest([], outputs=[wanted]))


@pytest.mark.cases("parameters, priority, deadline, left")
def test_parameters_are_terms_and_the_rest_is_the_models(
    parameters: dict[str, Any], priority: str | None, deadline: float | None, left: dict[str, Any]
) -> None:
    request = protocol.request_of("m", protocol.InferRequest([], parameters=parameters))
    assert (request.priority, request.deadline, request.parameters) == (priority, deadline, left)
    assert request.tenant == "default"


@pytest.mark.parametrize("timeout", [-1, 1.5, "1", True])
def test_a_timeout_is_microseconds_or_refused_by_name(timeout: object) -> None:
    with pytest.raises(InvalidRequestError, match="timeout: expected a whole number of microseconds"):
        protocol.request_of("m", protocol.InferRequest([], parameters={"timeout": timeout}))


@given(st.binary(max_size=300))
def test_what_was_compressed_comes_out_as_it_was_and_any_other_bytes_are_refused(content: bytes) -> None:
    assert inflate(gzip.compress(content), len(content), 100) == content
    whole = gzip.compress(content)
    for sent in (content, b"", b"\x1f\x8b\x08\x00" + content, whole[:-1], whole + b"x", whole * 2):
        with pytest.raises(InvalidRequestError, match=r"expected .*gzip"):
            inflate(sent, 2**16, 100)


def test_a_bomb_is_refused_in_little_memory() -> None:
    bomb = gzip.compress(bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLargeError, match="at most 64 times its compressed size"):
            inflate(bomb, 2**26, 64)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_body_within_the_limit_of_bytes_may_still_inflate_too_much() -> None:
    assert inflate(gzip.compress(bytes(2**20)), 2**22, 1) == bytes(2**20)
    with pytest.raises(RequestTooLargeError, match="at most 4194304 bytes"):
        inflate(gzip.compress(bytes(2**23)), 2**22, 2000)
