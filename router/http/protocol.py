"""The Open Inference Protocol v2: infer requests as ours, results as its answers.

Source: kserve/open-inference-protocol, inference_rest.md. Service terms and the model's parameters share `parameters`;
a BYTES tensor whose own parameters say `"content_type": "base64"` holds base64 text, in both directions. A BYTES tensor
may hold any JSON value where the model takes or gives one.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec
import numpy as np

from tasks.catalogue import Model, TensorSpec
from taxiway.errors import InvalidRequestError
from taxiway.job import Result
from taxiway.request import TERMS, Request, parse_request
from taxiway.values import DATATYPES, is_tensor, to_array, to_wire

BASE64 = {"content_type": "base64"}


class InputTensor(msgspec.Struct, frozen=True):
    """One input; the first axis of `shape` is the batch, `data` is row-major, flat or nested."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]
    parameters: dict[str, Any] = {}


class WantedOutput(msgspec.Struct, frozen=True):
    """One output that the caller wants."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An infer request's body."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[WantedOutput] = []


class OutputTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One output; `data` is row-major and flat."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]
    parameters: dict[str, Any] = {}


class InferAnswer(msgspec.Struct, frozen=True):
    """An infer answer. `parameters` tell how it ran (`job.RunReport`) and its job's id."""

    model_name: str
    model_version: str
    id: str
    outputs: list[OutputTensor]
    parameters: dict[str, Any]


_decode = msgspec.json.Decoder(InferRequest).decode
_encode_json = msgspec.json.Encoder().encode


def read_infer(body: bytes) -> InferRequest:
    """The infer request in `body`.

    Raises:
        InvalidRequestError: names the field that is wrong.
    """
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.rstrip("`").lstrip(".") or "body"
        raise InvalidRequestError(f"{field}: {what[0].lower()}{what[1:]}", field=field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"body: expected JSON: {error}", field="body") from error


def request_of(model: str, infer: InferRequest) -> Request:
    """The infer request in our form; numeric tensors become bytes, which travel and are read without a loop.

    Raises:
        InvalidRequestError: names the field that is wrong.
    """
    terms = {name: value for name, value in infer.parameters.items() if name in TERMS and value is not None}
    fields = {
        "model": model,
        "inputs": [_tensor(tensor) for tensor in infer.inputs],
        "parameters": {name: value for name, value in infer.parameters.items() if name not in TERMS},
        "outputs": tuple(output.name for output in infer.outputs),
    }
    return parse_request(terms | fields)


def answer_of(model: Model, job: str, result: Result, request_id: str | None = None) -> bytes:
    """The infer answer for a result, as JSON. Its id is the request's own where it had one, else the job's."""
    outputs = [output_tensor(o, result.outputs[o.name]) for o in model.outputs if o.name in result.outputs]
    answer = InferAnswer(
        model_name=model.name,
        model_version=str(model.version),
        id=request_id or job,
        outputs=outputs,
        parameters={"job": job, **msgspec.to_builtins(result.report)},
    )
    return _encode_json(answer)


def output_tensor(spec: TensorSpec, value: Any) -> OutputTensor:
    """An output's value, of one row without the batch axis or of rows, as a tensor with the batch axis."""
    if spec.datatype == "BYTES":
        return _bytes_output(spec, value)
    tensors = value if isinstance(value, list) and value and is_tensor(value[0]) else None
    if tensors is not None:
        array = np.stack([to_array(t, spec.name) for t in tensors])
    elif is_tensor(value):
        array = to_array(value, spec.name)
    else:
        array = np.asarray(value, DATATYPES[spec.datatype])
    rows = array[np.newaxis] if array.ndim == len(spec.shape) - 1 else array
    return OutputTensor(spec.name, list(rows.shape), spec.datatype, rows.reshape(-1).tolist())


def _tensor(tensor: InputTensor) -> dict[str, Any]:
    named = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype}
    field = f"inputs.{tensor.name}"
    if any(length < 0 for length in tensor.shape):
        raise InvalidRequestError(f"{field}: expected lengths >= 0 in shape, got {tensor.shape}", field=field)
    if tensor.datatype != "BYTES":
        return named | {"data": to_array(named | {"data": tensor.data}, field).tobytes()}
    if tensor.parameters.get("content_type") != "base64":
        return named | {"data": tensor.data}
    try:
        return named | {"data": [base64.b64decode(text, validate=True) for text in tensor.data]}
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidRequestError(f"{field}: expected base64 text: {error}", field=field) from error


def _bytes_output(spec: TensorSpec, value: Any) -> OutputTensor:
    shape = _shape(value)
    if len(shape) < len(spec.shape):
        shape, value = [1, *shape], [value]
    flat = _flat(value, len(spec.shape))
    if any(isinstance(v, bytes) for v in flat):
        texts = [base64.b64encode(v if isinstance(v, bytes) else str(v).encode()).decode("ascii") for v in flat]
        return OutputTensor(spec.name, shape[: len(spec.shape)], "BYTES", texts, BASE64)
    return OutputTensor(spec.name, shape[: len(spec.shape)], "BYTES", to_wire(flat))


def _shape(value: Any) -> list[int]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return shape


def _flat(value: Any, axes: int) -> list[Any]:
    flat = value
    for _ in range(axes - 1):
        flat = [below for row in flat for below in row]
    return list(flat)
