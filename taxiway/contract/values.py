"""Wire forms of values that JSON lacks: bytes in the form of Celery's JSON serializer, arrays as OIP tensors.

Sources: kombu's JSON serializer (`{"__type__": "base64", "__value__": …}`), so that a producer with nothing but Celery
sends and reads the same form; and the Open Inference Protocol v2 (`name, shape, datatype, data`). A tensor's `data` may
also be bytes: the elements in row-major order, little-endian, as in OIP's binary extension.

Values larger than a limit are stored beside the message, which holds references to them (claim check). A blob is a
value's raw bytes (a tensor's elements in row-major order, little-endian) under `keys.blob_key` in the state store. Its
reference is a mapping `{"ref", "bytes", "datatype"}`, with `shape` where it is a tensor; without, it is a bytes value
(datatype BYTES), or an element of a list that is a text (TEXT, in UTF-8). In a request it has the blob's SHA-256 as
`digest`: the router's signature covers the body, so it covers the blob too. In a result it has `href`, a URL at the
HTTP API for clients without taxiway.
"""

from __future__ import annotations

import base64
import hashlib
import math
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from taxiway.contract.limits import DEEPEST, Buffer, elements_of
from taxiway.errors import (
    InvalidRequestError,
    ResultExpiredError,
    TaxiwayError,
    cut,
    invalid,
    quoted,
    unreadable,
    wrong_field,
)

if TYPE_CHECKING:
    import numpy as np

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
"""OIP datatype to numpy dtype name, without BYTES."""

BATCH_AXIS = "batch_axis"
"""The key of a tensor's batch axis if it is not the first: in model metadata, and in an output tensor's parameters.

In metadata, None means that the input has no batch axis.
"""

_PLAIN = frozenset({type(None), bool, int, str})
"""Types that JSON has natively."""

_OIP = {(name[0], int(name.strip(ascii_lowercase) or 8) // 8): datatype for datatype, name in DATATYPES.items()}
"""Datatypes by numpy's kind and element size; dtype names take microseconds to compute."""

_TAKES = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
"""For each kind of target dtype (numpy's letters), the kinds it accepts."""


def to_wire(value: Any, field: str = "inputs", blobs: Blobs | None = None) -> Any:
    """Convert `value` to plain JSON values: bytes and arrays become tagged forms, or references kept in `blobs`.

    Raises:
        InvalidRequestError: a value that cannot be encoded; names `field`.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _bytes(value, blobs)
    if isinstance(value, dict):
        return _mapping(value, field, blobs)
    if isinstance(value, (list, tuple)):
        elements = value if blobs is None else blobs.without_texts(value)
        return [below if type(below) in _PLAIN else to_wire(below, field, blobs) for below in elements]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _tensor(value, field, blobs)
    value = bare(value)
    return to_wire(value, field) if isinstance(value, bytes) else _scalar(value, field)


def bare(value: Any) -> Any:
    """A number or a text of a subclass, or a numpy scalar, as Python's own type; anything else unchanged."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    return str.__str__(value) if isinstance(value, str) else value


def from_wire(value: Any, field: str = "inputs", levels: int = DEEPEST) -> Any:
    """The inverse of `to_wire`, except that tensors stay mappings (`to_array` reads one).

    Raises:
        InvalidRequestError: a tagged value that does not decode, or more than `levels` of lists and mappings; names
            `field`.
    """
    if not isinstance(value, (list, dict)):
        return value
    if levels == 0:
        raise invalid(field, f"at most {DEEPEST} levels of lists and mappings", "more")
    if isinstance(value, list):
        return [from_wire(below, field, levels - 1) for below in value]
    if value.keys() == {"__type__", "__value__"}:
        return _untag(value["__type__"], value["__value__"], field)
    return {key: from_wire(below, field, levels - 1) for key, below in value.items()}


def is_tensor(value: Any) -> bool:
    """Whether `value` is an OIP tensor: a mapping with `shape`, `datatype`, and `data` or a `ref` in its place."""
    return isinstance(value, dict) and "shape" in value and "datatype" in value and ("data" in value or "ref" in value)


def to_array(tensor: dict[str, Any], field: str) -> np.ndarray:
    """The numpy array of an OIP tensor of any datatype but BYTES; bytes in `data` are not copied.

    Raises:
        InvalidRequestError: unknown datatype, or data that does not fill the shape; names `field`.
    """
    import numpy as np

    datatype, shape, data = tensor["datatype"], tensor["shape"], tensor["data"]
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise wrong_field(field, f"a datatype of {sorted(DATATYPES)}", datatype)
    elements = elements_of(shape, field)
    try:
        if isinstance(data, (bytes, memoryview)):
            flat = np.frombuffer(data, np.dtype(DATATYPES[datatype]).newbyteorder("<"))
        else:
            flat = numbers(data, datatype, field)
        if flat.size != elements:
            raise invalid(field, f"{elements} elements of {datatype} for shape {quoted(shape)}", str(flat.size))
        return flat.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise invalid(field, f"{datatype} data of shape {quoted(shape)}", cut(str(error))) from error


def numbers(value: Any, datatype: str, field: str) -> np.ndarray:
    """Convert `value` (numbers, lists of them, or an array) to an array of the OIP `datatype`.

    Floats may lose precision and integers may become floats; no other conversion may change a value.

    Raises:
        InvalidRequestError: not numbers, not of one shape, or out of the datatype's range; names `field`.
    """
    import numpy as np

    wanted = np.dtype(DATATYPES[datatype])
    try:
        given = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise uneven(field, datatype) from error
    if given.size and given.dtype.kind not in _TAKES[wanted.kind]:
        raise invalid(field, f"{datatype} numbers", _kind(given))
    if given.dtype == wanted:
        return given
    with np.errstate(over="ignore"):
        array = given.astype(wanted)
    kept = np.isfinite(array) == np.isfinite(given) if wanted.kind == "f" else array == given
    if not np.all(kept):
        raise invalid(field, f"{datatype} numbers", f"values from {given.min()} to {given.max()}")
    return array


def axis_on_some(alone: Sequence[str]) -> InvalidRequestError:
    """The error for inputs of which only some have the batch axis; `alone` names those without."""
    expected, got = "the batch axis on all inputs or on none", f"none on {', '.join(alone)}"
    return invalid("inputs", expected, got)


def uneven(field: str, datatype: str) -> InvalidRequestError:
    """The error for nested lists that are not rectangular."""
    return invalid(field, f"{datatype} numbers, in lists of equal lengths", "lists of different lengths or depths")


def raw_bytes(array: np.ndarray) -> memoryview:
    """The elements in row-major order, little-endian; not copied if the array is stored that way."""
    import numpy as np

    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    flat: memoryview = little.reshape(-1).view(np.uint8).data
    return flat


def _scalar(value: Any, field: str) -> Any:
    """A bare value as a JSON value; JSON has no NaN and no infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong_field(field, "finite numbers (an array may hold others)", value)
    if type(value) is float or type(value) in _PLAIN:
        return value
    raise invalid(field, "JSON values, bytes or numpy arrays", type(value).__name__)


def _key(key: Any, field: str) -> str:
    if not isinstance(key, str):
        raise wrong_field(field, "text as the keys of a mapping", key)
    return str(key)


def _bytes(value: Buffer, blobs: Blobs | None) -> dict[str, Any]:
    view = memoryview(value)
    content = view.cast("B") if view.c_contiguous and view.nbytes else bytes(value)
    if blobs is not None and len(content) > blobs.limit:
        return {"datatype": "BYTES", **blobs.keep(content)}
    return _tagged(content)


def _tagged(content: Buffer) -> dict[str, Any]:
    return {"__type__": "base64", "__value__": base64.b64encode(content).decode("ascii")}


def _mapping(value: dict[Any, Any], field: str, blobs: Blobs | None) -> dict[str, Any]:
    """Convert a mapping's values; a tensor's raw bytes keep its shape and datatype beside them."""
    if blobs is not None and is_tensor(value):
        content = value.get("data")
        if isinstance(content, (bytes, memoryview)) and len(content) > blobs.limit:
            rest = {_key(key, field): to_wire(below, field) for key, below in value.items() if key != "data"}
            return rest | blobs.keep(content)
    return {
        _key(key, field): below if type(below) in _PLAIN else to_wire(below, field, blobs)
        for key, below in value.items()
    }


def _tensor(array: np.ndarray, field: str, blobs: Blobs | None) -> dict[str, Any]:
    datatype = _OIP.get((array.dtype.kind, array.dtype.itemsize))
    if datatype is None:
        raise invalid(field, f"an array of {sorted(DATATYPES.values())}", f"dtype {array.dtype.name}")
    content = raw_bytes(array)
    fields = {"shape": list(array.shape), "datatype": datatype}
    if blobs is not None and len(content) > blobs.limit:
        return fields | blobs.keep(content)
    return fields | {"data": _tagged(content)}


def _kind(array: np.ndarray) -> str:
    return "non-numeric values" if array.dtype.kind in "OUSV" else f"{array.dtype.name} values"


def _untag(tag: Any, value: Any, field: str) -> Any:
    if not isinstance(value, str) or tag not in ("base64", "bytes"):
        raise invalid(field, "a value tagged base64 or bytes", f"tag {quoted(tag)}")
    try:
        return value.encode() if tag == "bytes" else base64.b64decode(value, validate=True)
    except ValueError as error:
        raise invalid(field, f"{tag} text", cut(str(error))) from error


INLINE = 16 * 2**10
"""Values up to this many bytes stay in the message, unless `limits.inline` in queues.yaml sets another limit."""

BLOB_KEPT = 86400
"""Seconds a blob is kept until a router takes its request; after that it is kept as long as the job's record."""

_MARK = b'"ref":'
_TEXT = "TEXT"


class Reference(msgspec.Struct, frozen=True):
    """The reference to a blob in a message; `bytes` is its size, `digest` its SHA-256 in hexadecimal."""

    ref: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    datatype: str
    digest: str = ""


class Blobs:
    """Moves large values out of a request's message, or out of a result; `contents` maps each `ref` to the bytes.

    These are not copied. Tensors and bytes of more than `limit` bytes are moved, and elements of lists that are texts
    of more than `texts` characters. A result's references are `linked`: they have a URL, and a request's a digest.
    """

    def __init__(self, limit: int = INLINE, texts: float = math.inf, *, linked: bool = False) -> None:
        self.limit = limit
        self.contents: dict[str, Buffer] = {}
        self._texts, self._linked = texts, linked

    def keep(self, content: Buffer) -> dict[str, Any]:
        """The fields of a reference to `content`."""
        ref = uuid.uuid4().hex
        self.contents[ref] = content
        more = {"href": f"/v2/blobs/{ref}"} if self._linked else {"digest": hashlib.sha256(content).hexdigest()}
        return {"ref": ref, "bytes": memoryview(content).nbytes, **more}

    def without_texts(self, elements: Sequence[Any]) -> Sequence[Any]:
        """The elements of a list, with references in place of large texts."""
        if self._texts == math.inf or str not in set(map(type, elements)):
            return elements
        return [
            {"datatype": _TEXT, **self.keep(one.encode())} if isinstance(one, str) and len(one) > self._texts else one
            for one in elements
        ]


def may_refer(message: Buffer) -> bool:
    """Whether encoded JSON may contain references: a cheap test of its bytes, since most messages have none."""
    return _MARK in bytes(message)


def is_reference(value: Any) -> bool:
    """Whether `value` is a reference to a blob."""
    return isinstance(value, dict) and {"ref", "bytes", "datatype"} <= value.keys()


def references(value: Any) -> Iterator[Reference]:
    """Every reference in `value`, at any depth.

    Raises:
        InvalidRequestError: one is malformed.
    """
    if is_reference(value):
        yield _parsed(value)
    elif isinstance(value, (dict, list, tuple)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from references(below)


def referred(message: Buffer) -> list[Reference]:
    """Every reference in encoded JSON; none if it cannot be parsed."""
    try:
        return list(references(msgspec.json.decode(message))) if may_refer(message) else []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidRequestError):
        return []


def resolved(value: Any, contents: Mapping[str, Buffer | None]) -> Any:
    """`value` with references replaced by their blobs: a tensor's goes into its `data`, not copied.

    Raises:
        InvalidRequestError: a blob's size or digest differs from its reference.
        ResultExpiredError: a blob has expired.
    """
    if is_reference(value):
        content = _checked(reference := _parsed(value), contents)
        if "shape" not in value:
            return _text_in(content) if reference.datatype == _TEXT else bytes(content)
        rest = {name: part for name, part in value.items() if name not in ("ref", "bytes", "digest", "href")}
        return rest | {"data": content}
    if isinstance(value, dict):
        return {key: resolved(below, contents) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolved(below, contents) for below in value]
    return value


def _parsed(value: dict[str, Any]) -> Reference:
    try:
        return msgspec.convert(value, Reference)
    except msgspec.ValidationError as error:
        raise unreadable(error, "ref") from error


def _checked(reference: Reference, contents: Mapping[str, Buffer | None]) -> Buffer:
    content = contents.get(reference.ref)
    if content is None:
        raise gone(reference.ref)
    if len(content) != reference.bytes:
        raise _other(reference, f"{reference.bytes} bytes", f"{len(content)}")
    if reference.digest and hashlib.sha256(content).hexdigest() != reference.digest:
        raise _other(reference, f"SHA-256 {reference.digest}", "other bytes")
    return content


def _text_in(content: Buffer) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        raise invalid("ref", "a blob of datatype TEXT in UTF-8", cut(str(error))) from error


def gone(ref: str) -> TaxiwayError:
    """The error for a missing blob."""
    return ResultExpiredError(f"blob {ref} has expired", ref=ref)


def _other(reference: Reference, expected: str, got: str) -> InvalidRequestError:
    return invalid("ref", f"blob {reference.ref} of {expected}", got)
