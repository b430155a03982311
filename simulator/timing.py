"""What one model takes on one device class: one roofline for transformers, measured profiles for the rest.

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

COMPUTE_EFFICIENCY = 0.65
"""Share of the peak rate that dense layers reach. Source: the least mean log error over Vidur's a40, a100 and h100."""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the peak bandwidth that reading weights reaches. Source: the same fit."""

LAYER_OVERHEAD = 50e-6
"""Seconds per layer that the roofline does not explain: launches, norms, rotations. Source: the same fit."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense transformer: `layer` weights per layer, `head` for the logits, `cache` values kept per token."""

    layers: int
    hidden: int
    layer: int
    head: int
    cache: int
    bytes_per_weight: float = 2.0

    @property
    def memory(self) -> int:
        """Bytes of the weights; the embedding counts like the head."""
        return int((self.layers * self.layer + 2 * self.head) * self.bytes_per_weight)


class Roofline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device's limits."""

    peak_flops: Above
    """Peak dense operations a second. Example: 1.2e+14"""
    bandwidth: Above
    """Bytes a second of its memory. Example: 3.0e+11"""
    host_link: Above
    """Bytes a second of its host link. Example: 1.2e+10"""

    def layer(self, shape: Shape, tokens: float, shards: int = 1) -> float:
        """Seconds of one layer's dense operators for `tokens` in the batch."""
        compute = 2 * shape.layer / shards * tokens / (self.peak_flops * COMPUTE_EFFICIENCY)
        reading = shape.layer / shards * shape.bytes_per_weight / (self.bandwidth * BANDWIDTH_EFFICIENCY)
        return max(compute, reading) + LAYER_OVERHEAD


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

    @classmethod
    def of(cls, shape: Shape, roofline: Roofline) -> Stepping:
        """The timing of a transformer on a device."""
        weights = shape.layers * shape.layer + shape.head
        flops = roofline.peak_flops * COMPUTE_EFFICIENCY
        bandwidth = roofline.bandwidth * BANDWIDTH_EFFICIENCY
        return cls(
            load=shape.memory / roofline.host_link,
            memory=shape.memory,
            cache=shape.cache * 2.0,
            per_token=2 * weights / flops,
            per_pair=2 * shape.layers * shape.hidden / flops,
            reading=weights * shape.bytes_per_weight / bandwidth,
            per_cached=shape.cache * 2.0 / bandwidth,
            overhead=shape.layers * LAYER_OVERHEAD,
        )

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
