"""Turns a request's rows into tensors, runs batches of them on a runtime, and turns tensors into answers.

One file a kind of model: `tensors` (arrays in, arrays out), `text`, `image`, `generation`; the last has its batches in
`running` and its choices in `sampling`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks.models.catalogue import Model, Variant
from workers.runtimes import Arrays, Placed, Runtime

Row = Mapping[str, Any]
"""One row of a request: a plain value (str, bytes, number, nested list or array) for each input's name."""


@dataclass(slots=True)
class Item:
    """One row, prepared: arrays without the batch axis, the size that buckets and profiles count, parameters.

    `level` is its job's priority level, which no pipeline sees; `starved` says that it ran out of memory once, in a
    process that had run others.
    """

    arrays: Arrays
    size: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    level: int = 0
    starved: bool = False


class Pipeline(Protocol):
    """What surrounds a graph. Made once for a model variant; `prepare` may run beside `run`, on another thread."""

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The row as tensors.

        Raises:
            InvalidRequestError: the row is wrong; names the input.
        """

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """One answer an item, in order: plain JSON values or arrays by output name.

        Items share a size bucket. Raises `ExecutionError`, which then holds for the whole batch.
        """


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> Pipeline:
    """The pipeline that `model` names, with its tokenizer, labels or head read from the variant's files."""
    module = importlib.import_module(f"workers.pipelines.{model.pipeline}")
    opened: Pipeline = module.open_pipeline(model, variant, placed)
    return opened
