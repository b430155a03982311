"""The fleet file: device classes with prices and capabilities, models, and how a trace's requests are served.

Parsed once into frozen values. Only this module knows the file's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from controller.decide.pools import Rules
from simulator.timing import Above, Roofline, Shape, Stepping, Timing, Whole
from tasks.document import Contradictions, DocumentError, Size, Verbatim, parse_document, read_document
from tasks.endpoints import Rate
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
    """A generating model's shape. `gated` means three matrices in its feed-forward layer, not two."""

    layers: Positive
    hidden: Positive
    intermediate: Positive
    heads: Positive
    kv_heads: Positive
    vocabulary: Positive
    gated: bool = True
    bytes_per_weight: Above = 2.0

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


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A measured model: a batch takes `max(floor, base + slope · rows · mean size)` seconds."""

    base: AtLeast0
    slope: AtLeast0
    floor: AtLeast0 = 0.0
    load: AtLeast0 = 1.0
    memory: Size = msgspec.field(default_factory=lambda: Size(0))


class NodePool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes for at most `count` devices of a class, or for all; `spot` ones cost the spot price and are reclaimed."""

    name: Name
    count: Positive | None = None
    spot: bool = False


class PoolTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds, as in `controller.times` of the chart's values: the operator's patience with pools."""

    stock_out: Above = Rules().stock_out
    retry: Above = Rules().retry
    hold: AtLeast0 = Rules().hold

    def rules(self) -> Rules:
        """As the operator's decisions have them."""
        return Rules(self.stock_out, self.retry, self.hold)


class DeviceClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A hardware class: at most `count` identical devices that share one queue.

    `minimum` of them are never switched off and `initial` are on when the trace begins. A device serves `start` seconds
    after it is switched on. `spot` devices cost the spot price and are reclaimed. Rates are per device and hour. `warm`
    names models that it has loaded by then. `reserve_for` names the service that the class is reserved for. `horizon`
    is the most seconds of work bound to it. A batch that runs as a whole takes at most `max_run` seconds, as in
    queues.yaml; unbounded if absent. `accelerator` and `instances` are names in a price file, for the planner.
    An `endpoint` is an external server: `max_batch` are its slots, its price may be by tokens and requests, and
    each device is sent no more than `rate`.
    With `pools` the Kubernetes operator decides on which nodes devices run, first choice first, once per second.
    """

    count: Positive
    minimum: Annotated[int, msgspec.Meta(ge=0)] = 0
    initial: Annotated[int, msgspec.Meta(ge=0)] = 0
    price: Price
    spot: bool = False
    memory: Size
    start: AtLeast0
    failures_per_hour: AtLeast0 = 0.0
    reclaims_per_hour: AtLeast0 = 0.0
    max_batch: Positive
    max_wait: AtLeast0 = 0.0
    max_run: Above | None = None
    horizon: Above = 1.0
    warm: tuple[Name, ...] = ()
    reserve_for: ServiceName | None = None
    roofline: Roofline | None = None
    curves: dict[str, Curve] = {}
    accelerator: Name | None = None
    instances: tuple[Name, ...] = ()
    endpoint: bool = False
    rate: Rate = Rate()
    pools: tuple[NodePool, ...] = ()
    times: PoolTimes = PoolTimes()

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


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Terms for `share` of the requests whose trace names no service.

    They are due after `deadline` seconds, or after `times_fastest` times their fastest unloaded time. `preemptible`
    requests may be interrupted, and so may run on spot classes.
    """

    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    deadline: Above | None = None
    times_fastest: Above | None = None
    priority: Priority = "normal"
    preemptible: bool = False


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A change of a class's hardware, `at` seconds into the trace; exactly one of the three.

    Work takes `slower` times its profile's seconds from then on. At most `available` devices may be on. All devices
    that are on are `reclaimed`. Of a class with pools, the last two happen to one `pool`.
    """

    at: AtLeast0
    hardware_class: ClassName = msgspec.field(name="class")
    slower: Above | None = None
    available: Annotated[int, msgspec.Meta(ge=0)] | None = None
    reclaimed: bool = False
    pool: Name | None = None


class Penalties(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """US dollars an hour that it costs when all of a service is late or refused."""

    live: AtLeast0 = 0.0
    standard: AtLeast0 = 0.0
    bulk: AtLeast0 = 0.0


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    classes: Annotated[dict[ClassName, DeviceClass], msgspec.Meta(min_length=1)]
    models: dict[str, Transformer] = {}
    default_model: str
    services: dict[str, Service]
    rebalance: Rebalance = Rebalance()
    events: tuple[Event, ...] = ()
    penalties: Penalties = Penalties()


@dataclass(frozen=True, slots=True)
class Fleet:
    """Device classes by name in the file's order, services in the order of `SERVICES`, and each model's timings.

    `penalties` are US dollars an hour by service.
    """

    file: str
    classes: Mapping[str, DeviceClass]
    services: tuple[Service, ...]
    default_model: str
    rebalance: Rebalance
    timings: Mapping[str, tuple[Timing | None, ...]]
    events: tuple[Event, ...] = ()
    penalties: tuple[float, ...] = (0.0,) * len(SERVICES)

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
        return Whole(curve.load, curve.memory, curve.base, curve.slope, curve.floor)
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


def _event_contradictions(path: str, document: Document, event: Event) -> Contradictions:
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
