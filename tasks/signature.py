"""Binds a request's inputs and parameters to its model: rows of checked values, or an error that names the field.

The first axis is the batch: a request of n rows is n items. A value without that axis is one row, and is answered
without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.catalogue import Model, Parameter, TensorSpec
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from taxiway.values import DATATYPES, is_tensor, to_array

Row = Mapping[str, Any]
"""One row: a plain value for each BYTES input, an array without the batch axis for each other."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "strings": (list,),
}


@dataclass(frozen=True, slots=True)
class Bound:
    """A request as its model reads it; `single` says that it came without a batch axis."""

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
    columns, single = {}, set()
    for name, value in _by_name(model, inputs).items():
        spec = next(i for i in model.inputs if i.name == name)
        columns[name], alone = _column(spec, value)
        single.add(alone)
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1 or len(single) > 1:
        raise InvalidRequestError(f"inputs: expected the same number of rows in each, got {counts}", field="inputs")
    rows = next(iter(counts.values()))
    if rows > model.max_rows:
        raise RequestTooLargeError(
            f"inputs: expected at most {model.max_rows} rows for {model.id}, got {rows}", limit="max_rows"
        )
    if rows == 0:
        raise InvalidRequestError("inputs: expected at least one row, got none", field="inputs")
    return Bound(
        rows=tuple({name: column[i] for name, column in columns.items()} for i in range(rows)),
        single=single.pop(),
        parameters=bind_parameters(model, parameters),
        outputs=_bind_outputs(model, outputs),
    )


def bind_parameters(model: Model, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The model's parameters with defaults for those not given.

    Raises:
        InvalidRequestError: unknown, of another type or out of bounds; names the parameter.
    """
    for name in parameters:
        if name not in model.parameters:
            known = ", ".join(sorted(model.parameters)) or "none"
            raise _invalid(f"parameters.{name}", f"a parameter of {model.id} ({known})", parameters[name])
    bound = {name: spec.default for name, spec in model.parameters.items()}
    for name, value in parameters.items():
        if value is not None:
            bound[name] = _checked_parameter(name, model.parameters[name], value)
    return bound


def _checked_parameter(name: str, spec: Parameter, value: Any) -> Any:
    fits = isinstance(value, _TYPES[spec.type]) and not isinstance(value, bool)
    if not fits or (spec.type == "strings" and not all(isinstance(v, str) for v in value)):
        raise _invalid(f"parameters.{name}", f"{spec.type}", value)
    measure = len(value) if isinstance(value, (str, list)) else value
    low, high = spec.minimum, spec.maximum
    inside = (low is None or measure >= low) and (high is None or measure <= high)
    if not inside or measure != measure:
        raise _invalid(f"parameters.{name}", f"{spec.type} from {low} to {high}", value)
    return value


def _bind_outputs(model: Model, outputs: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple(o.name for o in model.outputs)
    for name in outputs:
        if name not in known:
            raise _invalid("outputs", f"one of {list(known)}", name)
    return outputs or known


def _by_name(model: Model, inputs: Any) -> dict[str, Any]:
    """Values by input name; a plain value is the first input's."""
    names = {spec.name for spec in model.inputs}
    if isinstance(inputs, list) and inputs and all(is_tensor(i) and "name" in i for i in inputs):
        named = {i["name"]: i for i in inputs}
    elif isinstance(inputs, dict) and inputs and not is_tensor(inputs) and (len(names) > 1 or inputs.keys() <= names):
        named = dict(inputs)
    else:
        named = {model.inputs[0].name: inputs}
    for name in named:
        if name not in names:
            raise _invalid("inputs", f"inputs of {model.id} ({', '.join(sorted(names))})", name)
    missing = [s.name for s in model.inputs if not s.optional and s.name not in named]
    if missing:
        raise InvalidRequestError(f"inputs.{missing[0]}: expected a value, got none", field=f"inputs.{missing[0]}")
    return named


def _column(spec: TensorSpec, value: Any) -> tuple[Any, bool]:
    """The input's rows, and whether the value came as one row without the batch axis."""
    field = f"inputs.{spec.name}"
    if is_tensor(value) and value["datatype"] != spec.datatype:
        raise _invalid(field, f"datatype {spec.datatype}", value["datatype"])
    if spec.datatype == "BYTES":
        return _bytes_column(field, value)
    array = to_array(value, field) if is_tensor(value) else _array(spec, value, field)
    shape = spec.shape
    single = array.ndim == len(shape) - 1
    rows = array[np.newaxis] if single else array
    fits = rows.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape[1:], rows.shape[1:], strict=True))
    if not fits:
        raise _invalid(field, f"shape {list(shape)} (the first axis is the batch)", list(array.shape))
    return rows, single


def _bytes_column(field: str, value: Any) -> tuple[list[Any], bool]:
    if not is_tensor(value):
        return (value, False) if isinstance(value, list) else ([value], True)
    flat = value["data"]
    shape = list(value["shape"])
    if not isinstance(flat, list) or len(shape) != 1 or shape[0] != len(flat):
        raise _invalid(field, f"a list of {shape[0] if shape else 'n'} values in data, with shape [n]", shape)
    return flat, False


def _array(spec: TensorSpec, value: Any, field: str) -> np.ndarray:
    if value is None or isinstance(value, (str, bytes, dict)):
        raise _invalid(field, f"{spec.datatype} numbers of shape {list(spec.shape)}", type(value).__name__)
    try:
        given = np.asarray(value)
        array = given.astype(DATATYPES[spec.datatype], casting="same_kind")
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(
            f"{field}: expected {spec.datatype} numbers of shape {list(spec.shape)}: {error}", field=field
        ) from error
    return array


def _invalid(field: str, expected: str, value: object) -> InvalidRequestError:
    shown = repr(value)
    return InvalidRequestError(
        f"{field}: expected {expected}, got {shown if len(shown) <= 80 else shown[:77] + '…'}", field=field
    )
