"""How many rows a request has, and how large they are in the unit of their model (`model.Unit`). Pure.

Routers measure a received request without decoding its values: a value counts by its length, a tensor by its shape, a
blob by its reference. If none of these suffices, `expected_size` is used. Workers measure the rows that they read.
Neither reads more than it needs, and no value makes measuring fail.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from tasks.models.chats import answer_limit, asks, characters, most_tokens
from tasks.models.model import ANSWER_BOUND, Model, Unit, generates
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.limits import COUNT
from taxiway.contract.request import Request
from taxiway.contract.sealed import ContentFacts, sealed_in
from taxiway.contract.values import DATATYPES, is_reference, is_tensor
from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError

CHARACTERS_PER_TOKEN = 4
"""Approximately that of English text in a WordPiece vocabulary."""

TOKENS_AROUND = {"text": 2, "generation": 31, "chat": 31}
"""Special tokens; SmolLM2's chat template with its system prompt."""

_PROMPTS = ("generation", "chat")

_SURELY = 4
"""A prompt of so many times the model's tokens is refused unread: no text has 16 characters a token."""

DIGITS = 4
"""Binary digits of a size, rounded up: requests that differ by less are placed alike."""

MOST_SIZE = 2**53
"""Sizes are clamped to this: a larger one exceeds every limit, and a float still represents it exactly."""


def given_inputs(model: Model, inputs: Any) -> dict[str, Any]:
    """The values by input name, as received, from any form of inputs; unknown names are left out."""
    names = model.names
    if not isinstance(inputs, (dict, list)):
        return {names[0]: inputs}
    if is_tensor(inputs):
        inputs = [inputs]
    if isinstance(inputs, list) and inputs and all(map(is_tensor, inputs)):
        named = {tensor.get("name", names[0]): tensor for tensor in inputs if isinstance(tensor.get("name", ""), str)}
        return {name: named[name] for name in names if name in named} or {names[0]: inputs[0]}
    if isinstance(inputs, dict) and not is_reference(inputs):
        known = {name: inputs[name] for name in names if name in inputs}
        return known or {names[0]: inputs}
    return {names[0]: inputs}


def rows_of(model: Model, inputs: Any) -> int:
    """How many rows `inputs` seem to have, without reading their values; 1 if they are malformed."""
    if not isinstance(inputs, (dict, list)):
        return 1
    given = given_inputs(model, inputs)
    for spec in model.inputs:
        if spec.name in given and spec.batch_axis is not None:
            value = given[spec.name]
            dims = _dims(value["shape"]) if is_tensor(value) else _nesting(value)
            return max(dims[spec.batch_axis], 1) if dims and len(dims) == len(spec.shape) else 1
    return 1


def measured(model: Model, inputs: Any) -> int:
    """The mean size of the request's rows, at least 1; `expected_size` if it cannot be measured.

    Raises:
        InvalidRequestError: an input that is the size is below 1.
        RequestTooLargeError: a row exceeds the model's last bucket, or a prompt does by far.
    """
    unit = model.unit
    if unit.kind == "rows":
        return 1
    sizes = _MEASURES[unit.kind](model, unit, given_inputs(model, inputs))
    if not sizes:
        return model.expected_size
    if unit.kind == "tokens":
        _check_tokens(model, sizes[0])
    else:
        for index, size in enumerate(sizes):
            _check(model, unit, size, index if len(sizes) > 1 else None)
    return max(-(-sum(sizes) // len(sizes)), 1)


def facts_of(model: Model, request: Request) -> ContentFacts:
    """What who places a request knows of its inputs; of sealed ones, what is told of them.

    Raises:
        InvalidRequestError, RequestTooLargeError: as `measured` and `chats.asks`.
    """
    sealed = sealed_in(request.inputs)
    if sealed is not None:
        return sealed.facts
    name, limit = model.inputs[0].name, request.parameters.get(ANSWER_BOUND)
    chat = given_inputs(model, request.inputs).get(name) if model.pipeline == "chat" else None
    limit = answer_limit(chat) or limit
    bound = limit if isinstance(limit, int) else int(model.parameters[ANSWER_BOUND].default) if generates(model) else 0
    return ContentFacts(
        rows=rows_of(model, request.inputs),
        size=measured(model, request.inputs),
        longest=min(max(bound, 0), COUNT),
        most_read=most_tokens(chat),
        asks=asks(chat, f"inputs.{name}") if model.pipeline == "chat" else (),
    )


def size_of_row(model: Model, row: Mapping[str, Any]) -> int:
    """The size of a row that was read: arrays without the batch axis, and plain values or arrays of them; at least 1.

    Raises:
        InvalidRequestError, RequestTooLargeError: as `measured`.
    """
    unit = model.unit
    if unit.kind == "rows" or (unit.name and unit.name not in row):
        return 1
    size = _ROWS[unit.kind](unit, row)
    _check(model, unit, size, None)
    return max(size, 1)


def quantised(model: Model, size: int) -> int:
    """The size with `DIGITS` binary digits, rounded up, and no larger than the last bucket."""
    step = max(size.bit_length() - DIGITS, 0)
    return min(-(-size >> step) << step, model.buckets[-1])


def _check(model: Model, unit: Unit, size: int, row: int | None) -> None:
    limit = model.buckets[-1]
    if unit.kind == "value" and size < 1:
        raise _refused(InvalidRequestError, unit, f"at least 1, got {_shown(size)}", row)
    if size > limit:
        raise _refused(
            RequestTooLargeError, unit, f"at most {limit}{_NAMED[unit.kind]}, got {_shown(size)}", row, limit
        )


def _check_tokens(model: Model, size: int) -> None:
    """Refuse what surely is no prompt of the model's; a worker counts the tokens of others, and truncates texts."""
    limit = model.buckets[-1]
    if model.pipeline in _PROMPTS and size > _SURELY * limit:
        field = f"inputs.{model.inputs[0].name}"
        message = f"{field}: expected at most {limit} tokens of prompt and answer together, got about {size}"
        raise RequestTooLargeError(message, field=field, limit=limit)


def _refused(
    kind: type[TaxiwayError], unit: Unit, expected: str, row: int | None, limit: int | None = None
) -> TaxiwayError:
    field = f"inputs.{unit.name}" if unit.name else "inputs"
    where = field
    if row is not None:  # as `workers.stages.admit.named_row` words it
        where = f"{field}[{row}]" if unit.name else f"row {row}: {field}"
    details: dict[str, Any] = {"field": field}
    details |= {} if limit is None else {"limit": limit}
    details |= {} if row is None else {"row": row}
    return kind(f"{where}: expected {expected}", **details)


def _shown(size: int) -> str:
    """A number as text, without printing thousands of digits, which would be slow or raise."""
    return str(size) if -MOST_SIZE <= size < MOST_SIZE else "a larger one" if size > 0 else "a lower one"


_NAMED = {"value": "", "elements": " elements a row", "axis": " along its axis", "bytes": " bytes a row"}
_NAMED |= {"tokens": " tokens"}


# What routers measure: one size per row, or one for all; empty if unknown.


def _values(model: Model, unit: Unit, given: Mapping[str, Any]) -> list[int]:
    """The values of the integer input that is the unit; empty if one is not an integer: the worker refuses it."""
    value: Any = given.get(unit.name)
    values = _integers(_spec(model, unit), value, model.max_rows) if is_tensor(value) else value
    found: list[Any] = values[: model.max_rows] if isinstance(values, list) else [values]
    return [clamped(v) for v in found] if all(type(v) is int for v in found) else []


def _integers(spec: TensorSpec, tensor: Mapping[str, Any], most: int) -> Any:
    """Up to `most` elements of a tensor of one axis; raw ones are little-endian."""
    data, dtype = tensor.get("data"), np.dtype(DATATYPES[spec.datatype]).newbyteorder("<")
    if isinstance(data, dict):
        text = data.get("__value__")
        data = _from_base64(text, most * dtype.itemsize) if isinstance(text, str) else None
    if not isinstance(data, bytes | bytearray | memoryview):
        return data
    whole = min(len(data) // dtype.itemsize, most)
    return np.frombuffer(data, dtype, count=whole).tolist()


def _from_base64(text: str, most: int) -> bytes | None:
    """At least the first `most` bytes of base64 text; None if that is malformed."""
    try:
        return base64.b64decode(text[: 4 * -(-most // 3)])
    except ValueError:
        return None


def _elements(model: Model, unit: Unit, given: Mapping[str, Any]) -> list[int]:
    dims = _row_dims(_spec(model, unit), given.get(unit.name))
    return [] if dims is None else [_product(dims)]


def _axis(model: Model, unit: Unit, given: Mapping[str, Any]) -> list[int]:
    dims = _row_dims(_spec(model, unit), given.get(unit.name))
    return [] if dims is None else [clamped(dims[unit.axis])]


def _texts(model: Model, unit: Unit, given: Mapping[str, Any]) -> list[int]:
    """Tokens of the first input's texts, from their lengths."""
    value = given.get(model.inputs[0].name)
    length = characters(value) if model.pipeline == "chat" else None
    lengths = [length] if length is not None else [len(value)] if isinstance(value, str) else _lengths(value)
    around = TOKENS_AROUND.get(model.pipeline, 0)
    return [sum(lengths) // len(lengths) // CHARACTERS_PER_TOKEN + around] if lengths else []


def _bytes(model: Model, unit: Unit, given: Mapping[str, Any]) -> list[int]:
    """The bytes of all inputs, the same for each row."""
    found = [_bytes_of(spec, given[spec.name]) for spec in model.inputs if spec.name in given]
    known = [size for size in found if size is not None]
    return [clamped(sum(known))] if len(known) == len(found) and known else []


def _bytes_of(spec: TensorSpec, value: Any) -> int | None:
    """The mean bytes per row of the input; None if unknown."""
    if spec.datatype == "BYTES":
        lengths = _lengths(value)
        return -(-sum(lengths) // len(lengths)) if lengths else None
    dims = _row_dims(spec, value)
    return None if dims is None else _product(dims) * np.dtype(DATATYPES[spec.datatype]).itemsize


def _spec(model: Model, unit: Unit) -> TensorSpec:
    return next(spec for spec in model.inputs if spec.name == unit.name)


def _listed(value: Any) -> list[Any]:
    """The elements of a BYTES input, in any form."""
    if is_tensor(value):
        value = value.get("data")
    return value if isinstance(value, list) else [value]


def _lengths(value: Any) -> list[int]:
    """The length of each element of a BYTES input, without elements that have none."""
    found = map(_length, _listed(value))
    return [length for length in found if length is not None]


def _length(value: Any) -> int | None:
    """Characters of a text; bytes of bytes, or of what stands for them."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return len(value)
    if not isinstance(value, dict):
        return None
    if is_reference(value):
        return clamped(value["bytes"]) if type(value["bytes"]) is int else None
    text = value.get("__value__")
    return len(text) * 3 // 4 if isinstance(text, str) else None


def _row_dims(spec: TensorSpec, value: Any) -> list[int] | None:
    """A row's shape, from a tensor or from nested lists by their first elements; None if it does not fit the input."""
    dims = _dims(value["shape"]) if is_tensor(value) else _nesting(value)
    axis = spec.batch_axis
    if dims is None or axis is None or len(dims) != len(spec.shape):
        return dims if dims is not None and len(dims) == len(spec.row_shape) else None
    return [*dims[:axis], *dims[axis + 1 :]]


def _dims(shape: Any) -> list[int] | None:
    """A tensor's shape; None if it is not a tensor."""
    if not isinstance(shape, list | tuple) or len(shape) > 32:
        return None
    return [clamped(n) for n in shape] if all(type(n) is int and n >= 0 for n in shape) else None


def _nesting(value: Any) -> list[int]:
    """The lengths of nested lists, by the first element of each."""
    dims = []
    while isinstance(value, list) and value:
        dims.append(len(value))
        value = value[0]
    return dims


def _product(dims: Iterable[int]) -> int:
    product = 1
    for n in dims:
        product = min(product * n, MOST_SIZE)
    return product


def clamped(n: int) -> int:
    """The size, such that a float can represent it."""
    return max(min(n, MOST_SIZE), -MOST_SIZE)


_MEASURES: Mapping[str, Callable[[Model, Unit, Mapping[str, Any]], list[int]]] = {
    "value": _values,
    "elements": _elements,
    "axis": _axis,
    "tokens": _texts,
    "bytes": _bytes,
}


# What workers measure: a row that was read.


def _value_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.nbytes
    content = value[()] if isinstance(value, np.ndarray) and not value.shape else value
    length = _length(content)
    if length is not None:
        return length
    try:
        return len(msgspec.json.encode(content))
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return 1


_ROWS: Mapping[str, Callable[[Unit, Mapping[str, Any]], int]] = {
    "value": lambda unit, row: clamped(int(row[unit.name])),
    "elements": lambda unit, row: int(row[unit.name].size),
    "axis": lambda unit, row: int(row[unit.name].shape[unit.axis]),
    "tokens": lambda unit, row: 1,
    "bytes": lambda unit, row: sum(_value_bytes(value) for value in row.values() if value is not None),
}
