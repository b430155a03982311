"""Between Python values and Open Inference Protocol tensors. numpy is not needed; arrays come out as nested lists."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from taxiway.errors import InvalidRequestError
from taxiway.job import Result
from taxiway.values import from_wire, is_tensor, to_wire

_FORMATS = {
    "BOOL": "?",
    "UINT8": "B",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""`struct`'s letter for each datatype's little-endian bytes."""

Named = dict[str, Any]


def plain_result(result: Result) -> Result:
    """The result with its tensors as nested lists, the same from every door."""
    return msgspec.structs.replace(result, outputs={name: plain(value) for name, value in result.outputs.items()})


def plain(value: Any) -> Any:
    """`value`, or its nested lists where it is a tensor or a list of tensors."""
    if is_tensor(value):
        return nest(_flat(value), value["shape"])
    if isinstance(value, list) and value and is_tensor(value[0]):
        return [plain(row) for row in value]
    return value


def nest(flat: list[Any], shape: Sequence[int]) -> Any:
    """The elements in row-major order, as nested lists of `shape`; a scalar where the shape is empty."""
    if not shape:
        return flat[0]
    for axis in range(len(shape) - 1, 0, -1):
        length = shape[axis]
        flat = [flat[i * length : (i + 1) * length] for i in range(math.prod(shape[:axis]))]
    return flat


def encode_inputs(specs: Sequence[Named], inputs: Any) -> tuple[list[Named], bool]:
    """OIP input tensors for `inputs`, and whether these came without a batch axis.

    Args:
        specs: the model's inputs as its metadata tells them: `name`, `datatype`, `shape` with the batch axis first.
        inputs: a plain value, a mapping by name or a list of named tensors.

    Raises:
        InvalidRequestError: a value that has no form on the wire, an unknown name, or a batch axis on some inputs only.
    """
    named = _by_name([spec["name"] for spec in specs], from_wire(to_wire(inputs)))
    by_name = {spec["name"]: spec for spec in specs}
    tensors, alone = [], set()
    for name, value in named.items():
        if name not in by_name:
            known = ", ".join(sorted(by_name))
            raise InvalidRequestError(f"inputs: expected inputs among {known}, got {name!r}", field="inputs")
        tensor, single = _encode(by_name[name], value)
        tensors.append(tensor)
        alone.add(single)
    if len(alone) > 1:
        raise InvalidRequestError("inputs: expected a batch axis on all inputs or on none", field="inputs")
    return tensors, alone == {True}


def decode_outputs(tensors: Sequence[Named], single: bool | None) -> dict[str, Any]:
    """Values by name: one where the request was `single` (None: where there is one row), else a list of rows."""
    rows = {tensor["name"]: _rows(tensor) for tensor in tensors}
    bare = single if single is not None else all(len(row) == 1 for row in rows.values())
    return {name: row[0] if bare else row for name, row in rows.items()}


def _by_name(names: Sequence[str], inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, list) and inputs and all(is_tensor(i) and "name" in i for i in inputs):
        return {tensor["name"]: tensor for tensor in inputs}
    mapping = isinstance(inputs, dict) and bool(inputs) and not is_tensor(inputs)
    if mapping and (len(names) > 1 or inputs.keys() <= set(names)):
        return dict(inputs)
    return {names[0]: inputs}


def _encode(spec: Mapping[str, Any], value: Any) -> tuple[Named, bool]:
    if is_tensor(value):
        return _encode_tensor(spec, value)
    if spec["datatype"] == "BYTES":
        rows = value if isinstance(value, list) else [value]
        return _bytes_tensor(spec["name"], rows), not isinstance(value, list)
    shape, flat = _measure(value)
    single = len(shape) == len(spec["shape"]) - 1
    batch = [1, *shape] if single else shape
    return {"name": spec["name"], "shape": batch, "datatype": spec["datatype"], "data": flat}, single


def _encode_tensor(spec: Mapping[str, Any], tensor: Named) -> tuple[Named, bool]:
    name, datatype, shape = spec["name"], tensor["datatype"], list(tensor["shape"])
    if datatype == "BYTES":
        return {**_bytes_tensor(name, tensor["data"]), "shape": shape}, False
    single = len(shape) == len(spec["shape"]) - 1
    batch = [1, *shape] if single else shape
    return {"name": name, "shape": batch, "datatype": datatype, "data": _flat(tensor)}, single


def _bytes_tensor(name: str, rows: Sequence[Any]) -> Named:
    tensor: Named = {"name": name, "shape": [len(rows)], "datatype": "BYTES", "data": rows}
    if not any(isinstance(row, bytes) for row in rows):
        return tensor
    encoded = [base64.b64encode(row if isinstance(row, bytes) else str(row).encode()).decode() for row in rows]
    return tensor | {"data": encoded, "parameters": {"content_type": "base64"}}


def _measure(value: Any) -> tuple[list[int], list[Any]]:
    """The shape of nested lists, told by the first of each, and their elements in row-major order."""
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
    if not isinstance(data, bytes):
        return _measure(data)[1] if datatype != "BYTES" else list(data)
    try:
        return list(struct.unpack(f"<{math.prod(shape)}{_FORMATS[datatype]}", data))
    except (struct.error, KeyError) as error:
        raise InvalidRequestError(f"expected {datatype} data of shape {shape}: {error}", field="inputs") from error


def _rows(tensor: Named) -> list[Any]:
    if tensor.get("parameters", {}).get("content_type") == "base64":
        return [base64.b64decode(text) for text in tensor["data"]]
    rows: list[Any] = nest(_flat(tensor), tensor["shape"])
    return from_wire(rows) if tensor["datatype"] == "BYTES" else rows
