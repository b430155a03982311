"""An input or output of a model, as model.yaml declares it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Datatype = Literal["BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"]

TensorName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=64,
        description="a graph's name with other characters goes into `source`",
    ),
]
"""What callers call a tensor; a graph calls it the same unless there is a `source`."""

MOST_SOURCE = 1024
"""Characters of a tensor's name in a graph."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One input or output."""

    name: TensorName
    """What callers call it. Example: features"""
    datatype: Datatype
    """The type of its elements; BYTES are texts, bytes or any JSON value."""
    shape: tuple[int, ...]
    """Its lengths, with -1 at `batch_axis` and for axes that vary. Example: [-1, 4]"""
    optional: bool = False
    """An optional input may be omitted; an optional output is returned only to a request that names it."""
    batch_axis: Annotated[int, msgspec.Meta(ge=0)] | None = 0
    """The axis of the batch; null: all rows of a batch share the input, such as a sample rate, and rows with different
    values run in separate batches."""
    source: Annotated[str, msgspec.Meta(max_length=MOST_SOURCE)] = ""
    """Its name in the graph, or at an endpoint, if that is not `name`. Example: save_infer_model/scale_0.tmp_1"""

    @property
    def called(self) -> str:
        """Its name in the graph, or at an endpoint."""
        return self.source or self.name

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row: without the batch axis."""
        axis = self.batch_axis
        return self.shape if axis is None else (*self.shape[:axis], *self.shape[axis + 1 :])
