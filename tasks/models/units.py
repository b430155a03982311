"""The `size_unit` of a model.yaml: what makes one row larger than another. Pure; only this module reads the text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tasks.models.tensor_spec import TensorSpec

Kind = Literal["rows", "tokens", "bytes", "value", "elements", "axis"]

WORDS: tuple[Kind, ...] = ("rows", "tokens", "bytes")
"""Units that do not name an input; an input of the same name cannot be the unit."""

EXPECTED = (
    "rows, tokens (of a text, generation or chat), bytes, or an input: the value of one with an integer a row, "
    "the elements that a row of another has, or the length of one axis, as in input_ids[1]"
)

_INTEGERS = ("UINT8", "INT8", "INT16", "INT32", "INT64")
_INPUT = re.compile(r"^(?P<name>[^\[\]]+)(?:\[(?P<axis>[0-9]{1,2})\])?$")


@dataclass(frozen=True, slots=True)
class Unit:
    """What a row's size counts; the last three kinds are of the input `name`, and `axis` is an axis of its row."""

    kind: Kind
    name: str = ""
    axis: int = 0


_OF_WORDS: dict[str, Unit] = {word: Unit(word) for word in WORDS}


class UnitError(ValueError):
    """The text names no unit of a model with these inputs."""


def read_unit(text: str, inputs: Iterable[TensorSpec], pipeline: str) -> Unit:
    """The unit that `text` names.

    Raises:
        UnitError: it names none, or one that this kind of model lacks.
    """
    word = _OF_WORDS.get(text)
    if word is not None:
        if word.kind == "tokens" and pipeline not in ("text", "generation", "chat"):
            raise UnitError(text)
        return word
    found = _INPUT.match(text)
    spec = next((i for i in inputs if found is not None and i.name == found["name"]), None)
    if found is None or spec is None or pipeline not in ("tensors", "image"):
        raise UnitError(text)
    return _of_input(spec, int(found["axis"]) if found["axis"] else None)


def _of_input(spec: TensorSpec, axis: int | None) -> Unit:
    batch = spec.batch_axis
    if axis is not None:
        if axis == batch or axis >= len(spec.shape):
            raise UnitError(f"{spec.name}[{axis}]")
        return Unit("axis", spec.name, axis - (batch is not None and axis > batch))
    if len(spec.shape) > (batch is not None):
        return Unit("elements", spec.name)
    if spec.datatype not in _INTEGERS:
        raise UnitError(spec.name)
    return Unit("value", spec.name)
