"""Open Inference Protocol tensors: from and to Python values, and their binary data. numpy is needed only for arrays.

Binary data are raw elements after the JSON, whose length a header gives. Source: kserve/open-inference-protocol,
extension_binary_data.md. Elements are row-major and little-endian; an element of a BYTES tensor is a four-byte length
and its content.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from taxiway.contract.limits import Buffer
from taxiway.contract.values import (
    BATCH_AXIS,
    DATATYPES,
    Blobs,
    axis_on_some,
    from_wire,
    is_tensor,
    resolved,
    to_array,
    to_wire,
    uneven,
)
from taxiway.errors import InvalidRequestError, invalid, wrong_field

HEADER = "inference-header-content-length"
"""The header with the length of the body's JSON in bytes."""

OCTETS = "application/octet-stream"
"""The media type of a body with binary data."""

SINGLE = "single"
"""The parameter of an input tensor sent without its batch axis: the axis that was added for the protocol.

The result then has no batch axis at any interface. In a response, the parameter tells whether that is the case.
"""

SIZE = "binary_data_size"
"""The parameter of a tensor whose elements follow the JSON: their size in bytes."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Framed:
    """A body: JSON and the binary data after it."""

    text: bytes
    parts: Sequence[Buffer] = ()

    @property
    def pieces(self) -> Sequence[Buffer]:
        """The body's buffers in order, not copied."""
        return (self.text, *self.parts)

    @property
    def body(self) -> bytes:
        """All of it in one."""
        return b"".join(self.pieces) if self.parts else self.text

    @property
    def header_length(self) -> int | None:
        """The length of the JSON; None if the body is only JSON."""
        return len(self.text) if self.parts else None

    @property
    def headers(self) -> dict[str, str]:
        """The body's HTTP headers."""
        if self.header_length is None:
            return {"content-type": "application/json"}
        return {"content-type": OCTETS, HEADER: str(self.header_length)}


def split(body: Buffer, header_length: str | None) -> tuple[Buffer, memoryview]:
    """Split a body into its JSON and the binary data.

    Raises:
        InvalidRequestError: the header is not a length within the body.
    """
    if header_length is None:
        return body, memoryview(b"")
    if not header_length.isascii() or not header_length.isdigit() or not 0 < int(header_length) <= len(body):
        raise wrong_field(HEADER, f"1 to {len(body)} bytes of the body", header_length)
    length, view = int(header_length), memoryview(body)
    return view[:length], view[length:]


def pieces(sizes: Sequence[object], rest: memoryview) -> Iterator[memoryview | None]:
    """Split `rest` into parts of these sizes, in order; None for a size of None.

    Raises:
        InvalidRequestError: a size is invalid, or the sizes do not add up to the length of `rest`.
    """
    start = 0
    for size in sizes:
        if size is None:
            yield None
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - start:
            raise wrong_field(SIZE, f"0 to {len(rest) - start} bytes that follow the JSON", size)
        yield rest[start : start + size]
        start += size
    if start < len(rest):
        raise invalid(SIZE, f"{len(rest)} bytes in all", str(start))


def bytes_part(elements: Sequence[Buffer]) -> bytes:
    """Encode a BYTES tensor's elements, each after its length."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def bytes_elements(part: memoryview, count: int, field: str) -> list[bytes]:
    """Decode the elements of a BYTES tensor.

    Raises:
        InvalidRequestError: there are not exactly `count` elements that fill `part`; names `field`.
    """
    found: list[bytes] = []
    start = 0
    while start + _LENGTH.size <= len(part) and len(found) < count:
        begin = start + _LENGTH.size
        start = begin + _LENGTH.unpack_from(part, start)[0]
        found.append(bytes(part[begin:start]))
    if start != len(part) or len(found) != count:
        raise invalid(field, f"{count} elements, each after its length", f"{len(part)} bytes that do not match")
    return found


_FORMATS = dict(zip(DATATYPES, "?Bbhiqefd", strict=True))
"""`struct`'s letter for each datatype's little-endian bytes."""

Named = dict[str, Any]

RAW = (bytes, memoryview)
"""The types of raw tensor elements."""

_encode_json = msgspec.json.Encoder().encode

Show = Callable[[Any], Any]
"""Converts an output's tensors for the caller: `plain` or `array`."""


def array(value: Any) -> Any:
    """A numpy array if `value` is a tensor of numbers, a list of arrays if it is a list of tensors, else `value`."""
    if is_tensor(value):
        return to_array(value, "outputs") if value["datatype"] != "BYTES" else value["data"]
    if isinstance(value, list) and value and is_tensor(value[0]):
        return [array(row) for row in value]
    return value


def plain(value: Any) -> Any:
    """Nested lists if `value` is a tensor or a list of tensors, else `value`."""
    if is_tensor(value):
        return nest(_flat(value), value["shape"])
    if isinstance(value, list) and value and is_tensor(value[0]):
        return [plain(row) for row in value]
    return value


def nest(flat: list[Any], shape: Sequence[int]) -> Any:
    """Reshape row-major elements into nested lists of `shape`; a scalar if the shape is empty."""
    if not shape:
        return flat[0]
    for axis in range(len(shape) - 1, 0, -1):
        length = shape[axis]
        flat = [flat[i * length : (i + 1) * length] for i in range(math.prod(shape[:axis]))]
    return flat


def encode_inputs(specs: Sequence[Mapping[str, Any]], inputs: Any) -> tuple[list[Named], bool]:
    """OIP input tensors for `inputs`, and whether `inputs` had no batch axis.

    Bytes and array elements stay raw: `body` appends them after the JSON.

    Args:
        specs: the model's inputs from its metadata: `name`, `datatype`, `shape`, and `batch_axis` where that
            is not the first, or None.
        inputs: a plain value, a mapping by name or a list of named tensors.

    Raises:
        InvalidRequestError: a value that cannot be encoded, or a batch axis on only some inputs. An unknown name is
            sent without a value, for the router to refuse.
    """
    named = _by_name([spec["name"] for spec in specs], _raw(inputs))
    by_name = {spec["name"]: spec for spec in specs}
    tensors: list[Named] = []
    alone: list[str] = []
    rows: list[str] = []
    for name, value in named.items():
        if name not in by_name:  # the router's error lists the valid names
            tensors.append(_bytes_tensor(name, []))
            continue
        tensor, single = _encode(by_name[name], value)
        tensors.append(tensor)
        if single is not None:
            (alone if single else rows).append(name)
    if alone and rows:
        raise axis_on_some(alone)
    return tensors, bool(alone) and not rows


def single_row(specs: Sequence[Mapping[str, Any]], tensors: Sequence[Named]) -> list[Named]:
    """Tensors of inputs without a batch axis, each marked with the axis that was added."""
    axes = {spec["name"]: spec.get(BATCH_AXIS, 0) for spec in specs}
    return [
        tensor if axes.get(tensor["name"]) is None else {**tensor, "parameters": {SINGLE: axes[tensor["name"]]}}
        for tensor in tensors
    ]


def body(fields: Named, tensors: Sequence[Named]) -> Framed:
    """The body of an infer request for `tensors` and other `fields`."""
    parts: list[Buffer] = []
    inputs = [_headed(tensor, parts) for tensor in tensors]
    return Framed(_encode_json({"inputs": inputs, **fields}), parts)


def inline(fields: Named, tensors: Sequence[Named]) -> bytes:
    """The body of an infer request as JSON alone: all elements are in it."""
    inputs = [
        {**tensor, "data": to_wire(tensor["data"]) if tensor["datatype"] == "BYTES" else _flat(tensor)}
        for tensor in tensors
    ]
    return _encode_json({"inputs": inputs, **fields})


def placed(tensors: Sequence[Named], rest: memoryview) -> list[Named]:
    """Output tensors with their `data` taken from the bytes after the JSON.

    Raises:
        InvalidRequestError: the bytes do not match the tensors' sizes.
    """
    found = pieces([tensor.get("parameters", {}).get(SIZE) for tensor in tensors], rest)
    return [
        tensor if piece is None else {**tensor, "data": piece} for tensor, piece in zip(tensors, found, strict=True)
    ]


def decode_outputs(tensors: Sequence[Named], single: bool | None, show: Show) -> dict[str, Any]:
    """Values by name: one value if the request was `single` (if None: if there is one row), else rows."""
    axes = {tensor["name"]: tensor.get("parameters", {}).get(BATCH_AXIS, 0) for tensor in tensors}
    bare = single if single is not None else all(one["shape"][axes[one["name"]]] == 1 for one in tensors)
    rows = {tensor["name"]: _rows(tensor, show) for tensor in tensors}
    return {name: _only_row(row, axes[name]) if bare else row for name, row in rows.items()}


def _only_row(rows: Any, axis: int) -> Any:
    """A batch of one row, in lists or an array, without its batch axis."""
    if axis == 0:
        return rows[0]
    if isinstance(rows, list):
        return [_only_row(below, axis - 1) for below in rows]
    return rows.squeeze(axis)


def _by_name(names: Sequence[str], inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, list) and inputs and all(is_tensor(i) and "name" in i for i in inputs):
        return {tensor["name"]: tensor for tensor in inputs}
    mapping = isinstance(inputs, dict) and bool(inputs) and not is_tensor(inputs)
    if mapping and (len(names) > 1 or inputs.keys() <= set(names)):
        return dict(inputs)
    return {names[0]: inputs}


def _raw(inputs: Any) -> Any:
    """`inputs` as they would be after encoding and decoding, without the detour through text."""
    every = Blobs(limit=-1, linked=True)
    return resolved(to_wire(inputs, "inputs", every), every.contents)


def _headed(tensor: Named, parts: list[Buffer]) -> Named:
    """The tensor's JSON form; its raw data is appended to `parts`."""
    data = tensor["data"]
    if isinstance(data, list):
        if tensor["datatype"] != "BYTES" or not all(isinstance(row, RAW) for row in data):
            return {**tensor, "data": to_wire(data)}
        data = bytes_part(data)
    parts.append(data)
    parameters = {**tensor.get("parameters", {}), SIZE: len(data)}
    return {name: tensor[name] for name in ("name", "shape", "datatype")} | {"parameters": parameters}


def _encode(spec: Mapping[str, Any], value: Any) -> tuple[Named, bool | None]:
    """The tensor, and whether its batch axis was missing; None if the input has none."""
    if is_tensor(value):
        return _encode_tensor(spec, value)
    if spec["datatype"] == "BYTES":
        rows = value if isinstance(value, list) else [value]
        return _bytes_tensor(spec["name"], rows), not isinstance(value, list)
    shape, flat = _measure(value)
    if len(flat) != math.prod(shape) or any(isinstance(element, list) for element in flat):
        raise uneven(f"inputs.{spec['name']}", spec["datatype"])
    batch, single = _batched(spec, shape)
    return {"name": spec["name"], "shape": batch, "datatype": spec["datatype"], "data": flat}, single


def _encode_tensor(spec: Mapping[str, Any], tensor: Named) -> tuple[Named, bool | None]:
    name, datatype, shape = spec["name"], tensor["datatype"], list(tensor["shape"])
    if datatype == "BYTES":
        return {**_bytes_tensor(name, tensor["data"]), "shape": shape}, False
    batch, single = _batched(spec, shape)
    data = tensor["data"] if isinstance(tensor["data"], RAW) else _measure(tensor["data"])[1]
    return {"name": name, "shape": batch, "datatype": datatype, "data": data}, single


def _batched(spec: Mapping[str, Any], shape: list[int]) -> tuple[list[int], bool | None]:
    """The shape with its batch axis, and whether that was missing; None if the input has none."""
    axis = spec.get(BATCH_AXIS, 0)
    if axis is None:
        return shape, None
    single = len(shape) == len(spec["shape"]) - 1
    return ([*shape[:axis], 1, *shape[axis:]] if single else shape), single


def _bytes_tensor(name: str, rows: Sequence[Any]) -> Named:
    return {"name": name, "shape": [len(rows)], "datatype": "BYTES", "data": list(rows)}


def _measure(value: Any) -> tuple[list[int], list[Any]]:
    """The shape of nested lists, taken from the first element of each, and their elements in row-major order."""
    shape: list[int] = []
    flat = [value]
    while flat and isinstance(flat[0], list):
        shape.append(len(flat[0]))
        flat = [below for row in flat for below in (row if isinstance(row, list) else [row])]
    return shape, flat


def _flat(tensor: Named) -> list[Any]:
    """The tensor's elements in row-major order.

    Raises:
        InvalidRequestError: bytes that do not fill the shape.
    """
    data, datatype, shape = tensor["data"], tensor["datatype"], tensor["shape"]
    if not isinstance(data, RAW):
        return _measure(data)[1] if datatype != "BYTES" else list(data)
    try:
        return list(struct.unpack(f"<{math.prod(shape)}{_FORMATS[datatype]}", data))
    except (struct.error, KeyError) as error:
        raise InvalidRequestError(f"expected {datatype} data of shape {shape}: {error}", field="inputs") from error


def _rows(tensor: Named, show: Show) -> Any:
    if tensor.get("parameters", {}).get("content_type") == "base64":
        return [base64.b64decode(text) for text in tensor["data"]]
    if tensor["datatype"] == "BYTES":
        return from_wire(nest(_flat(tensor), tensor["shape"]))
    return show(tensor) if len(tensor["shape"]) > 1 else plain(tensor)  # a number a row stays a number
