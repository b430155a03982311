"""The simulated fleet: device classes with prices, what models take on them, and how a trace's requests are served.

A request has a `size` (known on arrival: prompt tokens, rows of pixels) and an `output` (tokens it generates).

It is made of a queues.yaml (`tuning.real_fleet`), or of a fleet file of the laboratory (`lab.fleet_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from tasks.document import Size
from tasks.queues.endpoints import Rate
from tasks.topology import Price, Rebalance

Numbers = NDArray[np.float64]
Above = Annotated[float, msgspec.Meta(gt=0)]


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
        """The timing of a device on which all but loading takes `factor` times as long."""
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
        """Seconds until the answer if `rows` such requests always run together. Shapes: (n,), (n,) to (n,).

        While a request is in the batch, each of its `rows` places is taken over once.
        """
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
        """As `Stepping.slower`."""
        return replace(self, base=self.base * factor, slope=self.slope * factor, floor=self.floor * factor)

    def answer(self, size: Numbers, output: Numbers, rows: float) -> Numbers:
        """As `Stepping.answer`."""
        return np.maximum(self.floor, self.base + self.slope * rows * (size + output))


Timing = Stepping | WholeBatches
"""What one model takes on one device class."""

ServiceName = Literal["live", "standard", "bulk"]

SERVICES: tuple[str, ...] = get_args(ServiceName)
"""The services that reports distinguish, most urgent first."""

USABLE = 0.9
"""Share of a device's memory that models and caches may use; the rest is for the runtime."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
AtLeast0 = Annotated[float, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1)]


class DeviceClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A hardware class: identical devices that share one queue."""

    # How many there are, and what they cost
    count: Positive
    """Most devices. Example: 4"""
    minimum: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Devices that are never switched off."""
    initial: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Devices that are on when the trace begins."""
    start: AtLeast0
    """Seconds from switching a device on until it serves. Example: 90"""
    price: Price
    """What one device costs."""
    spot: bool = False
    """Whether devices cost the spot price and are reclaimed."""
    failures_per_hour: AtLeast0 = 0.0
    """Failures of each device, an hour."""
    reclaims_per_hour: AtLeast0 = 0.0
    """Reclaims of each device of spot capacity, an hour."""

    # What they run
    memory: Size
    """Bytes of one device's memory. Example: 24GiB"""
    endpoint: bool = False
    """Whether it is an external server: `max_batch` are its slots, and its price may be by tokens and requests."""
    rate: Rate = Rate()
    """The most that each device of an endpoint is sent."""
    warm: tuple[Name, ...] = ()
    """Models that a device has loaded once it serves. Example: [bert]"""

    # Batches and queues
    max_batch: Positive
    """Rows of the largest batch. Example: 16"""
    max_wait: AtLeast0 = 0.0
    """Longest that a batch forms, in seconds."""
    max_run: Above | None = None
    """Longest that a batch of several rows runs as a whole, in seconds; not given: no bound. Example: 0.5"""
    horizon: Above = 1.0
    """Most seconds of work that are bound to its queue."""
    reserve_for: ServiceName | None = None
    """The service that it is kept for. Example: live"""

    @property
    def usd_per_second(self) -> float:
        """Price of a device while it is on."""
        spot = self.price.spot_usd_per_hour
        return (spot if self.spot and spot is not None else self.price.usd_per_hour) / 3600


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a run is played on."""

    classes: Mapping[str, DeviceClass]
    """By name, in the order of the file."""
    preemptible: tuple[bool, ...]
    """By service: whether its requests may be interrupted, and so run on spot classes."""
    rebalance: Rebalance
    timings: Mapping[str, tuple[Timing | None, ...]]
    """Of each model, by class; None where it cannot run."""
    penalties: tuple[float, ...] = (0.0,) * len(SERVICES)
    """US dollars an hour by service."""
