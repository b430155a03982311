"""The files beside a model.yaml, and the code that it names: recipes, networks, Python callables, and runtimes.

What is known of a file, its digest and an ONNX signature, is read again only if the file changed. An ONNX file's inputs
and outputs are read without its weights and without ONNX Runtime, and compared with model.yaml. Only the few fields
below are decoded and the rest is skipped, so a file of gigabytes costs milliseconds, in a router as in a worker.
Source: onnx.proto of ONNX 1.18 (`ModelProto`, `GraphProto`, `ValueInfoProto`, `TypeProto`).

A name of code is looked up in this order:

1. `<name>.py` beside model.yaml, except for runtimes;
2. `workers/<kind>/<name>.py`, for what several models share;
3. an entry point of that name in the group `taxiway.<kind>` of an installed package.

A hyphen in a name is an underscore in the module's. Looking up imports nothing but the parent packages of an entry
point; `Code.load` imports the module.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tasks.models.tensor_spec import TensorSpec
from tasks.settings import TREE

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_INITIALIZER_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_ELEMENT, _TENSOR_SHAPE = 1, 2
_SHAPE_DIMENSION = 1
_DIMENSION_VALUE = 1
_LONGEST_AXIS = 2**63 - 1  # beyond it, a varint of the type int64 is negative

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
    """A file is not an ONNX graph; says where reading it failed."""


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """One input or output of a graph. In `shape`, -1 is an axis of any length; None means that no shape is declared.

    `datatype` is the Open Inference Protocol's; empty if it has none for it.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class GraphSignature:
    """A graph's inputs and outputs, in its own order, without inputs that have a default in the graph."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]


Difference = tuple[str, str, object]
"""A path inside model.yaml, what was expected there, and what it says."""


def differences(
    signature: GraphSignature, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, rows: int = 0
) -> Iterator[Difference]:
    """Where the declared tensors differ from the graph's. `rows` is the largest batch, if limited.

    A graph may have more outputs than are declared; all of its inputs must be declared.
    """
    yield from _unlike("inputs", signature.inputs, inputs, rows)
    yield from _unlike("outputs", signature.outputs, outputs, rows)
    declared = [spec.called for spec in inputs]
    for missing in [one.name for one in signature.inputs if one.name not in declared]:
        yield "inputs", f"an input {missing!r}", declared


def _unlike(place: str, found: Sequence[GraphTensor], specs: Sequence[TensorSpec], rows: int) -> Iterator[Difference]:
    named = {one.name: one for one in found}
    for index, spec in enumerate(specs):
        tensor = named.get(spec.called)
        where = f"{place}.{index}"
        if tensor is None:
            yield f"{where}.{'source' if spec.source else 'name'}", f"one of {sorted(named)}", spec.called
        elif not _converts(place, tensor.datatype, spec.datatype):
            yield f"{where}.datatype", tensor.datatype or "another type", spec.datatype
        elif tensor.shape is not None and not _fits(place, tensor.shape, spec, rows):
            yield f"{where}.shape", _shape_words(tensor.shape, spec, rows), list(spec.shape)


def _converts(place: str, graph: str, declared: str) -> bool:
    """Whether the graph takes the declared type, or returns one that converts to it: only floats convert to floats."""
    if graph == declared or place == "inputs":
        return graph == declared
    return graph.startswith("FP") == declared.startswith("FP") and "BYTES" not in (graph, declared)


def _fits(place: str, shape: Sequence[int], spec: TensorSpec, rows: int) -> bool:
    if len(shape) != len(spec.shape):
        return False
    pairs = enumerate(zip(shape, spec.shape, strict=True))
    return all(
        _axis_fits(place, length, declared, batch=axis == spec.batch_axis, rows=rows)
        for axis, (length, declared) in pairs
    )


def _axis_fits(place: str, length: int, declared: int, *, batch: bool, rows: int) -> bool:
    if length == 0 and place == "outputs":  # ONNX Runtime insists on it for inputs only
        return True
    if batch:
        return length == -1 or length == rows == 1
    return length in (-1, declared) or (declared == -1 and place == "outputs")


def _shape_words(shape: Sequence[int], spec: TensorSpec, rows: int) -> str:
    axis = spec.batch_axis
    if axis is not None and len(shape) == len(spec.shape) and shape[axis] != -1 and rows != 1:
        return f"a batch axis of any length, and not {shape[axis]} (or `max_batch: 1` where that is 1),"
    return str(list(shape))


_Value = int | memoryview


def read_signature(path: Path) -> GraphSignature:
    """The signature of the ONNX file at `path`.

    Raises:
        GraphError: it is not an ONNX graph, or is truncated.
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


def _signature(graph: memoryview) -> GraphSignature:
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
    return GraphSignature(tuple(one for one in inputs if one.name not in defaults), tuple(outputs))


def _tensor(described: memoryview) -> GraphTensor:
    kind = _inside(_inside(described, _VALUE_TYPE), _TYPE_TENSOR)
    element, shape = 0, None
    for number, value in _fields(kind):
        if number == _TENSOR_ELEMENT and isinstance(value, int):
            element = value
        elif number == _TENSOR_SHAPE and isinstance(value, memoryview):
            shape = tuple(_length(axis) for one, axis in _fields(value) if one == _SHAPE_DIMENSION)
    return GraphTensor(_text(described, _VALUE_NAME), _DATATYPES.get(element, ""), shape)


def _length(axis: _Value) -> int:
    """An axis's length; -1 if it has a name, nothing or a negative length, as Paddle2ONNX writes a free axis."""
    if isinstance(axis, int):
        raise GraphError("expected an ONNX graph, got a shape that is none")
    length = next((n for number, n in _fields(axis) if number == _DIMENSION_VALUE and isinstance(n, int)), -1)
    return length if length <= _LONGEST_AXIS else -1


def _inside(message: memoryview, wanted: int) -> memoryview:
    """The message in a field; empty if the field is absent."""
    found = (value for number, value in _fields(message) if number == wanted and isinstance(value, memoryview))
    return next(found, memoryview(b""))


def _text(message: memoryview, wanted: int) -> str:
    return bytes(_inside(message, wanted)).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, _Value]]:
    """Number and value of each field in protobuf's wire format: an integer, or the bytes of anything else.

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
    """The integer at `at`, of up to ten bytes, and the position after it."""
    value = 0
    for place in range(10):
        byte = message[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise GraphError("expected an ONNX graph, got a file of another kind")


HASHED = 256 * 2**20
"""Bytes of the largest file that is hashed when a catalogue is read: about a second. Workers hash what they open."""

Stamp = tuple[int, int, int]
"""What changes with a file's content: its size in bytes, its modification time in nanoseconds, and its inode."""


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of the file at `path`, through links; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def local_sha256(path: Path) -> str | None:
    """The file's SHA-256 in hexadecimal; None if it is too large to hash here, or missing."""
    stamp = stamp_of(path)
    return None if stamp is None or stamp[0] > HASHED else _sha256(path, stamp)


def local_signature(path: Path) -> GraphSignature:
    """The signature of an ONNX file. Raises `GraphError`, or `OSError` if it cannot be read."""
    return _cached_signature(path, stamp_of(path))


def forget() -> None:
    """Read every file again on its next use."""
    _sha256.cache_clear()
    _cached_signature.cache_clear()


@lru_cache(maxsize=1024)
def _sha256(path: Path, _stamp: Stamp) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _cached_signature(path: Path, _stamp: Stamp | None) -> GraphSignature:
    return read_signature(path)


Kind = Literal["recipes", "architectures", "callables", "runtimes"]

ENTRIES: Mapping[str, tuple[Kind, str, str]] = {
    "torch": ("architectures", "{}_torch", "build"),
    "jax": ("architectures", "{}_jax", "apply"),
    "python": ("callables", "{}", "call"),
}
"""What a variant's `entry` names, by runtime: the kind, the name and the function. Other runtimes load no code."""


class CodeError(ImportError):
    """There is no code of that name, or it lacks its function: lists what exists, and how to add it."""


@dataclass(frozen=True, slots=True)
class Code:
    """A function that was found by name.

    `reference` is `<module>:<function>`, or `<path>.py:<function>` for a file beside model.yaml. `versions` are those
    of the distribution that registered it, by name.
    """

    reference: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module's name, without a model's folder or `workers.recipes`."""
        module = self.reference.rpartition(":")[0]
        if module.endswith(".py"):
            return Path(module).stem
        return module.removeprefix("workers.recipes.")

    @property
    def source(self) -> Path:
        """The file that holds it.

        Raises:
            CodeError: the module of an entry point does not exist, or has no file.
        """
        module = self.reference.rpartition(":")[0]
        if module.endswith(".py"):
            return Path(module)
        try:
            spec = importlib.util.find_spec(module)
        except ImportError as error:
            raise CodeError(f"{self.reference}: {error}") from error
        if spec is None or spec.origin is None:
            raise CodeError(f"{self.reference}: there is no module {module!r}")
        return Path(spec.origin)

    def load(self) -> Callable[..., Any]:
        """The function itself, after importing its module; a file beside model.yaml is imported again each time.

        Raises:
            CodeError: the module has no such function.
        """
        module, _, function = self.reference.rpartition(":")
        imported = _import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        try:
            found: Callable[..., Any] = getattr(imported, function)
        except AttributeError as error:
            raise CodeError(f"{module}: expected the function {function!r} in it") from error
        return found


def recipe_code(recipe: str, folder: str) -> Code:
    """The function `make(inputs, output, options)` of a recipe.

    Args:
        recipe: its name in model.yaml.
        folder: the model's folder; empty for none.

    Raises:
        CodeError: there is no such recipe.
    """
    return _find("recipes", recipe, "make", folder)


def entry_code(runtime: str, entry: str, folder: str) -> Code:
    """What the `entry` of a variant names, for a runtime of `ENTRIES`.

    That is `build(weights)` of a torch network, `apply(weights, inputs)` of a JAX one, `call(**inputs)` of a callable.

    Raises:
        CodeError: nothing has that name.
    """
    kind, name, function = ENTRIES[runtime]
    return _find(kind, name.format(entry), function, folder)


def runtime_code(runtime: str) -> Code:
    """The function `open_variant(placed)` of a runtime.

    Raises:
        CodeError: there is no such runtime.
    """
    return _find("runtimes", runtime, "open_variant", "")


def registered(kind: Kind | Literal["classifiers"]) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of installed packages, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=f"taxiway.{kind}")}


def _find(kind: Kind, name: str, function: str, folder: str) -> Code:
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise CodeError(f"expected a name of letters, digits, - and _ for one of the {kind}, got {name!r}")
    beside = Path(folder, f"{module}.py")
    if folder and beside.is_file():
        return Code(f"{beside.absolute()}:{function}")
    if (TREE / "workers" / kind / f"{module}.py").is_file():
        return Code(f"workers.{kind}.{module}:{function}")
    points = {point.replace("-", "_"): found for point, found in registered(kind).items()}
    if module not in points:
        raise CodeError(_missing(kind, name, function, folder))
    point = points[module]
    versions = {point.dist.name: point.dist.version} if point.dist is not None else {}
    return Code(f"{point.module}:{point.attr or function}", versions)


def _missing(kind: Kind, name: str, function: str, folder: str) -> str:
    known = sorted({*_names(kind, function, folder), *registered(kind)})
    beside = f"{name.replace('-', '_')}.py with the function {function} beside model.yaml, or "
    return (
        f"no {kind.removesuffix('s')} {name!r}: expected one of {', '.join(known) or 'none'}; to add it, "
        f"{'' if kind == 'runtimes' else f'put {beside}'}install a package with the entry point "
        f'{name} in the group "taxiway.{kind}"'
    )


def _names(kind: Kind, function: str, folder: str) -> Iterator[str]:
    """The names available to a model in that folder: ours, and its own."""
    for place in [TREE / "workers" / kind, *([Path(folder)] if folder else [])]:
        for file in place.glob("*.py"):
            if f"\ndef {function}(" in file.read_text(encoding="utf-8"):
                yield file.stem.replace("_", "-") if kind == "recipes" else file.stem


def _import_file(file: Path) -> ModuleType:
    name = f"models.{file.parent.name}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
