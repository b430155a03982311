"""The inputs and outputs that an ONNX file declares, read without its weights and without ONNX Runtime.

Only the few fields below are decoded and the rest is skipped, so a file of gigabytes costs milliseconds, in a router
as in a worker. Source: onnx.proto of ONNX 1.18 (`ModelProto`, `GraphProto`, `ValueInfoProto`, `TypeProto`).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_INITIALIZER_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_ELEMENT, _TENSOR_SHAPE = 1, 2
_SHAPE_DIMENSION = 1
_DIMENSION_VALUE = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}

_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
}
"""Open Inference Protocol datatypes by ONNX's element type."""


class GraphError(ValueError):
    """A file is no ONNX graph; says where reading it failed."""


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """One input or output of a graph: -1 in `shape` is an axis of any length; None is a shape that is not declared.

    `datatype` is the Open Inference Protocol's; empty where that has none for it.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a graph takes and gives, in its own order; inputs with a default inside the graph are left out."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]


_Value = int | memoryview


def read_signature(path: Path) -> Signature:
    """The signature of the ONNX file at `path`.

    Raises:
        GraphError: it is no ONNX graph, or ends too early.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:  # an empty file
            raise GraphError("expected an ONNX graph, got an empty file") from error
    try:
        graph = next((value for number, value in _fields(content) if number == _MODEL_GRAPH), None)
        if not isinstance(graph, memoryview):
            raise GraphError("expected an ONNX graph, got a file without one")
        return _signature(graph)
    except (IndexError, UnicodeDecodeError) as error:
        raise GraphError("expected an ONNX graph, got a file that is cut short or of another kind") from error


def _signature(graph: memoryview) -> Signature:
    inputs, outputs, defaults = [], [], set()
    for number, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == _GRAPH_INPUT:
            inputs.append(_tensor(value))
        elif number == _GRAPH_OUTPUT:
            outputs.append(_tensor(value))
        elif number == _GRAPH_INITIALIZER:
            defaults.add(_text(value, _INITIALIZER_NAME))
    return Signature(tuple(one for one in inputs if one.name not in defaults), tuple(outputs))


def _tensor(value: memoryview) -> GraphTensor:
    kind = _inside(_inside(value, _VALUE_TYPE), _TYPE_TENSOR)
    element, shape = 0, None
    for number, field in _fields(kind):
        if number == _TENSOR_ELEMENT and isinstance(field, int):
            element = field
        elif number == _TENSOR_SHAPE and isinstance(field, memoryview):
            shape = tuple(_length(axis) for one, axis in _fields(field) if one == _SHAPE_DIMENSION)
    return GraphTensor(_text(value, _VALUE_NAME), _DATATYPES.get(element, ""), shape)


def _length(axis: _Value) -> int:
    """An axis's length; -1 where it has a name, or nothing."""
    if isinstance(axis, int):
        raise GraphError("expected an ONNX graph, got a shape that is none")
    return next((n for number, n in _fields(axis) if number == _DIMENSION_VALUE and isinstance(n, int)), -1)


def _inside(message: memoryview, wanted: int) -> memoryview:
    """The message in a field; an empty one where the field is not there."""
    found = (value for number, value in _fields(message) if number == wanted and isinstance(value, memoryview))
    return next(found, memoryview(b""))


def _text(message: memoryview, wanted: int) -> str:
    return bytes(_inside(message, wanted)).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, _Value]]:
    """Number and value of each field in protobuf's wire format: a whole number, or the bytes of anything else.

    Raises:
        IndexError: the message ends inside a field.
        GraphError: no field begins where one should.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, length = key & 7, 0
        if kind == _VARINT:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in _WIDTHS:
            length = _WIDTHS[kind]
        else:
            raise GraphError("expected an ONNX graph, got a file of another kind")
        if at + length > len(message):
            raise IndexError
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The whole number at `at`, of up to ten bytes, and where the next begins."""
    value = 0
    for place in range(10):
        byte = message[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise GraphError("expected an ONNX graph, got a file of another kind")
