"""The fleet file: device classes with prices and capabilities, models, and how a trace's requests are served.

Parsed once into frozen values. Only this module knows the file's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from controller.decide.pools import PoolRules
from simulator.timing import Above, Roofline, Shape, Stepping, Timing, WholeBatches
from tasks.document import Contradictions, DocumentError, Size, Verbatim, parse_document, read_document
from tasks.queues.endpoints import Rate
from tasks.topology import ClassName, Price, Rebalance, price_contradictions
from taxiway.contract.request import Priority

ServiceName = Literal["live", "standard", "bulk"]

SERVICES: tuple[str, ...] = get_args(ServiceName)
"""The services that reports distinguish, most urgent first."""

USABLE = 0.9
"""Share of a device's memory that models and caches may use; the rest is for the runtime."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
AtLeast0 = Annotated[float, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1)]


class FleetError(DocumentError):
    """A fleet file is invalid: file, path inside it, what was expected and what was found."""


class Transformer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A generating model's shape."""

    layers: Positive
    """Layers. Example: 32"""
    hidden: Positive
    """Width of a token's state. Example: 4096"""
    intermediate: Positive
    """Width of the feed-forward layer. Example: 14336"""
    heads: Positive
    """Attention heads. Example: 32"""
    kv_heads: Positive
    """Heads of keys and values. Example: 8"""
    vocabulary: Positive
    """Tokens that it knows. Example: 128256"""
    gated: bool = True
    """Whether its feed-forward layer has three matrices, not two."""
    bytes_per_weight: Above = 2.0
    """Bytes of one weight."""

    def shape(self) -> Shape:
        """Its weights, counted."""
        kv_width = self.hidden * self.kv_heads // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv_width
        feed_forward = (3 if self.gated else 2) * self.hidden * self.intermediate
        return Shape(
            layers=self.layers,
            hidden=self.hidden,
            layer=attention + feed_forward,
            head=self.hidden * self.vocabulary,
            cache=2 * self.layers * kv_width,
            bytes_per_weight=self.bytes_per_weight,
        )


class MeasuredCurve(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A measured model: a batch takes `max(floor, base + slope · rows · mean size)` seconds."""

    base: AtLeast0
    """Seconds of any batch. Example: 0.004"""
    slope: AtLeast0
    """Seconds for each row and unit of size. Example: 0.0001"""
    floor: AtLeast0 = 0.0
    """Least seconds of a batch."""
    load: AtLeast0 = 1.0
    """Seconds to load the model."""
    memory: Size = msgspec.field(default_factory=lambda: Size(0))
    """Bytes that the model holds. Example: 512MiB"""


class NodePool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes for devices of a class."""

    name: Name
    """A name of its own within the class. Example: spot"""
    count: Positive | None = None
    """Most devices on them; not given: the class's `count`. Example: 4"""
    spot: bool = False
    """Whether they cost the spot price and are reclaimed."""


class PoolTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the operator changes pools, as in the values of the chart (`times` of its `controller`)."""

    stock_out: Above = PoolRules().stock_out
    """Seconds without a node after which a pool is out."""
    retry: Above = PoolRules().retry
    """Seconds until a pool that is out is tried again, doubled each time up to 16-fold."""
    hold: AtLeast0 = PoolRules().hold
    """Seconds that a pool is on trial at least."""

    def rules(self) -> PoolRules:
        """As the operator's decisions have them."""
        return PoolRules(self.stock_out, self.retry, self.hold)


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
    pools: tuple[NodePool, ...] = ()
    """Pools of nodes, first choice first, between which the operator decides once a second. Example: [{name: spot,
    spot: true}, {name: demand}]"""
    times: PoolTimes = PoolTimes()
    """How the operator changes pools."""

    # What they run
    memory: Size
    """Bytes of one device's memory. Example: 24GiB"""
    roofline: Roofline | None = None
    """The device's limits, which give the timings of `models`; not given: only `curves` run. Example: {peak_flops:
    1.2e14, bandwidth: 3.0e11, host_link: 1.2e10}"""
    curves: dict[str, MeasuredCurve] = {}
    """Measured models by name. Example: {bert: {base: 0.004, slope: 0.0001}}"""
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

    # What it is called in a price file, for the planner
    accelerator: Name | None = None
    """The card. Example: nvidia-l4"""
    instances: tuple[Name, ...] = ()
    """The instances. Example: [g2-standard-8]"""

    @property
    def usd_per_second(self) -> float:
        """Price of a device while it is on."""
        return self.usd_on(self)

    def usd_on(self, nodes: DeviceClass | NodePool) -> float:
        """Price of a device on these nodes, per second."""
        spot = self.price.spot_usd_per_hour
        return (spot if nodes.spot and spot is not None else self.price.usd_per_hour) / 3600

    @property
    def most(self) -> int:
        """Devices that may be on at once: while they move from pool to pool, more than `count`."""
        return sum(pool.count or self.count for pool in self.pools) or self.count


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
    pool: Name | None = None
    """The pool that `available` or `reclaimed` is about, of a class with pools. Example: spot"""


class Penalties(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What it costs when all of a service is late or refused."""

    live: AtLeast0 = 0.0
    """US dollars an hour for live. Example: 48"""
    standard: AtLeast0 = 0.0
    """US dollars an hour for standard. Example: 24"""
    bulk: AtLeast0 = 0.0
    """US dollars an hour for bulk. Example: 12"""


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    classes: Annotated[dict[ClassName, DeviceClass], msgspec.Meta(min_length=1)]
    """Device classes by name."""
    models: dict[str, Transformer] = {}
    """Generating models by name, for classes with a `roofline`."""
    default_model: str
    """The model of requests whose trace names none. Example: bert"""
    services: dict[str, ServiceShare]
    """Terms of `live`, `standard` and `bulk`."""
    rebalance: Rebalance = Rebalance()
    """How waiting work moves, as in queues.yaml."""
    events: tuple[HardwareChange, ...] = ()
    """Changes of the hardware. Example: [{at: 450, class: gpu.l4, slower: 3}]"""
    penalties: Penalties = Penalties()
    """What late work costs; without them nothing is planned."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a fleet file says."""

    file: str
    classes: Mapping[str, DeviceClass]
    """By name, in the file's order."""
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


def parse_fleet(text: str, file: str = "fleet.yaml") -> Fleet:
    """The fleet that the YAML `text` describes.

    Raises:
        FleetError: names `file`, the path inside it, what was expected and what was found.
    """
    document = parse_document(text, Document, file=file, error=FleetError)
    for path, expected, value in _contradictions(document):
        raise FleetError(file, path, expected, value)
    timings = {name: _timings(document, name) for name in _models(document)}
    able = {name: row for name, row in timings.items() if any(row)}
    if document.default_model not in able:
        what = f"one of the models that a class can run, {sorted(able)}"
        raise FleetError(file, "default_model", what, document.default_model)
    services = tuple(document.services[name] for name in SERVICES)
    return Fleet(
        file=file,
        classes=document.classes,
        services=services,
        default_model=document.default_model,
        rebalance=document.rebalance,
        timings=able,
        events=tuple(sorted(document.events, key=lambda event: event.at)),
        penalties=tuple(getattr(document.penalties, name) for name in SERVICES),
    )


def load_fleet(path: Path) -> Fleet:
    """Read `path`.

    Raises:
        FleetError: the file is missing or invalid.
    """
    return parse_fleet(read_document(path, file=str(path), error=FleetError), str(path))


def _models(document: Document) -> list[str]:
    curves = {name for device in document.classes.values() for name in device.curves}
    return sorted(curves | set(document.models))


def _timings(document: Document, model: str) -> tuple[Timing | None, ...]:
    return tuple(_timing(document, model, device) for device in document.classes.values())


def _timing(document: Document, model: str, device: DeviceClass) -> Timing | None:
    """The model's timing on the class; None if it cannot run there."""
    curve = device.curves.get(model)
    if curve is not None:
        return WholeBatches(curve.load, curve.memory, curve.base, curve.slope, curve.floor)
    transformer = document.models.get(model)
    if device.roofline is None or transformer is None:
        return None
    timing = Stepping.of(transformer.shape(), device.roofline)
    return timing if timing.memory < device.memory * USABLE else None


def _contradictions(document: Document) -> Contradictions:
    """Path, expectation and value of each field that contradicts another."""
    if sorted(document.services) != sorted(SERVICES):
        yield "services", f"exactly {list(SERVICES)}", sorted(document.services)
        return
    shares = sum(service.share for service in document.services.values())
    if abs(shares - 1) > 1e-6:
        yield "services", "shares that sum up to 1", shares
    for name, service in document.services.items():
        if service.deadline is not None and service.times_fastest is not None:
            yield f"services.{name}", "a deadline or times_fastest, not both", service.deadline
    for name, device in document.classes.items():
        yield from _class_contradictions(f"classes.{name}", document, device)
    for number, event in enumerate(document.events):
        yield from _event_contradictions(f"events[{number}]", document, event)


def _event_contradictions(path: str, document: Document, event: HardwareChange) -> Contradictions:
    if event.hardware_class not in document.classes:
        yield f"{path}.class", f"one of the classes, {sorted(document.classes)}", event.hardware_class
    changes = sum((event.slower is not None, event.available is not None, event.reclaimed))
    if changes != 1:
        yield path, "exactly one of slower, available and reclaimed", changes
    elif event.hardware_class in document.classes:
        pools = [pool.name for pool in document.classes[event.hardware_class].pools if event.slower is None]
        if event.pool not in pools and (pools or event.pool is not None):
            yield f"{path}.pool", f"one of the class's pools, {pools}" if pools else "nothing", event.pool


def _wrong_terms(device: DeviceClass) -> Contradictions:
    if (device.spot or any(pool.spot for pool in device.pools)) and device.price.spot_usd_per_hour is None:
        yield "price.spot_usd_per_hour", "a price, because the class is spot", Verbatim("nothing")
    if len({pool.name for pool in device.pools}) < len(device.pools):
        yield "pools", "a name of its own for each", [pool.name for pool in device.pools]
    if device.rate != Rate() and not device.endpoint:
        yield "rate", "nothing, as only an endpoint has limits", msgspec.to_builtins(device.rate)
    yield from price_contradictions(device.price, "openai" if device.endpoint else None)


def _class_contradictions(path: str, document: Document, device: DeviceClass) -> Contradictions:
    if device.minimum > device.count:
        yield f"{path}.minimum", f"at most the count, {device.count}", device.minimum
    if not device.minimum <= device.initial <= device.count and device.initial:
        yield f"{path}.initial", f"from the minimum, {device.minimum}, to the count, {device.count}", device.initial
    for place, expected, value in _wrong_terms(device):
        yield f"{path}.{place}", expected, value
    if device.roofline is None and not device.curves:
        yield path, "a roofline, or curves of models", Verbatim("neither")
    for model in device.curves:
        if model in document.models:
            yield f"{path}.curves.{model}", "a model that is not a transformer under models", model
        if device.curves[model].memory > device.memory * USABLE:
            yield f"{path}.curves.{model}.memory", f"at most {device.memory * USABLE:.0f}", device.curves[model].memory
