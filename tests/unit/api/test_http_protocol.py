from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.inference.protocol import InferRequest, InputTensor, output_tensor, read_infer, request_of
from tasks.models.model import TensorSpec
from taxiway.contract.limits import DEEPEST, ELEMENTS
from taxiway.contract.values import to_array, to_wire
from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError

VECTORS = TensorSpec("vector", "FP32", (-1, 2))
LABELS = TensorSpec("label", "BYTES", (-1,))
STATE = TensorSpec("state", "FP32", (2, -1, 1), batch_axis=1)
TOP = TensorSpec("top", "BYTES", (-1, 2))


@pytest.mark.parametrize(
    ("spec", "value", "shape", "data"),
    [
        (VECTORS, [1.0, 2.0], [1, 2], [1.0, 2.0]),
        (VECTORS, [[1.0, 2.0], [3.0, 4.0]], [2, 2], [1.0, 2.0, 3.0, 4.0]),
        (VECTORS, {"shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}, [1, 2], [1.0, 2.0]),
        (VECTORS, [{"shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}] * 2, [2, 2], [1.0, 2.0] * 2),
        (LABELS, "cat", [1], ["cat"]),
        (LABELS, ["cat", "dog"], [2], ["cat", "dog"]),
        (LABELS, {"flight": 7}, [1], [{"flight": 7}]),
        (LABELS, [b"\x00", "a"], [2], ["AA==", "YQ=="]),
        (STATE, [[1.0], [2.0]], [2, 1, 1], [1.0, 2.0]),
        (
            STATE,
            [{"shape": [2, 1], "datatype": "FP32", "data": [n, -n]} for n in (1.0, 2.0)],
            [2, 2, 1],
            [1, 2, -1, -2],
        ),
        (TOP, ["cat", "dog"], [1, 2], ["cat", "dog"]),
        (TOP, [["cat", "dog"], ["dog", "cat"]], [2, 2], ["cat", "dog", "dog", "cat"]),
    ],
)
def test_an_output_has_its_batch_axis_whether_it_came_with_it_or_not(
    spec: TensorSpec, value: object, shape: list[int], data: list[object]
) -> None:
    output = output_tensor(spec, value)

    assert (output.shape, output.data) == (shape, data)


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2), min_size=1, max_size=5))
def test_a_tensor_comes_out_as_it_went_in(rows: list[list[float]]) -> None:
    array = np.asarray(rows, np.float32)
    infer = InferRequest([InputTensor("vector", list(array.shape), "FP32", array.reshape(-1).tolist())])

    (tensor,) = request_of("m", infer).inputs
    output = output_tensor(VECTORS, tensor)

    assert to_array(tensor, "vector").tolist() == array.tolist()
    assert (output.shape, output.data) == (list(array.shape), array.reshape(-1).tolist())


def test_terms_and_the_models_parameters_are_separated() -> None:
    infer = read_infer(b'{"inputs": [], "parameters": {"deadline": 2, "max_tokens": 5, "tenant": null}}')

    request = request_of("m", infer)

    assert (request.deadline, request.tenant, request.parameters) == (2.0, "default", {"max_tokens": 5})


@given(st.binary(max_size=80))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        request_of("m", read_infer(body))
    except TaxiwayError as error:
        assert isinstance(error, InvalidRequestError)


@pytest.mark.parametrize("opened", [b"[", b'{"a":'])
@pytest.mark.parametrize("levels", [DEEPEST, 500, 900, 980, 100_000])
def test_json_of_any_depth_is_read_or_refused(opened: bytes, levels: int) -> None:
    value = opened * levels + b"1" + (b"]" if opened == b"[" else b"}") * levels
    tensor = b'{"inputs": [{"name": "a", "shape": [1], "datatype": "%s", "data": [%s]}]}'
    with pytest.raises(InvalidRequestError):
        request_of("m", read_infer(tensor % (b"BYTES", value)))
    for body in (tensor % (b"FP32", value), b'{"inputs": [], "parameters": {"a": %s}}' % value):
        with contextlib.suppress(InvalidRequestError):
            request_of("m", read_infer(body))


def test_json_that_would_grow_beyond_measure_is_refused_before_it_is_read() -> None:
    rows = b"[]," * ELEMENTS + b"[]"
    body = b'{"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": [%s]}, "%s"]}'

    with pytest.raises(RequestTooLargeError, match=f"at most {ELEMENTS} values"):
        read_infer(body % (rows, b"x" * 2**20))


@given(st.lists(st.integers(-2, 4), max_size=3), st.lists(st.floats() | st.text(max_size=3) | st.none(), max_size=6))
def test_any_tensor_is_read_or_refused(shape: list[int], data: list[float | str | None]) -> None:
    for datatype in ("FP32", "INT8", "BYTES", "FP99"):
        try:
            to_wire(request_of("m", InferRequest([InputTensor("vector", shape, datatype, data)])).inputs)
        except TaxiwayError as error:
            assert isinstance(error, InvalidRequestError)
