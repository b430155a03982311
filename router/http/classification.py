"""The classification extension: an output's largest values with their indices, instead of the whole output.

Source: triton-inference-server/server, docs/protocol/extension_classification.md. An element is `value:index`. Models
here have no label file, so there is no third part. Outputs of type BYTES (labels) are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.models.catalogue import Model, TensorSpec
from taxiway.errors import wrong_field

PARAMETER = "classification"
"""An output's parameter: how many of each row's largest values are wanted."""


def classes_wanted(model: Model, outputs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, int]:
    """The number of classes wanted of each output that has the parameter; `outputs` are parameters by name.

    Raises:
        InvalidRequestError: not a number, or the output has no numbers besides the batch axis; names the parameter.
    """
    specs = {spec.name: spec for spec in model.outputs}
    return {
        name: _count(parameters[PARAMETER], specs[name])
        for name, parameters in outputs.items()
        if PARAMETER in parameters and name in specs
    }


def classified(spec: TensorSpec, rows: np.ndarray, count: int) -> tuple[TensorSpec, list[list[str]]]:
    """The output's new spec, and the largest values of each row, largest first; ties by index."""
    flat = np.moveaxis(rows, spec.batch_axis or 0, 0).reshape(rows.shape[spec.batch_axis or 0], -1)
    places = np.argsort(-flat.astype(np.float64), axis=1, kind="stable")[:, :count]
    written = "{}:{}" if flat.dtype.kind in "iub" else "{:f}:{}"
    texts = [
        [written.format(value, place) for value, place in zip(row[order].tolist(), order.tolist(), strict=True)]
        for row, order in zip(flat, places, strict=True)
    ]
    return TensorSpec(spec.name, "BYTES", (-1, places.shape[1])), texts


def _count(count: object, spec: TensorSpec) -> int:
    field = f"outputs.{spec.name}.{PARAMETER}"
    if type(count) is not int or count < 1:
        raise wrong_field(field, "a whole number >= 1", count)
    if spec.datatype == "BYTES" or len(spec.shape) < 2:
        raise wrong_field(field, "an output of several numbers a row", f"{spec.datatype} {list(spec.shape)}")
    return count
