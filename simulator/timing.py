"""What one model takes on one device class: steps of a generating model, or whole batches.

A request has a `size` (known on arrival: prompt tokens, rows of pixels) and an `output` (tokens it generates).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Protocol, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Above = Annotated[float, msgspec.Meta(gt=0)]


class Timing(Protocol):
    """What one model takes on one device class."""

    @property
    def load(self) -> float:
        """Seconds to load it onto a device."""

    @property
    def memory(self) -> int:
        """Bytes that it holds while loaded, without those of requests."""

    def answer(self, size: Numbers, output: Numbers, rows: float) -> Numbers:
        """Seconds until the answer if `rows` such requests always run together. Shapes: (n,), (n,) to (n,)."""

    def slower(self, factor: float) -> Self:
        """The timing of a device on which all but loading takes `factor` times as long."""


@dataclass(frozen=True, slots=True)
class Stepping:
    """A generating model: requests join and leave its batch between steps (continuous batching).

    A prompt is read by itself, bound by compute. A step gives each row one token, bound by the bytes of the weights and
    of all rows' caches.
    """

    load: float
    """Seconds until it is loaded."""
    memory: int
    """Bytes of the loaded model."""
    cache: float
    """Bytes per token."""
    # Seconds
    per_token: float
    """To compute one token."""
    per_pair: float
    """To compute one pair of tokens, in a prompt."""
    reading: float
    """To read the weights, once a step."""
    per_cached: float
    """To read a cached token, once a step."""
    overhead: float
    """Of a step."""

    def prefill(self, tokens: float) -> float:
        """Seconds to read a prompt; attention grows with the pairs of tokens."""
        compute = tokens * (self.per_token + self.per_pair * tokens)
        return (compute if compute > self.reading else self.reading) + self.overhead

    def slower(self, factor: float) -> Self:
        """As `Timing.slower`."""
        return replace(
            self,
            per_token=self.per_token * factor,
            per_pair=self.per_pair * factor,
            reading=self.reading * factor,
            per_cached=self.per_cached * factor,
            overhead=self.overhead * factor,
        )

    def step(self, rows: float, cached: float) -> float:
        """Seconds of one step over `rows` with `cached` tokens in total."""
        compute = rows * self.per_token
        reading = self.reading + self.per_cached * cached
        return (compute if compute > reading else reading) + self.overhead

    def answer(self, size: Numbers, output: Numbers, rows: float) -> Numbers:
        """As `Timing.answer`: while a request is in the batch, each of its `rows` places is taken over once."""
        prefill = np.maximum(size * (self.per_token + self.per_pair * size), self.reading) + self.overhead
        cached = rows * (size + output / 2)
        step = np.maximum(rows * self.per_token, self.reading + self.per_cached * cached) + self.overhead
        return np.asarray(rows * prefill + output * step)


@dataclass(frozen=True, slots=True)
class WholeBatches:
    """A model whose batches run as a whole: `max(floor, base + slope · rows · mean size)` seconds.

    Sizes include outputs.
    """

    load: float
    memory: int
    base: float
    slope: float
    floor: float

    def batch(self, rows: int, total: float) -> float:
        """Seconds of a batch of `rows` with a total size of `total`."""
        return max(self.floor, self.base + self.slope * total) if rows else 0.0

    def slower(self, factor: float) -> Self:
        """As `Timing.slower`."""
        return replace(self, base=self.base * factor, slope=self.slope * factor, floor=self.floor * factor)

    def answer(self, size: Numbers, output: Numbers, rows: float) -> Numbers:
        """As `Timing.answer`."""
        return np.maximum(self.floor, self.base + self.slope * rows * (size + output))
