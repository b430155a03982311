"""The fleet file of the laboratory: device classes, models, and the terms of requests, of a fleet that does not exist.

Parsed once into the simulator's frozen values. Only this module knows the file's shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from lab.changes import ChangingFleet, HardwareChange
from lab.roofline import Roofline, Shape, stepping
from router.decide.classify import BACKGROUND, LATENCY_CRITICAL
from simulator.fleet import SERVICES, USABLE, Above, AtLeast0, DeviceClass, Fleet, Positive, Timing, WholeBatches
from simulator.traces import UNSET, Column, Trace, TraceError
from simulator.workload import CHUNK, Figures, Workload, alone_and_work
from simulator.workload import prepare as with_levels
from tasks.document import Contradictions, DocumentError, Size, Verbatim, parse_document, read_document
from tasks.history import PRIORITIES
from tasks.queues.endpoints import Rate
from tasks.topology import ClassName, Rebalance, price_contradictions
from taxiway.contract.request import Priority


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFleet(ChangingFleet):
    """A fleet of a fleet file."""

    file: str
    default_model: str
    terms: tuple[ServiceShare, ...]
    """In the order of `SERVICES`."""


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


def parse_fleet(text: str, file: str = "fleet.yaml") -> FileFleet:
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
    terms = tuple(document.services[name] for name in SERVICES)
    return FileFleet(
        file=file,
        classes=document.classes,
        preemptible=tuple(service.preemptible for service in terms),
        terms=terms,
        default_model=document.default_model,
        rebalance=document.rebalance,
        timings=able,
        events=tuple(sorted(document.events, key=lambda event: event.at)),
        penalties=tuple(getattr(document.penalties, name) for name in SERVICES),
    )


def load_fleet(path: Path) -> FileFleet:
    """Read `path`.

    Raises:
        FleetError: the file is missing or invalid.
    """
    return parse_fleet(read_document(path, file=str(path), error=FleetError), str(path))


def prepare(trace: Trace, fleet: Fleet, *, seed: int) -> Workload:
    """Give every request its terms; those missing in the trace are drawn with `seed`.

    A request without service and deadline draws a service by the fleet's shares. One with only a deadline is live,
    standard or bulk by its length; one with only a service gets that service's deadline.

    Raises:
        TraceError: the trace asks for a model that no class runs.
    """
    assert isinstance(fleet, FileFleet)
    unknown = [name for name in trace.models if name not in fleet.timings]
    if unknown:
        raise TraceError("trace", 0, f"models that the fleet runs, {sorted(fleet.timings)}", unknown)
    service = _services(trace, fleet, np.random.default_rng(seed))
    deadline = _deadlines(trace, fleet, service)
    named = np.array([PRIORITIES.index(terms.priority) for terms in fleet.terms], np.int8)
    priority = np.where(trace.priority == UNSET, named[service], trace.priority)
    return with_levels(replace(trace, service=service, deadline=deadline, priority=priority), fleet)


def _services(trace: Trace, fleet: FileFleet, random: np.random.Generator) -> Column:
    shares = [terms.share for terms in fleet.terms]
    drawn = random.choice(len(SERVICES), size=len(trace), p=np.array(shares) / sum(shares))
    by_deadline = np.select([trace.deadline <= LATENCY_CRITICAL, trace.deadline <= BACKGROUND], [0, 1], 2)
    chosen = np.where(np.isnan(trace.deadline), drawn, by_deadline)
    return np.where(trace.service == UNSET, chosen, trace.service).astype(np.int8)


def _deadlines(trace: Trace, fleet: FileFleet, service: Column) -> Figures:
    fixed = np.array([math.inf if terms.deadline is None else terms.deadline for terms in fleet.terms])[service]
    factor = np.array([terms.times_fastest or math.nan for terms in fleet.terms])[service]
    parts = (trace.part(slice(start, start + CHUNK)) for start in range(0, len(trace), CHUNK))
    fastest = np.concatenate([alone_and_work(part, fleet, part.output)[0].min(axis=1) for part in parts])
    own = np.where(np.isnan(factor), fixed, factor * fastest)
    return np.where(np.isnan(trace.deadline), own, trace.deadline)


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
