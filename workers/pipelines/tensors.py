"""Models with tensors as inputs and outputs: values are only validated against model.yaml and stacked.

A BYTES tensor holds Python values (text, bytes or any JSON value), each as one element of an object array.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks.models.model import Model, Variant
from tasks.models.sizes import size_of_row
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.values import DATATYPES
from taxiway.errors import ExecutionError, invalid
from workers.port import Arrays, Item, Placed, Row, Runtime


class TensorPipeline:
    """Validates rows and stacks them, each tensor along its batch axis.

    Rows run in separate batches if their tensors differ in name or shape, or in the value of an input without a batch
    axis.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._axes = {spec.name: spec.batch_axis for spec in model.inputs}
        self._called = {spec.name: spec.called for spec in model.inputs}

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The row, whose numbers `bind` has checked, as arrays of the declared types, without the batch axis.

        Raises:
            InvalidRequestError: texts are of another shape.
            RequestTooLargeError: the row exceeds the model's last bucket.
        """
        arrays = {spec.name: row_array(spec, row[spec.name]) for spec in self._model.inputs if spec.name in row}
        return Item(arrays, size_of_row(self._model, arrays), parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """Outputs by name for each item, in order: arrays, or plain values for scalars.

        Raises:
            ExecutionError: the outputs do not match the model's declaration.
        """
        alike: dict[Hashable, list[int]] = {}
        for index, item in enumerate(items):
            shapes = ((name, array.shape) for name, array in item.arrays.items())
            whole = (array.tobytes() for name, array in item.arrays.items() if self._axes[name] is None)
            alike.setdefault((*shapes, *whole), []).append(index)
        answers: list[Row] = [{}] * len(items)
        for indices in alike.values():
            outputs = runtime.run(self._stack([items[index].arrays for index in indices]))
            rows = {
                spec.name: read_output(spec, outputs.get(spec.called), len(indices)) for spec in self._model.outputs
            }
            for place, index in enumerate(indices):
                answers[index] = plain_row(rows, place)
        return answers

    def _stack(self, rows: Sequence[Arrays]) -> dict[str, np.ndarray]:
        """Stack rows into one batch, by the names that the graph has."""
        return {
            self._called[name]: first
            if (axis := self._axes[name]) is None
            else np.stack([row[name] for row in rows], axis)
            for name, first in rows[0].items()
        }


def row_array(spec: TensorSpec, value: Any) -> np.ndarray:
    """One row's value as an array of the tensor's dtype, and of its shape without the batch axis.

    Raises:
        InvalidRequestError: texts are of another shape.
    """
    if spec.datatype != "BYTES":
        return np.asarray(value, DATATYPES[spec.datatype])
    array = _element(value) if len(spec.shape) == 1 else np.asarray(value, object)
    if not _fits(spec.row_shape, array.shape):
        raise invalid(f"inputs.{spec.name}", f"shape {list(spec.row_shape)} a row", f"shape {list(array.shape)}")
    return array


def read_output(spec: TensorSpec, array: np.ndarray | None, rows: int) -> np.ndarray:
    """A batch's output in its declared dtype, its rows on the first axis.

    Raises:
        ExecutionError: it is missing, or of another shape or kind.
    """
    if array is None:
        raise ExecutionError(f"output {spec.called!r} is missing")
    axis = spec.batch_axis or 0
    shape = (*spec.shape[:axis], rows, *spec.shape[axis + 1 :])
    free = spec.datatype == "BYTES" and len(spec.shape) == 1  # an element may be any value
    if not _fits(shape, array.shape[:1] if free else array.shape):
        raise ExecutionError(f"output {spec.name!r}: expected shape {list(shape)}, got {list(array.shape)}")
    wanted = np.dtype(DATATYPES.get(spec.datatype, object))
    array = np.moveaxis(array, axis, 0)
    if free or array.dtype == wanted:
        return array
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise ExecutionError(f"output {spec.name!r}: expected {spec.datatype}, got {array.dtype} values")
    return array.astype(wanted)


def plain_row(outputs: Arrays, place: int = 0) -> Row:
    """One row of outputs with rows on the first axis: arrays of numbers, lists of texts, plain values for scalars."""
    return {name: _plain(array, place) for name, array in outputs.items()}


def _fits(wanted: Sequence[int], shape: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, got) for want, got in zip(wanted, shape, strict=True))


def _element(value: object) -> np.ndarray:
    """A 0-dimensional object array of the value itself, even if it is a list or an array."""
    array = np.empty((), object)
    array[()] = value
    return array


def _plain(array: np.ndarray, place: int) -> Any:
    element = array[place]
    if isinstance(element, np.ndarray) and element.dtype == object:
        return element.tolist()
    return element.item() if isinstance(element, np.generic) else element


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> TensorPipeline:
    """The pipeline for one variant; it needs no files."""
    return TensorPipeline(model)
