"""A request to a model, for trying it: its own example, else one that is made from its model.yaml."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Model, TensorSpec

_TEXT = "A quiet harbour town wakes slowly."


def try_inputs(model: Model, artefacts: ArtefactStore) -> tuple[Any, bool]:
    """Inputs of a request, and whether they are the model's own example.

    Raises:
        ArtefactError: the example is an artefact that cannot be had.
    """
    if model.examples:
        return artefacts.example(model, model.examples[0]), True
    return made_inputs(model), False


def made_inputs(model: Model) -> dict[str, Any]:
    """Inputs of one row, of the shapes and datatypes that model.yaml declares: ones, halves or a short text.

    Of an axis that may vary there is one; an image model gets its pixels.
    """
    wanted = [spec for spec in model.inputs if not spec.optional] or [_plainest(model)]
    return {spec.name: _made(spec) for spec in wanted}


def _plainest(model: Model) -> TensorSpec:
    """Of inputs that are all optional, one of numbers where there is one."""
    return next((spec for spec in model.inputs if spec.datatype != "BYTES"), model.inputs[0])


def _made(spec: TensorSpec) -> Any:
    if spec.datatype == "BYTES":
        return _TEXT
    shape = [max(length, 1) for length in spec.row_shape]
    return np.full(shape, 0.5 if spec.datatype.startswith("FP") else 1).tolist()
