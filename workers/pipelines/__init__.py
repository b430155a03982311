"""Converts a request's rows to tensors, runs batches of them on a runtime, and converts tensors to answers.

One file per kind of model: `tensors` (arrays in, arrays out), `text`, `image` and `generation`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks.models.catalogue import Model, Variant
from workers.runtimes import Arrays, Placed, Runtime

Row = Mapping[str, Any]
"""One row of a request: a plain value (str, bytes, number, nested list or array) by input name."""


@dataclass(slots=True)
class Item:
    """A prepared row: arrays without the batch axis, its size in the units of buckets and profiles, and parameters.

    `level` is its job's priority level, which pipelines ignore. `starved` means that it ran out of memory once, in a
    process that had run other rows.
    """

    arrays: Arrays
    size: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    level: int = 0
    starved: bool = False


class Pipeline(Protocol):
    """Pre- and postprocessing of a model variant. `prepare` may run concurrently with `run`, on another thread."""

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """Convert a row to tensors.

        Raises:
            InvalidRequestError: the row is invalid; names the input.
        """

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """One answer per item, in order: plain JSON values or arrays by output name.

        Items share a size bucket. An `ExecutionError` applies to the whole batch.
        """


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> Pipeline:
    """The pipeline that `model` names, with its tokenizer, labels or head from the variant's files."""
    module = importlib.import_module(f"workers.pipelines.{model.pipeline}")
    opened: Pipeline = module.open_pipeline(model, variant, placed)
    return opened
