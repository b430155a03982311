"""The fleet file of the laboratory: device classes, models, and the terms of requests, of a fleet that does not exist.

Parsed once into the simulator's frozen values. Only this module knows the file's shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from lab.roofline import Roofline, Shape, stepping
from simulator.fleet import (
    SERVICES,
    USABLE,
    Above,
    AtLeast0,
    DeviceClass,
    Fleet,
    HardwareChange,
    Positive,
    ServiceShare,
    Timing,
    WholeBatches,
)
from tasks.document import Contradictions, DocumentError, Size, Verbatim, parse_document, read_document
from tasks.queues.endpoints import Rate
from tasks.topology import ClassName, Rebalance, price_contradictions


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


class FileClass(DeviceClass, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A hardware class as a fleet file has it: with what gives its timings."""

    roofline: Roofline | None = None
    """The device's limits, which give the timings of `models`; not given: only `curves` run. Example: {peak_flops:
    1.2e14, bandwidth: 3.0e11, host_link: 1.2e10}"""
    curves: dict[str, MeasuredCurve] = msgspec.field(default_factory=dict)
    """Measured models by name. Example: {bert: {base: 0.004, slope: 0.0001}}"""


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

    classes: Annotated[dict[ClassName, FileClass], msgspec.Meta(min_length=1)]
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


def _timing(document: Document, model: str, device: FileClass) -> Timing | None:
    """The model's timing on the class; None if it cannot run there."""
    curve = device.curves.get(model)
    if curve is not None:
        return WholeBatches(curve.load, curve.memory, curve.base, curve.slope, curve.floor)
    transformer = document.models.get(model)
    if device.roofline is None or transformer is None:
        return None
    timing = stepping(transformer.shape(), device.roofline)
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


def _wrong_terms(device: FileClass) -> Contradictions:
    if device.spot and device.price.spot_usd_per_hour is None:
        yield "price.spot_usd_per_hour", "a price, because the class is spot", Verbatim("nothing")
    if device.rate != Rate() and not device.endpoint:
        yield "rate", "nothing, as only an endpoint has limits", msgspec.to_builtins(device.rate)
    yield from price_contradictions(device.price, "openai" if device.endpoint else None)


def _class_contradictions(path: str, document: Document, device: FileClass) -> Contradictions:
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
