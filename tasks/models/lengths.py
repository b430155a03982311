"""How long a model's recent answers to a tenant were, and how long the next one will be. Pure.

Workers count each generated answer by its bin; the state store decays earlier counts (`learn.lua`); routers size a
request by a quantile. No decision knows the actual length of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from tasks.models.catalogue import Model

Lengths = Mapping[int, float]
"""Weight of each bin that answers fell in; the newest answer weighs 1."""

QUANTILE = 0.8
"""Share of answers that are no longer than predicted: sufficient for deadlines, without assuming the worst case."""

LONGEST = "max_tokens"
"""The parameter that bounds a generated answer."""

_GENERATED, _FINISH, _STOPPED = "tokens", "finish-reason", "stop"  # outputs of a generating model, and a value
_PRIOR_WEIGHT = 4.0  # answers that the prior, half of `max_tokens`, counts for
_BINS_A_DOUBLING = 4  # resolution: 19 %, rounded up
_LAST = 81  # a million tokens; longer answers count there


def generates(model: Model) -> bool:
    """Whether the model generates answers of unknown length."""
    return model.pipeline in ("generation", "chat") and LONGEST in model.parameters


def bin_of(tokens: int) -> int:
    """The bin of an answer: the smallest that holds it."""
    if tokens <= 0:
        return 0
    return min(_LAST, 1 + math.ceil(_BINS_A_DOUBLING * math.log2(tokens) - 1e-9))


def tokens_of(place: int) -> int:
    """The longest answer of a bin."""
    return math.floor(2 ** ((place - 1) / _BINS_A_DOUBLING) + 1e-9) if place > 0 else 0


def predicted(lengths: Lengths, most: int) -> int:
    """Tokens that an answer of at most `most` will have, at the quantile; between 0 and `most`."""
    weights = dict(lengths)
    middle = bin_of(most // 2)
    weights[middle] = weights.get(middle, 0.0) + _PRIOR_WEIGHT
    wanted = QUANTILE * math.fsum(weights.values())
    seen = 0.0
    for place in sorted(weights):
        seen += weights[place]
        if seen >= wanted:
            return min(tokens_of(place), max(most, 0))
    return max(most, 0)


def length_of(answer: Mapping[str, Any]) -> int:
    """Tokens that a device computed for a generated answer, including the one that ended it; 0 for other answers."""
    return int(answer.get(_GENERATED, 0)) + (answer.get(_FINISH) == _STOPPED)


def read_lengths(raw: bytes) -> Lengths:
    """The weights in the state store; empty if they cannot be read."""
    try:
        return _decode(raw)
    except msgspec.MsgspecError:
        return {}


def ran_size(model: Model, size: int, parameters: Mapping[str, Any], answer: Mapping[str, Any]) -> int:
    """The size of a row that ran, with the actual length of its answer; `size` assumes the longest one."""
    return size - int(parameters[LONGEST]) + length_of(answer) if generates(model) else size


_Bin = Annotated[int, msgspec.Meta(ge=0, le=_LAST)]
_decode = msgspec.json.Decoder(dict[_Bin, Annotated[float, msgspec.Meta(ge=0)]]).decode
