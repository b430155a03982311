"""Binds a request's inputs and parameters to its model: rows of checked values, or an error that names the field.

The `TensorSpec` of each input names its batch axis, usually the first: a request of n rows is n items. Values without
that axis are one row, and are answered without it. An input without a batch axis belongs to every row.

`digest_of` is the digest of a request under an idempotency key: the same at every interface, in whatever form it came.
It covers the model, the inputs, parameters and outputs, and the terms that restrict where the answer may be computed
(`locality`, `min_accuracy`). Deadline, priority and budget may differ from one attempt to the next.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from tasks.models.model import Model, Parameter, generates
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.job import accepted_meta, failure_meta
from taxiway.contract.limits import COUNT
from taxiway.contract.request import Request
from taxiway.contract.values import axis_on_some, from_wire, is_reference, is_tensor, numbers, raw_bytes, to_array
from taxiway.errors import IdempotencyConflictError, RequestTooLargeError, TaxiwayError, cut, invalid, wrong_field

Row = Mapping[str, Any]
"""One row: a plain value for each BYTES input, an array without the batch axis for each other."""

_Rows = Sequence[Any] | np.ndarray
"""One input's values, one per row."""


class _Column(msgspec.Struct, frozen=True):
    """One input of a request: its rows, or the one value that all of them share.

    `single` means that it came without a batch axis; None if the input has none.
    """

    rows: _Rows
    single: bool | None

    def row(self, index: int) -> Any:
        return self.rows[0 if self.single is None else index]


_TYPES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "strings": (list,),
}
_WORDS: Mapping[str, str] = {
    "integer": "an integer",
    "number": "a finite number",
    "string": "text",
    "strings": "a list of texts",
}


class Bound(msgspec.Struct, frozen=True):
    """A request bound to its model; `single` means that it came without a batch axis."""

    rows: tuple[Row, ...]
    single: bool
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]


def bind(model: Model, inputs: Any, parameters: Mapping[str, Any], outputs: tuple[str, ...] = ()) -> Bound:
    """`inputs` (a plain value, a mapping by name, or a list of OIP tensors) as rows of `model`.

    Raises:
        InvalidRequestError: a name, datatype, shape or parameter is wrong; names the field, expected and got.
        RequestTooLargeError: more rows than the model takes in one request.
    """
    columns = {}
    for name, value in by_name(model, inputs).items():
        spec = next(i for i in model.inputs if i.name == name)
        columns[name] = _column(spec, value, any_json=_takes_any_json(model))
    rows = _count_rows(model, columns)
    return Bound(
        rows=tuple({name: column.row(i) for name, column in columns.items()} for i in range(rows)),
        single=all(column.single is not False for column in columns.values()),
        parameters=bind_parameters(model, parameters),
        outputs=_bind_outputs(model, outputs),
    )


def check_stream(model: Model, bound: Bound, wanted: bool | Literal["rows"] | None) -> None:
    """Refuse a request to stream an answer that cannot be streamed.

    Raises:
        InvalidRequestError: the model does not generate, or a reader could not distinguish several rows.
    """
    if not wanted:
        return
    if not generates(model):
        raise invalid("stream", "a model that generates text", model.id)
    if len(bound.rows) > 1 and wanted != "rows":
        raise invalid("stream", "a request of one row", len(bound.rows))


def bind_parameters(model: Model, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The model's parameters with defaults for those not given.

    Raises:
        InvalidRequestError: unknown, of another type or out of bounds; names the parameter.
    """
    for name in parameters:
        if name not in model.parameters:
            known = ", ".join(sorted(model.parameters)) or "it has none"
            raise wrong_field(f"parameters.{cut(name)}", f"a parameter of {model.id} ({known})", parameters[name])
    bound = {name: spec.default for name, spec in model.parameters.items()}
    for name, value in parameters.items():
        if value is not None:
            bound[name] = _checked_parameter(name, model.parameters[name], value)
    return bound


def _checked_parameter(name: str, spec: Parameter, value: Any) -> Any:
    fits = isinstance(value, _TYPES[spec.type]) and not isinstance(value, bool)
    if fits and spec.type == "strings":
        fits = all(isinstance(text, str) for text in value)
    measure = len(value) if fits and isinstance(value, (str, list)) else value
    if not fits or not _inside(spec, measure):
        raise wrong_field(f"parameters.{name}", _WORDS[spec.type] + _bounds(spec), value)
    return value


def _inside(spec: Parameter, measure: float) -> bool:
    most = sys.float_info.max
    low, high = _range(spec)
    return (-most if low is None else low) <= measure <= (most if high is None else high)


def _range(spec: Parameter) -> tuple[float | None, float | None]:
    """The inclusive bounds; integers have some even if the model states none."""
    usual = (-COUNT, COUNT) if spec.type == "integer" else (None, None)
    return usual[0] if spec.minimum is None else spec.minimum, usual[1] if spec.maximum is None else spec.maximum


def _bounds(spec: Parameter) -> str:
    unit = {"string": " characters", "strings": " entries"}.get(spec.type, "")
    said = [
        f"{sign} {bound:.16g}{unit}"
        for sign, bound in zip((">=", "<="), _range(spec), strict=True)
        if bound is not None
    ]
    return f" {' and '.join(said)}" if said else ""


def _bind_outputs(model: Model, outputs: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple(o.name for o in model.outputs)
    for name in outputs:
        if name not in known:
            raise wrong_field("outputs", f"one of {list(known)}", name)
    return outputs or model.usual_outputs


def by_name(model: Model, inputs: Any) -> dict[str, Any]:
    """Values by input name; a plain value is the first input's."""
    if is_tensor(inputs) and "name" in inputs:
        inputs = [inputs]
    if isinstance(inputs, list) and inputs and all(is_tensor(i) and "name" in i for i in inputs):
        pairs = [(tensor["name"], tensor) for tensor in inputs]
    elif isinstance(inputs, dict) and not is_tensor(inputs) and not _is_plain(model, inputs):
        pairs = list(inputs.items())
    else:
        pairs = [(model.inputs[0].name, inputs)]
    _check_names(model, [name for name, _ in pairs])
    return dict(pairs)


def _check_names(model: Model, given: Sequence[Any]) -> None:
    names = model.names
    if given == names:
        return
    for index, name in enumerate(given):
        if name not in names:
            raise wrong_field("inputs", f"inputs of {model.id} ({', '.join(names)})", name)
        if name in given[:index]:
            raise wrong_field(f"inputs.{name}", "one tensor of that name", "two")
    for spec in model.inputs:
        if spec.name not in given and not (spec.optional and given):
            raise invalid(f"inputs.{spec.name}", "a value", "nothing")


def _takes_any_json(model: Model) -> bool:
    """Whether a BYTES element may be any JSON value: a chat is one, and a model of tensors does not read it."""
    return model.pipeline in ("tensors", "chat")


def _is_plain(model: Model, inputs: dict[str, Any]) -> bool:
    """Whether a mapping is the value of the model's only input, instead of a mapping by name."""
    first, *others = model.inputs
    any_json = _takes_any_json(model) and first.datatype == "BYTES" and not others
    return any_json and not inputs.keys() <= {first.name}


def _count_rows(model: Model, columns: Mapping[str, _Column]) -> int:
    counts = {name: len(column.rows) for name, column in columns.items() if column.single is not None}
    alone = [name for name in counts if columns[name].single]
    if 0 < len(alone) < len(counts):
        raise axis_on_some(alone)
    if not counts:
        raise invalid("inputs", "an input with a batch axis", "none")
    if len(set(counts.values())) > 1:
        raise invalid("inputs", "the same number of rows in each", counts)
    rows = next(iter(counts.values()))
    if rows > model.max_rows:
        raise RequestTooLargeError(
            f"inputs: expected at most {model.max_rows} rows for {model.id}, got {rows}",
            field="inputs",
            limit="max_rows",
        )
    if rows == 0:
        raise invalid("inputs", "at least one row", "none")
    return rows


def _column(spec: TensorSpec, value: Any, *, any_json: bool) -> _Column:
    """The input's rows, each without the batch axis."""
    field = f"inputs.{spec.name}"
    if is_tensor(value) and value["datatype"] != spec.datatype:
        raise wrong_field(field, f"datatype {spec.datatype}", value["datatype"])
    if spec.datatype == "BYTES":
        texts, single = _bytes_column(field, value)
        for index, text in enumerate(() if any_json else texts):
            if not isinstance(text, (str, bytes)):
                raise wrong_field(field if single else f"{field}.{index}", "text or bytes", text)
        return _Column(texts, single)
    array = to_array(value, field) if is_tensor(value) else numbers(value, spec.datatype, field)
    if spec.batch_axis is None or array.ndim == len(spec.shape) - 1:
        _check_shape(spec, array, spec.row_shape, field)
        return _Column(array[np.newaxis], None if spec.batch_axis is None else True)
    _check_shape(spec, array, spec.shape, field)
    return _Column(np.moveaxis(array, spec.batch_axis, 0) if spec.batch_axis else array, single=False)


def _check_shape(spec: TensorSpec, array: np.ndarray, shape: Sequence[int], field: str) -> None:
    if array.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, array.shape, strict=True)):
        raise wrong_field(field, f"shape {list(spec.shape)} ({_batch_words(spec)})", list(array.shape))


def _batch_words(spec: TensorSpec) -> str:
    if spec.batch_axis is None:
        return "without a batch axis"
    return "the first axis is the batch" if spec.batch_axis == 0 else f"axis {spec.batch_axis} is the batch"


def _bytes_column(field: str, value: Any) -> tuple[list[Any], bool]:
    if not is_tensor(value):
        return (value, False) if isinstance(value, list) else ([value], True)
    flat, shape = value["data"], value["shape"]
    if not isinstance(flat, list) or not isinstance(shape, (list, tuple)) or [*shape] != [len(flat)]:
        raise wrong_field(field, "shape [n] and a list of n values in data", shape)
    return flat, False


SHOWN = 12
"""Hexadecimal digits of a digest in an error's text."""

FIRST = "@first@"
"""A placeholder for the first use's digest in the refusal, which the state store fills in."""

_BYTES = 16  # of a digest
_encode = msgspec.json.Encoder(order="deterministic", enc_hook=repr).encode


class KeyUse(msgspec.Struct, frozen=True):
    """A use of an idempotency key, for `forwarding.forward_call`.

    `submission` is the task id under which the submitter is notified whether the job matches its request, empty if it
    does not wait for that: with the stored result `same`, or with `other`, in which `FIRST` stands for a digest.
    """

    digest: str
    submission: str = ""
    same: str = ""  # Lua's MessagePack knows only text
    other: str = ""
    keep: int = 0


def key_use(model: Model, request: Request, job: str, submission: str, keep: int, secret: bytes = b"") -> KeyUse:
    """The use of its key that a request for a job makes; the answer to its submitter stays for `keep` seconds."""
    digest = digest_of(model, request, secret)
    if not submission:
        return KeyUse(digest)
    refused = conflict(request, FIRST, digest)
    answers = accepted_meta(submission, job).decode(), failure_meta(submission, refused).decode()
    return KeyUse(digest, submission, *answers, keep)


def conflict(request: Request, first: str, digest: str) -> IdempotencyConflictError:
    """The refusal of a request whose key was first used for another one."""
    first, digest = first[:SHOWN], digest[:SHOWN]
    message = (
        f"idempotency_key: expected the request that {request.idempotency_key!r} was first used for (digest {first}), "
        f"got another one (digest {digest}): use a new key"
    )
    return IdempotencyConflictError(message, field="idempotency_key", first=first, got=digest)


def digest_of(model: Model, request: Request, secret: bytes = b"") -> str:
    """Hexadecimal digits that are the same for equal requests to a model; a secret keeps others from computing them."""
    outputs = sorted(request.outputs or model.usual_outputs)
    parts = [model.id, _inputs(model, request.inputs), _parameters(model, request.parameters), outputs]
    text, key = _encode([*parts, request.locality, request.min_accuracy]), secret[: hashlib.blake2b.MAX_KEY_SIZE]
    return hashlib.blake2b(text, digest_size=_BYTES, key=key).hexdigest()


def _parameters(model: Model, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return bind_parameters(model, from_wire(parameters, "parameters"))
    except TaxiwayError:  # the job will be refused: any text that is the same each time does
        return parameters


def _inputs(model: Model, inputs: Any) -> Any:
    try:
        named = by_name(model, from_wire(inputs))
        return {spec.name: _digested_column(spec, named[spec.name]) for spec in model.inputs if spec.name in named}
    except (TaxiwayError, LookupError, TypeError, ValueError, AttributeError):  # the same
        return inputs


def _digested_column(spec: TensorSpec, value: Any) -> list[Any]:
    """An input's datatype, shape with the batch axis, and content; bytes by their SHA-256, as references have it."""
    if spec.datatype == "BYTES":
        elements = value["data"] if is_tensor(value) else value
        elements = elements if isinstance(elements, list) else [elements]
        return [spec.datatype, [len(elements)], [_element(element) for element in elements]]
    if is_tensor(value) and "ref" in value:
        return [value["datatype"], _batched(spec, value["shape"]), value["digest"]]
    datatype = str(value["datatype"]) if is_tensor(value) else spec.datatype
    array = to_array(value, spec.name) if is_tensor(value) else numbers(value, spec.datatype, spec.name)
    return [datatype, _batched(spec, list(array.shape)), _sha256(raw_bytes(np.asarray(array)))]


def _batched(spec: TensorSpec, shape: list[int]) -> list[int]:
    axis = spec.batch_axis
    return list(shape) if axis is None or len(shape) >= len(spec.shape) else [*shape[:axis], 1, *shape[axis:]]


def _element(element: Any) -> Any:
    if is_reference(element):
        return element["digest"]
    if isinstance(element, str):
        return _sha256(element.encode())
    return _sha256(element) if isinstance(element, (bytes, memoryview)) else [element]


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
