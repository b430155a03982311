"""queues.yaml: hardware classes with their queues and prices, services, tenants and limits.

Only this module and `endpoints` (servers that run models) know the file's shape. It is parsed once, into frozen values.
`schema()` is its JSON Schema, kept in `queues.schema.json`.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tasks.document import (
    Contradictions,
    DocumentError,
    RuntimeName,
    Size,
    Verbatim,
    json_schema,
    parse_document,
    read_document,
)
from tasks.queues.endpoints import HOME, Endpoint, Tariff
from tasks.queues.endpoints import contradictions as endpoint_contradictions
from tasks.queues.hours import Hours, flaw
from tasks.queues.limits import Limits
from tasks.queues.locality import JOINT, Locality, LocalityText, missing, sealing_contradictions
from taxiway.contract.keys import ARRIVALS
from taxiway.contract.request import LONGEST_DEADLINE, MAX_NAME, Priority

DeviceKind = Literal["cpu", "cuda", "tpu", "mps", "endpoint"]
Tier = Literal["default", "flex", "priority"]
ClassName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)*$", max_length=64)]
TenantName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Dollars = Annotated[float, msgspec.Meta(gt=0)]
NoLess = Annotated[float, msgspec.Meta(ge=0)]

RUN_SHARE = 0.25
"""Fraction of the tightest deadline that a batch may take; a job that arrives at its start keeps most of its time."""

RUN_STRETCH = 1.25
"""Maximum time of a batch as a multiple of its first row alone, if that row already exceeds `max_run`.

Cost shared by all rows (reading the weights once) is then paid once; a second row that costs as much as the first
waits.
"""


class TopologyError(DocumentError):
    """queues.yaml is invalid: names the file, the path inside it, what was expected and what was found."""


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one device of a class costs while it is on, and what the use of an endpoint costs besides or instead."""

    usd_per_hour: NoLess = 0.0
    """US dollars an hour for one device, on demand; more than 0, unless the class is an endpoint with a price of use.
    Example: 0.71"""
    spot_usd_per_hour: Dollars | None = None
    """US dollars an hour for one device of spot capacity; not given: the same as on demand. Example: 0.28"""
    usd_per_million_input: NoLess = 0.0
    """US dollars for a million tokens that an endpoint reads. Example: 0.15"""
    usd_per_million_output: NoLess = 0.0
    """US dollars for a million tokens that an endpoint writes. Example: 0.6"""
    usd_per_million_cached_input: NoLess | None = None
    """US dollars for a million tokens of input that the endpoint had cached; not given: as other input. Example:
    0.075"""
    usd_per_request: NoLess = 0.0
    """US dollars for each request to an endpoint. Example: 0.001"""

    @property
    def tariff(self) -> Tariff | None:
        """The prices of use; None if only time costs something."""
        cached = self.usd_per_million_cached_input
        if not any((self.usd_per_million_input, cached, self.usd_per_million_output, self.usd_per_request)):
            return None
        return Tariff(
            input=self.usd_per_million_input / 1e6,
            cached=(self.usd_per_million_input if cached is None else cached) / 1e6,
            output=self.usd_per_million_output / 1e6,
            request=self.usd_per_request,
        )


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The link from routers to a class's devices."""

    delay: Seconds = 0.0
    """Seconds that a message takes. Example: 0.03"""
    bytes_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Bytes a second that the link carries; not given: what is measured of a line to another fleet, else 1 GB/s.
    Example: 10000000"""
    egress_usd_per_gib: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """US dollars for each GiB that is sent to the devices. Example: 0.09"""


class Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many devices a class may have: the basis of `GET /v1/scaling/{class}`."""

    minimum: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Devices that stay on."""
    maximum: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Most devices; not given: no bound. Example: 8"""
    spare: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Devices beyond those that the load needs, within `maximum`."""
    start: Seconds = 30.0
    """Seconds that a device takes until it serves."""


class Notice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a machine receives its reclaim notice."""

    file: str | None = None
    """A file that appears, which may name the seconds until the machine is gone. Example: /run/reclaim"""
    grace: Seconds = 25.0
    """Seconds from the notice until the machine is gone, where the file does not name them."""


class HardwareClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kind of device with a queue of its own."""

    # What it is
    device: DeviceKind
    """The kind of device of its workers, or `endpoint`: a server that runs models."""
    endpoint: Endpoint | None = None
    """The server, of a class of endpoints: its protocol is the class's only one of `runtimes`, its slots are
    `max_batch`, and batches do not wait to form."""
    runtimes: Annotated[tuple[RuntimeName, ...], msgspec.Meta(min_length=1)] = ()
    """Runtimes that may serve it; required, and given for devices only. Example: [onnx, torch]"""
    concurrency: Positive | Literal["per-core"] = 1
    """Worker processes on each machine: a number, or `per-core`."""
    memory: Size | None = None
    """Bytes of one device's memory; not given: what workers find. Example: 24GiB"""
    labels: tuple[str, ...] = ()
    """Where it is: a request runs only on classes that have every label of its `locality`. Example: [edge]"""
    warm: tuple[str, ...] = ()
    """Models that a worker loads before it takes work. Example: [sentiment]"""
    available: Hours | None = None
    """When its machines serve; not given: always. Its workers drain in time, and wait until the next day's hours; work
    that only it can run waits as well. Example: {hours: "22:00-07:00", zone: Europe/Berlin}"""
    link: Link = Link()
    """The link from the routers to its devices."""

    # What it costs, and how many there are
    price: Price = Price()
    """What one device costs; another fleet says its prices itself."""
    capacity: Literal["on-demand", "spot"] = "on-demand"
    """`spot` capacity costs the spot price, may be reclaimed, and takes only services that are preemptible."""
    reclaims_per_hour: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How often a device of spot capacity is reclaimed, an hour. Example: 0.05"""
    notice: Notice = Notice()
    """How a machine receives its reclaim notice."""
    scaling: Scaling = Scaling()
    """How many devices it may have."""

    # Batches and queues
    max_batch: Positive = 0
    """Rows of the largest batch; required, and given for devices only. Example: 16"""
    max_wait: Seconds = -1.0
    """Longest that a batch forms, in seconds; required, and given for devices only. Example: 0.005"""
    max_run: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Longest that a batch of several rows runs, in seconds by its profile, so that urgent jobs do not wait behind it;
    not given: a quarter of the tightest deadline of the services that it may serve. Example: 0.5"""
    horizon: Seconds = 10.0
    """Seconds of work that are bound to its queue; further work waits in holding."""
    target: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    """Utilisation, above 0 to 1, above which its time costs more."""
    reserve_for: str | None = None
    """The service that it is kept for: other work goes there only while less than a quarter of `horizon` is queued, or
    if no other class can run it. Example: live"""
    max_depth: Positive | None = None
    """Jobs that may wait or run in it; others are refused. Example: 10000"""
    payload: Size | None = None
    """Bytes of a job that it takes. Example: 1MiB"""
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    """How much less urgently than other processes a worker on CPUs runs work that is due in more than ten minutes or
    never, and an engine that is started there runs: 0 to 19, as Linux counts."""

    @property
    def is_peer(self) -> bool:
        """Whether it is another fleet."""
        return self.endpoint is not None and self.endpoint.is_peer

    @property
    def runs_at_most(self) -> float:
        """Maximum seconds of a batch of several rows; infinite if unbounded."""
        return math.inf if self.max_run is None else self.max_run

    @property
    def dollars_per_hour(self) -> float:
        """The price of one device of the class, on-demand or spot, where the device tells none of its own."""
        spot = self.price.spot_usd_per_hour if self.capacity == "spot" else None
        return spot or self.price.usd_per_hour


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Service terms under one name. A request may replace each of them by its own."""

    deadline: Annotated[float, msgspec.Meta(gt=0, le=LONGEST_DEADLINE)] | None = None
    """Seconds from acceptance within which the answer is due; none: never late. Example: 0.25"""
    priority: Priority = "normal"
    """The level at which its requests wait: higher levels are served first. Example: high"""
    preemptible: bool = False
    """Whether its requests may run on spot capacity, and be interrupted: those that are running yield to more urgent
    ones and go on later."""
    tier: Tier | None = None
    """The `service_tier` of OpenAI's API that selects it; each tier belongs to one service. Example: flex"""


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rules for one tenant's requests; a field that is not given is no rule."""

    classes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    """The only hardware classes that its requests may run on. Example: [cpu.batch, tpu.bulk]"""
    locality: LocalityText | None = None
    """Labels that every device on its requests' way must have, besides those that a request names. Example: ward"""
    usd_per_day: Dollars | None = None
    """Most US dollars that its jobs may cost between midnight and midnight UTC; above it, requests are refused.
    Example: 25"""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Its share of device time while work is held: weight 3 gets three times as much as weight 1."""
    requests_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Requests a second that its keys may send to one router, in place of `limits.requests_per_second`. Example: 50"""
    bodies: Size | None = None
    """Bytes of its unanswered requests' bodies in one router, in place of `limits.bodies`. Example: 64MiB"""
    payload: Size | None = None
    """Bytes of one of its requests, where that is less than `limits.payload`. Example: 1MiB"""
    max_depth: Positive | None = None
    """Its jobs that have not ended, over all routers; further ones are refused. Example: 1000"""


_NO_RULES = Tenant()


class Rebalance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How waiting work may move between classes."""

    tick: Annotated[float, msgspec.Meta(ge=0.05)] = 0.5
    """Seconds between two looks at the queues."""
    max_moves_per_job: Annotated[int, msgspec.Meta(ge=0)] = 2
    """Moves of one job while its class has a device, and cuts after which a running one yields no more; 0: nothing
    moves or yields."""
    max_share_per_tick: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    """Share of a class's waiting jobs, 0 to 1, that may leave it in a tick; more may, where the new class would be idle
    within two ticks."""
    min_gain: Annotated[float, msgspec.Meta(ge=0)] = 0.25
    """Share of the time to its answer, 0 to 1, that a move must gain to balance queues."""
    move_cost: Seconds = 0.005
    """Seconds that a move costs; a move to balance queues must gain twice as many."""
    still: Annotated[int, msgspec.Meta(ge=0)] = 3
    """Ticks for which no job moves back along a move."""
    window: Positive = 2000
    """Waiting jobs that one tick examines."""
    retarget: Seconds | None = 2.0
    """Seconds of idleness after which a device serves a class that has work and no device, and of no more work there
    until it returns; null: never."""


LATE_USD_PER_HOUR = (48.0, 24.0, 12.0)
"""US dollars an hour that it costs when all of a service's requests are late: the most urgent service first.

The last figure counts for all others. Source: lab/trials."""


class Planning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tuner, which plans the class that each model and service prefers, from the arrivals of the last minutes."""

    enabled: bool = True
    """Whether tuners tune."""
    period: Annotated[float, msgspec.Meta(ge=10)] = 120.0
    """Seconds between two tunings."""
    late_usd_per_hour: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = {}
    """US dollars an hour that it costs when all of a service's requests are late, by service; else 48 for the most
    urgent service, then 24 and 12. Example: {live: 60}"""


class Webhooks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How events are delivered to webhook endpoints, and where they may go."""

    timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 10.0
    """Seconds that one attempt may take."""
    retry: Annotated[float, msgspec.Meta(gt=0)] = 86400.0
    """Seconds for which an event is tried again; then it is a dead letter."""
    pause: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """Seconds before the first retry; each further pause is twice as long."""
    longest_pause: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    """Most seconds between two attempts."""
    waiting: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 10_000
    """Events that may wait for one endpoint."""
    dead: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    """Dead letters that are kept for one endpoint, the latest."""
    endpoints: Positive = 20
    """Endpoints of one tenant."""
    overlap: Seconds = 86400.0
    """Seconds after a rotation for which events are signed with the old secret, too."""
    http: bool = False
    """Whether addresses may begin with `http://`."""
    networks: tuple[str, ...] = ()
    """Private networks that events may go to, in CIDR notation. Example: [10.20.0.0/16]"""


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of queues.yaml."""

    site: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "site"
    """What this fleet is called among others. Example: edge"""
    hardware: Annotated[dict[ClassName, HardwareClass], msgspec.Meta(min_length=1)]
    """Hardware classes by name. Example: {cpu.batch: {device: cpu, runtimes: [onnx], max_batch: 16, max_wait: 0.005,
    price: {usd_per_hour: 0.05}}}"""
    service: Annotated[dict[str, Service], msgspec.Meta(min_length=1)]
    """Service terms by the name that producers use. Example: {live: {deadline: 0.25, priority: high}}"""
    default_service: str
    """The service of requests that name none. Example: standard"""
    tenants: dict[TenantName, Tenant] = {}
    """Rules by tenant; a tenant that is not listed has none. Example: {lab: {classes: [cpu.batch], usd_per_day: 25}}"""
    locality: Locality = Locality()
    """Where requests may go that say nothing of it."""
    limits: Limits = msgspec.field(default_factory=Limits)
    """Limits of requests, of what is stored, of workers and of HTTP."""
    rebalance: Rebalance = Rebalance()
    """How waiting work moves between classes."""
    plan: Planning = Planning()
    """The tuner."""
    webhooks: Webhooks = Webhooks()
    """How events are delivered."""

    def rules_of(self, tenant: str) -> Tenant:
        """The rules for a tenant; a tenant that is not listed has none."""
        return self.tenants.get(tenant, _NO_RULES)


def parse_topology(text: str, file: str = "queues.yaml") -> Topology:
    """The topology that the YAML `text` describes.

    Raises:
        TopologyError: names `file`, the path inside it, the expectation and the value.
    """
    topology = parse_document(text, Topology, file=file, error=TopologyError)
    for path, expected, value in _contradictions(topology):
        raise TopologyError(file, path, expected, value)
    hardware = {
        name: msgspec.structs.replace(_completed(one), max_run=longest_run(one, topology.service))
        for name, one in topology.hardware.items()
    }
    return msgspec.structs.replace(topology, hardware=hardware)


def _completed(hardware: HardwareClass) -> HardwareClass:
    """The class with the fields that follow from its endpoint, if it has one, and the label of what is here."""
    endpoint = hardware.endpoint
    if endpoint is None or not endpoint.is_peer:
        hardware = msgspec.structs.replace(hardware, labels=tuple(dict.fromkeys((*hardware.labels, HOME))))
    if endpoint is None:
        return hardware
    runtimes: tuple[str, ...] = (endpoint.protocol,)
    return msgspec.structs.replace(hardware, runtimes=runtimes, max_batch=endpoint.slots, max_wait=0.0)


def longest_run(hardware: HardwareClass, services: Mapping[str, Service]) -> float | None:
    """The class's `max_run`: its own, else `RUN_SHARE` of the tightest deadline of the services that it may serve.

    None if none of these has a deadline. Spot capacity serves only preemptible services.
    """
    if hardware.max_run is not None:
        return hardware.max_run
    served = [one for one in services.values() if hardware.capacity != "spot" or one.preemptible]
    tightest = min((one.deadline for one in served if one.deadline is not None), default=None)
    return None if tightest is None else RUN_SHARE * tightest


def load_topology(path: Path) -> Topology:
    """Read `path`. Raises as `read_topology` does."""
    return read_topology(path)[0]


def read_topology(path: Path) -> tuple[Topology, str]:
    """What `path` defines, and its text.

    Raises:
        TopologyError: the file is missing or invalid.
    """
    text = read_document(path, file=str(path), error=TopologyError)
    return parse_topology(text, str(path)), text


def schema() -> dict[str, Any]:
    """The JSON Schema of queues.yaml."""
    described = json_schema(Topology)
    hardware = described["$defs"][HardwareClass.__name__]
    for name in _OF_DEVICES:
        del hardware["properties"][name]["default"]
    hardware["if"] = {"properties": {"device": {"const": "endpoint", "description": "A server that runs models."}}}
    hardware["then"] = {"required": ["endpoint"], "properties": dict.fromkeys(_OF_DEVICES, False)}
    by_the_hour = {"required": ["usd_per_hour"], "properties": dict.fromkeys(_PRICES_OF_USE, False)}
    powered = {**by_the_hour, "description": "What one device costs while it is on."}
    hardware["else"] = {"required": list(_OF_DEVICES), "properties": {"endpoint": False, "price": powered}}
    return described


_OF_DEVICES = ("runtimes", "max_batch", "max_wait")
"""Fields that are required for, and limited to, classes without an endpoint."""

_PRICES_OF_USE = ("usd_per_million_input", "usd_per_million_output", "usd_per_million_cached_input", "usd_per_request")
"""Prices that only endpoints have."""

_NOT_GIVEN: Mapping[str, object] = {"runtimes": (), "max_batch": 0, "max_wait": -1.0}


def _contradictions(topology: Topology) -> Contradictions:
    """Contradictions between fields: path, expectation and value of each."""
    services = f"one of {sorted(topology.service)}"
    if topology.default_service not in topology.service:
        yield "default_service", services, topology.default_service
    for name, hardware in topology.hardware.items():
        if hardware.reserve_for is not None and hardware.reserve_for not in topology.service:
            yield f"hardware.{name}.reserve_for", services, hardware.reserve_for
        if name == ARRIVALS:
            yield f"hardware.{name}", "a name that is not the arrivals queue's", name
        for place, expected, value in _class_contradictions(hardware):
            yield f"hardware.{name}.{place}", expected, value
    yield from _unknown_names(topology)
    yield from _labels_of_no_class(topology)
    yield from _tiers_of_several(topology)
    limits = topology.limits
    if limits.keep_record < limits.keep_result:
        yield "limits.keep_record", f"at least keep_result ({limits.keep_result})", limits.keep_record
    yield from _limits_below_what_they_hold(topology)
    yield from _malformed_networks(topology.webhooks)


def _class_contradictions(hardware: HardwareClass) -> Contradictions:
    most, least = hardware.scaling.maximum, hardware.scaling.minimum
    if most is not None and most < least:
        yield "scaling.maximum", f"at least minimum ({least})", most
    if hardware.available is not None and (wrong := flaw(hardware.available)) is not None:
        yield f"available.{wrong[0]}", *wrong[1:]
    yield from _device_contradictions(hardware)
    protocol = None if hardware.endpoint is None else hardware.endpoint.protocol
    yield from price_contradictions(hardware.price, protocol)


def _device_contradictions(hardware: HardwareClass) -> Contradictions:
    """Fields that a class with or without an endpoint must not have, or lacks."""
    given = [name for name in _OF_DEVICES if getattr(hardware, name) != _NOT_GIVEN[name]]
    if hardware.device != "endpoint":
        for name in _OF_DEVICES:
            if name not in given:
                yield name, "a value", Verbatim("nothing")
        if hardware.endpoint is not None:
            yield "device", "endpoint, as the class has one", hardware.device
        return
    if hardware.endpoint is None:
        yield "endpoint", "a value, as device is endpoint", Verbatim("nothing")
        return
    for name in given:
        yield name, "nothing, as it follows from the endpoint", getattr(hardware, name)
    for place, expected, value in endpoint_contradictions(hardware.endpoint):
        yield f"endpoint.{place}", expected, value


def price_contradictions(price: Price, protocol: str | None) -> Contradictions:
    """Prices that a class whose endpoint speaks a protocol, or that has none, must not have, or lacks."""
    if protocol == "taxiway":
        dollars = {name: figure for name, figure in msgspec.structs.asdict(price).items() if figure}
        yield from ((f"price.{name}", "nothing, as the other fleet says its prices", dollars[name]) for name in dollars)
        return
    used = [name for name in _PRICES_OF_USE if getattr(price, name)]
    if price.usd_per_hour == 0 and (protocol is None or not used):
        others = "" if protocol is None else ", or another price, as somebody pays for the endpoint"
        yield "price.usd_per_hour", f"a number > 0{others}", price.usd_per_hour
    if protocol is None:
        for name in used:
            yield f"price.{name}", "nothing, as only an endpoint has such prices", getattr(price, name)
    elif protocol != "openai":
        for name in [one for one in used if one != "usd_per_request"]:
            yield f"price.{name}", f"nothing, as {protocol} counts no tokens", getattr(price, name)


def _limits_below_what_they_hold(topology: Topology) -> Contradictions:
    """Limits below the largest allowed body or file, which could then never be sent."""
    limits = topology.limits
    least = f"at least payload ({limits.payload})"
    if limits.files < limits.file:
        yield "limits.files", f"at least file ({limits.file})", limits.files
    for place, most in [("limits.bodies", limits.bodies), ("limits.all_bodies", limits.all_bodies)]:
        if most < limits.payload:
            yield place, least, most
    for name, tenant in topology.tenants.items():
        if tenant.bodies is not None and tenant.bodies < min(limits.payload, tenant.payload or limits.payload):
            yield f"tenants.{name}.bodies", least, tenant.bodies


def _malformed_networks(webhooks: Webhooks) -> Contradictions:
    for place, network in enumerate(webhooks.networks):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            yield f"webhooks.networks.{place}", "a network such as 10.0.0.0/8", network


def _labels_of_no_class(topology: Topology) -> Contradictions:
    """Labels of the fleet and of tenants that no class has together, and labels that could not be joined."""
    for name, hardware in topology.hardware.items():
        for place, label in enumerate(hardware.labels):
            if JOINT in label or not label:
                yield f"hardware.{name}.labels.{place}", f"text without {JOINT}", label
            if label == HOME and hardware.endpoint is not None and hardware.endpoint.is_peer:
                yield f"hardware.{name}.labels.{place}", "another label, as another fleet is not here", label
    given = {f"tenants.{name}.locality": (own.locality, own.classes) for name, own in topology.tenants.items()}
    for where, (locality, classes) in {"locality.default": (topology.locality.default, None), **given}.items():
        able = (one for name, one in topology.hardware.items() if classes is None or name in classes)
        if locality is not None and all(missing(locality, (*hardware.labels, HOME)) for hardware in able):
            yield where, f"labels that one {'class' if classes is None else 'of its classes'} has", locality
    labels = {label for hardware in topology.hardware.values() for label in hardware.labels}
    yield from sealing_contradictions(topology.locality, sorted(labels - {HOME}))


def _tiers_of_several(topology: Topology) -> Contradictions:
    tiers = [service.tier for service in topology.service.values() if service.tier is not None]
    for name, service in topology.service.items():
        if service.tier is not None and tiers.count(service.tier) > 1:
            yield f"service.{name}.tier", "a tier that no other service has", service.tier


def _unknown_names(topology: Topology) -> Contradictions:
    for name in sorted(topology.plan.late_usd_per_hour.keys() - topology.service.keys()):
        yield "plan.late_usd_per_hour", f"one of {sorted(topology.service)}", name
    for name, tenant in topology.tenants.items():
        for place, allowed in enumerate(tenant.classes or ()):
            if allowed not in topology.hardware:
                yield f"tenants.{name}.classes.{place}", f"one of {sorted(topology.hardware)}", allowed
