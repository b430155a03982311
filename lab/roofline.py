"""One roofline for all transformers: what a model of a shape takes on a device with these limits."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from simulator.fleet import Above, Stepping

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


def stepping(shape: Shape, roofline: Roofline) -> Stepping:
    """The timing of a transformer on a device."""
    weights = shape.layers * shape.layer + shape.head
    flops = roofline.peak_flops * COMPUTE_EFFICIENCY
    bandwidth = roofline.bandwidth * BANDWIDTH_EFFICIENCY
    return Stepping(
        load=shape.memory / roofline.host_link,
        memory=shape.memory,
        cache=shape.cache * 2.0,
        per_token=2 * weights / flops,
        per_pair=2 * shape.layers * shape.hidden / flops,
        reading=weights * shape.bytes_per_weight / bandwidth,
        per_cached=shape.cache * 2.0 / bandwidth,
        overhead=shape.layers * LAYER_OVERHEAD,
    )
