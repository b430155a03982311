"""The simulated fleet: device classes with prices and capabilities, and how a trace's requests are served.

It is made of a queues.yaml (`tuning.real_fleet`), or of a fleet file of the laboratory (`lab.fleet_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import msgspec

from simulator.timing import Above, Timing
from tasks.document import Size
from tasks.queues.endpoints import Rate
from tasks.topology import ClassName, Price, Rebalance
from taxiway.contract.request import Priority

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


class ServiceShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Terms for the requests whose trace names no service."""

    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Their share of those requests, 0 to 1. Example: 0.4"""
    deadline: Above | None = None
    """Seconds within which they are due; not given, as below: never. Example: 0.3"""
    times_fastest: Above | None = None
    """The same as a multiple of their fastest unloaded time. Example: 5"""
    priority: Priority = "normal"
    """The level at which they wait."""
    preemptible: bool = False
    """Whether they may be interrupted, and so run on spot classes."""


class HardwareChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A change of a class's hardware: exactly one of `slower`, `available` and `reclaimed`."""

    at: AtLeast0
    """Seconds into the trace. Example: 450"""
    hardware_class: ClassName = msgspec.field(name="class")
    """The class. Example: gpu.l4"""
    slower: Above | None = None
    """Work takes this many times its profile's seconds from then on. Example: 3"""
    available: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Most devices that may be on from then on. Example: 2"""
    reclaimed: bool = False
    """Whether all devices that are on are reclaimed."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a run is played on."""

    file: str
    classes: Mapping[str, DeviceClass]
    """By name, in the order of the file."""
    services: tuple[ServiceShare, ...]
    """In the order of `SERVICES`."""
    default_model: str
    rebalance: Rebalance
    timings: Mapping[str, tuple[Timing | None, ...]]
    """Of each model, by class; None where it cannot run."""
    events: tuple[HardwareChange, ...] = ()
    penalties: tuple[float, ...] = (0.0,) * len(SERVICES)
    """US dollars an hour by service."""

    def models(self) -> list[str]:
        """The models that some class can run."""
        return sorted(self.timings)
