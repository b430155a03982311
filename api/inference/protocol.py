"""The Open Inference Protocol v2: infer requests read and converted to ours, results to its answers.

Sources: kserve/open-inference-protocol, inference_rest.md and extension_binary_data.md. Service terms and the
model's parameters share `parameters`.

- A BYTES tensor with the parameter `"content_type": "base64"` holds base64 text, in both directions. It may hold any
  JSON value if the model takes or gives one; bytes in it are tagged as `values` tags them.
- `taxiway.contract.tensors` reads and writes the tensors that follow the JSON.
- A call that decodes JSON holds the interpreter lock throughout. Numeric data of a large body is therefore left as text
  at first, and then read in pieces; everything else is limited to what one call decodes in time.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from tasks.models.model import Model
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.job import Result
from taxiway.contract.limits import (
    ELEMENTS,
    LARGE,
    WHOLE_VALUES_DIVISOR,
    Buffer,
    check_count,
    check_elements,
    check_json,
    count_values,
    elements_of,
)
from taxiway.contract.request import TERMS, Priority, Request, parse_request
from taxiway.contract.tensors import SINGLE, SIZE, Framed, bytes_elements, bytes_part, pieces, split
from taxiway.contract.values import BATCH_AXIS, DATATYPES, from_wire, is_tensor, numbers, raw_bytes, to_array, to_wire
from taxiway.errors import UNREADABLE, ExecutionError, InvalidRequestError, cut, quoted, unreadable, wrong_field

BINARY_OUTPUTS = "binary_data_output"
"""The request parameter that selects binary form for all outputs; an output's own `binary_data` overrides it."""

BASE64 = {"content_type": "base64"}


class InputTensor(msgspec.Struct, frozen=True):
    """One input; `shape` has the model's batch axis, `data` is row-major, flat or nested.

    Without `data`, the parameter `binary_data_size` gives the number of bytes after the JSON that hold the elements;
    once read, they are in `data`.
    """

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class WantedOutput(msgspec.Struct, frozen=True):
    """One requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An infer request's body."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[WantedOutput] = []


class OutputTensor(InputTensor, frozen=True, omit_defaults=True):
    """One output; `data` is row-major and flat. Without it, `binary_data_size` bytes after the JSON are the data."""


class InferAnswer(msgspec.Struct, frozen=True):
    """An infer answer.

    `parameters` hold the run report (`job.RunReport`), the job's id and, if known, whether the request was a `single`
    row without the batch axis.
    """

    model_name: str
    model_version: str
    id: str
    outputs: list[OutputTensor]
    parameters: dict[str, Any]


_ENCODED_ELEMENTS = 2**16  # elements encoded per call: 6 ms
_TIMEOUT = "timeout"  # of Triton, in microseconds
_KNOWN_PARAMETERS = TERMS | {BINARY_OUTPUTS, _TIMEOUT}
_UNSUPPORTED = ("shared_memory_region", "classification")
"""Triton's parameters of outputs whose answers would be others than those in the body."""

_encode_json = msgspec.json.Encoder().encode


def request_of(model: str, infer: InferRequest, most: int = ELEMENTS) -> Request:
    """The infer request in our form; numeric tensors become bytes, which are sent and read without a loop.

    Raises:
        InvalidRequestError: names the wrong field.
        RequestTooLargeError: a BYTES tensor has more than `most` elements.
    """
    for output in infer.outputs:
        for name in _UNSUPPORTED:
            if name in output.parameters:
                raise wrong_field(
                    f"outputs.{output.name}.{name}", "none, as it is not supported", output.parameters[name]
                )
    terms = {name: value for name, value in infer.parameters.items() if name in TERMS}
    if type(terms.get("priority")) is int:
        terms["priority"] = _priority_of(terms["priority"])
    if _TIMEOUT in infer.parameters:
        terms.setdefault("deadline", _deadline_of(infer.parameters[_TIMEOUT]))
    tensors = [_tensor(tensor, most) for tensor in infer.inputs]
    fields = {
        "model": model,
        "inputs": _single(infer, tensors) if _is_single(infer) else tensors,
        "parameters": {name: value for name, value in infer.parameters.items() if name not in _KNOWN_PARAMETERS},
        "outputs": [output.name for output in infer.outputs],
    }
    return parse_request(terms | fields)


def _priority_of(number: int) -> Priority | None:
    """Our priority for Triton's number: 0 is the default, 1 the highest, and larger numbers are lower.

    Raises:
        InvalidRequestError: it is negative; names `priority`.
    """
    if number < 0:
        raise wrong_field("priority", "a name, or a whole number >= 0", number)
    if number == 0:
        return None
    ranks: tuple[Priority, ...] = ("high", "normal", "low")
    return ranks[min(number, len(ranks)) - 1]


def _deadline_of(timeout: Any) -> float | None:
    """Seconds for Triton's timeout, which is in microseconds; 0 is the default.

    Raises:
        InvalidRequestError: it is not such a number; names `timeout`.
    """
    if type(timeout) is not int or not 0 <= timeout < 2**63:
        raise wrong_field(_TIMEOUT, "a whole number of microseconds", timeout)
    return timeout / 1e6 if timeout else None


def _is_single(infer: InferRequest) -> bool:
    """Whether the caller sent one row without the batch axis; parameters of tensors say where it was added."""
    marked = [tensor for tensor in infer.inputs if SINGLE in tensor.parameters]
    names = {tensor.name for tensor in infer.inputs}
    return bool(marked) and len(names) == len(infer.inputs) and all(map(_has_added_axis, marked))


def _has_added_axis(tensor: InputTensor) -> bool:
    axis = tensor.parameters[SINGLE]
    return type(axis) is int and 0 <= axis < len(tensor.shape) and tensor.shape[axis] == 1


def _single(infer: InferRequest, tensors: list[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    """The one row by the inputs' names; the unchanged tensors if an element is missing."""
    if any(isinstance(tensor["data"], list) and len(tensor["data"]) != 1 for tensor in tensors):
        return tensors
    axes = (given.parameters.get(SINGLE) for given in infer.inputs)
    return {tensor["name"]: _row(tensor, axis) for tensor, axis in zip(tensors, axes, strict=True)}


def _row(tensor: dict[str, Any], axis: int | None) -> Any:
    """A one-row tensor without its batch axis, if it has one; a BYTES element unchanged."""
    if axis is None:
        return tensor
    if tensor["datatype"] == "BYTES":
        return tensor["data"][0]
    shape = [*tensor["shape"][:axis], *tensor["shape"][axis + 1 :]]
    return {"shape": shape, "datatype": tensor["datatype"], "data": tensor["data"]}


WantsBinary = Callable[[TensorSpec], bool]
"""Whether an output is sent after the JSON."""


def wants_binary(infer: InferRequest) -> WantsBinary:
    """The request's choice for each output."""
    every = infer.parameters.get(BINARY_OUTPUTS) is True
    chosen: Mapping[str, Any] = {output.name: output.parameters.get("binary_data", every) for output in infer.outputs}
    return lambda spec: chosen.get(spec.name, every) is True


def answer_of(model: Model, job: str, result: Result, wants: WantsBinary, request_id: str | None = None) -> Framed:
    """The infer answer for a result. Its id is the request's own if it had one, else the job's."""
    parts: list[bytes | memoryview] = []
    outputs = []
    for spec in model.outputs:
        if spec.name not in result.outputs:
            continue
        value = result.outputs[spec.name]
        if wants(spec):
            tensor, part = _binary_output(spec, value)
            outputs.append(tensor)
            parts.append(part)
        else:
            outputs.append(output_tensor(spec, value))
    single = {} if result.single is None else {SINGLE: result.single}
    answer = InferAnswer(
        model_name=model.name,
        model_version=str(model.version),
        id=request_id or job,
        outputs=outputs,
        parameters={"job": job, **single, **msgspec.to_builtins(result.report)},
    )
    return Framed(_encode_json(answer), parts)


def output_tensor(spec: TensorSpec, value: Any) -> OutputTensor:
    """An output's value, one row without the batch axis or several rows, as a tensor with the batch axis."""
    if spec.datatype == "BYTES":
        return _bytes_output(spec, value)
    rows = array_output(spec, value)
    return OutputTensor(spec.name, list(rows.shape), spec.datatype, _listed(rows.reshape(-1)), _axis(spec))


def _listed(flat: np.ndarray) -> Any:
    """The elements as a list, or as JSON built in pieces if one call would hold the interpreter lock for long."""
    if len(flat) <= _ENCODED_ELEMENTS:
        return flat.tolist()
    parts = [
        _encode_json(flat[start : start + _ENCODED_ELEMENTS].tolist())[1:-1]
        for start in range(0, len(flat), _ENCODED_ELEMENTS)
    ]
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")


def _binary_output(spec: TensorSpec, value: Any) -> tuple[OutputTensor, bytes | memoryview]:
    """An output without its data, and the data."""
    if spec.datatype == "BYTES":
        shape, flat = _bytes_rows(spec, value)
        part: bytes | memoryview = bytes_part([_content(element) for element in flat])
    else:
        rows = array_output(spec, value)
        shape, part = list(rows.shape), raw_bytes(rows)
    return OutputTensor(spec.name, shape, spec.datatype, parameters={SIZE: len(part), **_axis(spec)}), part


def _axis(spec: TensorSpec) -> dict[str, Any]:
    """The output's parameter for its batch axis, unless that is the first."""
    return {BATCH_AXIS: spec.batch_axis} if spec.batch_axis else {}


def array_output(spec: TensorSpec, value: Any) -> np.ndarray:
    """The output's rows, with the batch axis in its place. Raises `ExecutionError` for rows of unlike shapes."""
    axis = spec.batch_axis or 0
    tensors = value if isinstance(value, list) and value and is_tensor(value[0]) else None
    try:
        if tensors is not None:
            array = np.stack([to_array(t, spec.name) for t in tensors], axis)
        elif is_tensor(value):
            array = to_array(value, spec.name)
        else:
            array = np.asarray(value, DATATYPES[spec.datatype])
    except ValueError as error:
        raise ExecutionError(f"output {spec.name!r}: expected rows of one shape, {error}") from error
    return np.expand_dims(array, axis) if array.ndim == len(spec.shape) - 1 else array


def _tensor(tensor: InputTensor, most: int) -> dict[str, Any]:
    field = field_of(tensor)
    elements = elements_of(tensor.shape, field)
    if tensor.datatype == "BYTES":
        check_elements(elements, most, field)
    named = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype, "data": tensor.data}
    data = _elements(tensor, elements, field) if tensor.datatype == "BYTES" else raw_bytes(to_array(named, field))
    return {**named, "data": data}


def field_of(tensor: InputTensor) -> str:
    """The name of an input in error messages."""
    return f"inputs.{cut(tensor.name)}"


def _elements(tensor: InputTensor, count: int, field: str) -> Any:
    """The elements of a BYTES tensor of `count` elements."""
    data: Any = tensor.data
    if isinstance(data, memoryview):
        return bytes_elements(data, count, field)
    if tensor.parameters.get("content_type") != "base64":
        return from_wire(data, field)
    try:
        return [base64.b64decode(text, validate=True) for text in data]
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidRequestError(f"{field}: expected base64 text: {cut(str(error))}", field=field) from error


def _bytes_output(spec: TensorSpec, value: Any) -> OutputTensor:
    shape, flat = _bytes_rows(spec, value)
    if any(isinstance(v, bytes) for v in flat):
        texts = [base64.b64encode(_content(v)).decode("ascii") for v in flat]
        return OutputTensor(spec.name, shape, "BYTES", texts, BASE64)
    return OutputTensor(spec.name, shape, "BYTES", to_wire(flat))


def _bytes_rows(spec: TensorSpec, value: Any) -> tuple[list[int], list[Any]]:
    """Shape and elements of a BYTES output, with the batch axis."""
    shape = _shape(value)
    if len(shape) < len(spec.shape):
        shape, value = [1, *shape], [value]
    return shape[: len(spec.shape)], _flat(value, len(spec.shape))


def _content(element: Any) -> bytes:
    """A BYTES element as bytes: text as UTF-8, any other JSON value as JSON."""
    if isinstance(element, (bytes, str)):
        return element if isinstance(element, bytes) else element.encode()
    return _encode_json(to_wire(element))


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


T = TypeVar("T")

DECODED_BYTES = 2**14
"""Bytes of numbers decoded per call: 2 ms; 50 ms if every number is as slow to parse as possible."""

DECODED_VALUES = 2**14
"""Values that one call decodes in 2 ms, however long their text is: a photograph as base64 is one."""

_NULL, _EMPTY = msgspec.Raw(b"null"), msgspec.Raw(b"{}")
_NO_LISTS = b"[] \t\r\n"
_BUT_LISTS = bytes(set(range(256)) - set(b"[],"))


class _LargeTensor(msgspec.Struct, frozen=True):
    """An input of which only name and datatype are decoded."""

    name: str
    shape: msgspec.Raw
    datatype: str
    data: msgspec.Raw = _NULL
    parameters: msgspec.Raw = _EMPTY

    @property
    def has_numbers(self) -> bool:
        """Whether its data can be read in pieces: numbers, possibly in lists."""
        data = bytes(self.data)
        return self.datatype in DATATYPES and data != b"null" and b'"' not in data and b"{" not in data


class _LargeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An infer request whose inputs are decoded in part, and the rest not at all."""

    inputs: list[_LargeTensor]
    id: msgspec.Raw = _NULL
    parameters: msgspec.Raw = _EMPTY
    outputs: msgspec.Raw = msgspec.Raw(b"[]")


_decode = msgspec.json.Decoder(InferRequest).decode
_decode_large = msgspec.json.Decoder(_LargeRequest).decode
_decode_list = msgspec.json.Decoder(list[Any]).decode


def read_infer(body: Buffer, header_length: str | None = None, most: int = ELEMENTS) -> InferRequest:
    """The infer request in `body`; `header_length` is the header with the index of its binary part.

    Raises:
        InvalidRequestError: names the wrong field.
        RequestTooLargeError: more than `most` values in its JSON, or more than a fifth of that outside numeric tensors.
    """
    text, rest = split(body, header_length)
    infer = _read_json(text, _decode) if len(text) <= LARGE else _read_large(text, most)
    sizes = [_binary_size(tensor) for tensor in infer.inputs]
    if not rest and all(size is None for size in sizes):
        return infer
    pairs = zip(infer.inputs, pieces(sizes, rest), strict=True)
    inputs = [tensor if piece is None else msgspec.structs.replace(tensor, data=piece) for tensor, piece in pairs]
    return msgspec.structs.replace(infer, inputs=inputs)


def _binary_size(tensor: InputTensor) -> object:
    """The number of bytes after the JSON that belong to the tensor; None if its data is in the JSON."""
    size = tensor.parameters.get(SIZE)
    if (size is None) == (tensor.data is None):
        field = field_of(tensor)
        raise InvalidRequestError(f"{field}: expected either data or the parameter {SIZE}", field=field)
    return size


def _read_json(text: Buffer, decode: Callable[[Buffer], T]) -> T:
    try:
        return decode(text)
    except UNREADABLE as error:
        raise unreadable(error) from error


def _read_large(text: Buffer, most: int) -> InferRequest:
    found = count_values(text)
    if found <= min(DECODED_VALUES, most // WHOLE_VALUES_DIVISOR):
        return _read_json(text, _decode)
    check_count(found, most)
    large = _read_json(text, _decode_large)
    inputs = [msgspec.structs.replace(one, data=_NULL) if one.has_numbers else one for one in large.inputs]
    rest = _encode_json(msgspec.structs.replace(large, inputs=inputs))
    check_json(rest, most // WHOLE_VALUES_DIVISOR)
    infer = _read_json(rest, _decode)
    pairs = zip(infer.inputs, large.inputs, strict=True)
    tensors = [_with_numbers(tensor, bytes(one.data)) if one.has_numbers else tensor for tensor, one in pairs]
    return msgspec.structs.replace(infer, inputs=tensors)


def _with_numbers(tensor: InputTensor, text: bytes) -> InputTensor:
    """The tensor with the numbers in its JSON data: raw, row-major and little-endian.

    Raises:
        InvalidRequestError: lists of unequal lengths, or not numbers of its datatype.
    """
    field = field_of(tensor)
    lists = text.translate(None, _BUT_LISTS)
    if lists.count(b"[") > 1 and lists != _lists(tensor.shape, field, len(text)):
        raise wrong_field(field, f"one list, or lists in lists by the shape {quoted(tensor.shape)}", "others")
    pieces = [numbers(_decode_piece(piece, field), tensor.datatype, field) for piece in _pieces(text)]
    array = np.concatenate(pieces) if pieces else np.empty(0, DATATYPES[tensor.datatype])
    return msgspec.structs.replace(tensor, data=raw_bytes(array))


def _pieces(text: bytes) -> Iterator[bytes]:
    """The numbers in nested lists, as flat lists of limited length."""
    flat = text.translate(None, _NO_LISTS)
    if not flat.strip(b","):  # lists of no elements
        return
    start = 0
    while start < len(flat):
        end = flat.find(b",", start + DECODED_BYTES)
        end = len(flat) if end < 0 else end
        yield b"[%s]" % flat[start:end]
        start = end + 1


def _decode_piece(piece: bytes, field: str) -> list[Any]:
    try:
        return _decode_list(piece)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"{field}: expected numbers: {cut(str(error))}", field=field) from error


def _lists(shape: list[int], field: str, most: int) -> bytes:
    """The brackets and commas of nested lists with this shape."""
    elements_of(shape, field, most)
    lists = b""
    for length in reversed(shape):
        lists = b"[%s]" % b",".join([lists] * length)
    return lists
