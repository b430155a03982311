"""queues.yaml: hardware classes with their queues and prices, services, tenants and limits.

Only this module and `endpoints` (servers that run models) know the file's shape. It is parsed once, into frozen values.
`schema()` is its JSON Schema, kept in `queues.schema.json`.
"""

from __future__ import annotations

import ipaddress
import math
import re
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
from tasks.endpoints import Endpoint, Tariff
from tasks.endpoints import contradictions as endpoint_contradictions
from taxiway.contract.keys import ARRIVALS
from taxiway.contract.limits import ELEMENTS
from taxiway.contract.request import LONGEST_DEADLINE, MAX_NAME, Priority
from taxiway.contract.values import INLINE
from taxiway.contract.wire import Durability

DeviceKind = Literal["cpu", "cuda", "tpu", "endpoint"]
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
    """What one device of a class costs while it is on, and what the use of an endpoint costs besides or instead.

    `usd_per_hour` is required unless the class is an endpoint with another price. Input that the endpoint had cached
    costs as much as other input where `usd_per_million_cached_input` is not given.
    """

    usd_per_hour: NoLess = 0.0
    spot_usd_per_hour: Dollars | None = None
    usd_per_million_input: NoLess = 0.0
    usd_per_million_output: NoLess = 0.0
    usd_per_million_cached_input: NoLess | None = None
    usd_per_request: NoLess = 0.0

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
    """The link from routers to a class's devices: seconds per message, bytes per second, price per GiB."""

    delay: Seconds = 0.0
    bytes_per_second: Annotated[float, msgspec.Meta(gt=0)] = 1e9
    egress_usd_per_gib: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of a class's device count, including `spare` ones; None: unbounded. A device starts in `start` s."""

    minimum: Annotated[int, msgspec.Meta(ge=0)] = 0
    maximum: Annotated[int, msgspec.Meta(ge=0)] | None = None
    spare: Annotated[int, msgspec.Meta(ge=0)] = 0
    start: Seconds = 30.0


class Notice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a machine receives its reclaim notice: a `file` that appears, or a `url` that is polled every second.

    The text is a notice if it matches the regular expression `says`, by default any text. The group `at` gives the time
    at which the machine is gone, in ISO 8601, the group `seconds` the seconds until then; without either it is `grace`
    seconds. `token_url` returns a token for the requests (AWS IMDSv2).
    """

    file: str | None = None
    url: Annotated[str, msgspec.Meta(pattern="^https?://")] | None = None
    headers: dict[str, str] = {}
    token_url: Annotated[str, msgspec.Meta(pattern="^https?://")] | None = None
    says: str = r"^\s*(?P<seconds>\d+(\.\d+)?)?"
    grace: Seconds = 25.0


class HardwareClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kind of device with a queue of its own.

    `concurrency` is worker processes per machine. `max_wait` is the longest time that a batch forms, and `horizon` the
    most work bound to the queue, both in seconds. `warm` names models that a worker loads before it consumes.
    A batch holds no more rows than run in `max_run` seconds, unless one row takes longer, so urgent jobs do not wait
    behind it. The default is `longest_run`.
    A class of `spot` capacity takes only preemptible work; `reclaims_per_hour` is how often a device is reclaimed, and
    `notice` how that is announced. `target` is the utilisation above which its time costs more, 0 to 1.
    At most `max_depth` jobs wait or run in the class, each of up to `payload` bytes; others are refused.
    Workers on CPUs run work that is due in more than ten minutes, or has no deadline, `nice` less urgently than other
    processes of their machine (0 to 19, as Linux counts; 0: as urgently). An engine that is started there is as `nice`.
    An `endpoint` is a server that runs models. Its protocol is the class's only one of `runtimes`, its slots are
    `max_batch`, and batches do not wait to form. These three fields are required for, and limited to, other devices.
    """

    device: DeviceKind
    endpoint: Endpoint | None = None
    runtimes: Annotated[tuple[RuntimeName, ...], msgspec.Meta(min_length=1)] = ()
    concurrency: Positive | Literal["per-core"] = 1
    max_batch: Positive = 0
    max_wait: Seconds = -1.0
    max_run: Annotated[float, msgspec.Meta(gt=0)] | None = None
    horizon: Seconds = 10.0
    price: Price
    capacity: Literal["on-demand", "spot"] = "on-demand"
    reclaims_per_hour: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    notice: Notice = Notice()
    target: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    link: Link = Link()
    memory: Size | None = None
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    payload: Size | None = None
    max_depth: Positive | None = None
    reserve_for: str | None = None
    labels: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    scaling: Scaling = Scaling()

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
    """Service terms under one name. `tier` is the `service_tier` of OpenAI's API that selects it."""

    deadline: Annotated[float, msgspec.Meta(gt=0, le=LONGEST_DEADLINE)] | None = None
    priority: Priority = "normal"
    preemptible: bool = False
    tier: Tier | None = None


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rules for one tenant's requests: the classes they may run on, and US dollars per day. None means no rule.

    A tenant gets device time from holding in proportion to its `weight`. `requests_per_second` (per router) and
    `bodies` (bytes of request bodies in memory there) override the limits of the same names. A tenant may have
    `max_depth` unfinished jobs, each of up to `payload` bytes.
    """

    classes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    usd_per_day: Dollars | None = None
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    requests_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    bodies: Size | None = None
    payload: Size | None = None
    max_depth: Positive | None = None


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits that an operator can set; sizes in bytes, times in seconds.

    `payload` bounds one request, `elements` the values in its JSON and the elements of a BYTES tensor, `file` one
    uploaded file, and `files` a tenant's files together. Of a tenant's stored `responses` the latest are kept, each for
    `keep_response` after its last use. A tenant may have `batches` that have not ended; the others are kept for
    `keep_batch`. `objects` are the bytes of the state store that its responses may take, and as many its batches and
    the records of its files.
    A compressed body over 1 MiB may have `inflation` times its compressed size. A value of more than
    `inline` bytes is stored beside its message. `keep_result`, `keep_record` and `keep_explanation` are how long a
    result, its job's record and the snapshots of placements are kept. The history of arrivals is kept for
    `keep_history`, in at most `history` bytes of the state store. After `lease` seconds of silence a worker's jobs run
    elsewhere. A worker exits within `grace` of a stop signal, and kills itself when a batch takes both `stall` seconds
    and twenty times its profile. `wait` bounds one long poll. A job is dead-lettered after `attempts` runs without a
    result. A worker exits after `memory_faults` consecutive out-of-memory jobs of a model whose example fails, too. The
    HTTP door acknowledges a job once it is `written` or `replicated` (`durability`), and accepts none while the state
    store uses more than the share `memory` of its limit.

    Limits of a router's HTTP door: the number of `connections`; `requests_per_second` of a tenant's keys; `head`
    seconds for a request's head, and `body` seconds to send or read a MiB or the rest; bytes of unanswered requests'
    bodies, per tenant (`bodies`) and in total (`all_bodies`).
    """

    payload: Size = msgspec.field(default_factory=lambda: Size(16 * 2**20))  # a schema cannot show a `Size`
    file: Size = msgspec.field(default_factory=lambda: Size(200 * 2**20))
    files: Size = msgspec.field(default_factory=lambda: Size(10 * 2**30))
    objects: Size = msgspec.field(default_factory=lambda: Size(64 * 2**20))
    elements: Positive = ELEMENTS
    inflation: Positive = 100
    inline: Size = msgspec.field(default_factory=lambda: Size(INLINE))
    keep_result: Annotated[int, msgspec.Meta(ge=1)] = 3600
    keep_record: Annotated[int, msgspec.Meta(ge=1)] = 86400
    keep_explanation: Annotated[int, msgspec.Meta(ge=1)] = 3600
    keep_response: Annotated[int, msgspec.Meta(ge=1)] = 7 * 86400
    responses: Positive = 10_000
    keep_batch: Annotated[int, msgspec.Meta(ge=1)] = 30 * 86400
    batches: Positive = 100
    keep_history: Annotated[int, msgspec.Meta(ge=3600)] = 14 * 86400
    history: Size = msgspec.field(default_factory=lambda: Size(128 * 2**20))
    lease: Annotated[float, msgspec.Meta(ge=1)] = 15.0
    grace: Seconds = 60.0
    stall: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    wait: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    attempts: Positive = 3
    memory_faults: Positive = 3
    durability: Durability = "written"
    memory: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    connections: Positive = 4096
    requests_per_second: Annotated[float, msgspec.Meta(gt=0)] = 1000.0
    head: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    body: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    bodies: Size = msgspec.field(default_factory=lambda: Size(256 * 2**20))
    all_bodies: Size = msgspec.field(default_factory=lambda: Size(2**30))


class Rebalance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How waiting work may move between classes.

    Per `tick` seconds at most `max_share_per_tick` of a class's waiting jobs leave it, or as many as keep their new
    class busy for two ticks. A job moves at most `max_moves_per_job` times, and not back along a move of the last
    `still` ticks. A balancing move must gain `min_gain` of the time to the answer, and twice `move_cost` seconds.
    `window` is the number of jobs that a tick examines. A device that idled for `retarget` seconds while another class
    had work and no device serves that class, until `retarget` seconds after its last work there; None disables this.
    """

    tick: Annotated[float, msgspec.Meta(ge=0.05)] = 0.5
    max_moves_per_job: Annotated[int, msgspec.Meta(ge=0)] = 2
    max_share_per_tick: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    min_gain: Annotated[float, msgspec.Meta(ge=0)] = 0.25
    move_cost: Seconds = 0.005
    still: Annotated[int, msgspec.Meta(ge=0)] = 3
    window: Positive = 2000
    retarget: Seconds | None = 2.0


class Planning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tuner, which plans what class each model and service prefers, from the arrivals of the last minutes.

    It tunes every `period` seconds. `late_usd_per_hour` is what it costs, in US dollars an hour, when all of a
    service's requests are late; where a service is not named, it is 48 for the most urgent, then 24 and 12.
    """

    enabled: bool = True
    period: Annotated[float, msgspec.Meta(ge=10)] = 120.0
    late_usd_per_hour: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = {}


class Webhooks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Webhooks: how events are delivered, and where they may go.

    An attempt takes at most `timeout` seconds. An event is tried again for `retry` seconds, after pauses that double
    from `pause` up to `longest_pause`, then it is a dead letter. Per endpoint up to `waiting` events wait, and `dead`
    dead letters are kept; a tenant has up to `endpoints`. For `overlap` seconds after a rotation, events are signed
    with both secrets. With `http`, addresses may begin with http://. `networks` (CIDR) are the private networks that
    events may go to.
    """

    timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 10.0
    retry: Annotated[float, msgspec.Meta(gt=0)] = 86400.0
    pause: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    longest_pause: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    waiting: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 10_000
    dead: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    endpoints: Positive = 20
    overlap: Seconds = 86400.0
    http: bool = False
    networks: tuple[str, ...] = ()


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of queues.yaml."""

    hardware: Annotated[dict[ClassName, HardwareClass], msgspec.Meta(min_length=1)]
    service: Annotated[dict[str, Service], msgspec.Meta(min_length=1)]
    default_service: str
    tenants: dict[TenantName, Tenant] = {}
    limits: Limits = msgspec.field(default_factory=Limits)
    rebalance: Rebalance = Rebalance()
    plan: Planning = Planning()
    webhooks: Webhooks = Webhooks()


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
    """The class with the fields that follow from its endpoint, if it has one."""
    endpoint = hardware.endpoint
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
    """Read `path`.

    Raises:
        TopologyError: the file is missing or invalid.
    """
    return parse_topology(read_document(path, file=str(path), error=TopologyError), str(path))


def schema() -> dict[str, Any]:
    """The JSON Schema of queues.yaml."""
    described = json_schema(Topology)
    hardware = described["$defs"][HardwareClass.__name__]
    for name in _OF_DEVICES:
        del hardware["properties"][name]["default"]
    hardware["if"] = {"properties": {"device": {"const": "endpoint"}}}
    hardware["then"] = {"required": ["endpoint"], "properties": dict.fromkeys(_OF_DEVICES, False)}
    powered = {"required": ["usd_per_hour"], "properties": dict.fromkeys(_PRICES_OF_USE, False)}
    hardware["else"] = {"required": list(_OF_DEVICES), "properties": {"endpoint": False, "price": powered}}
    return described


_OF_DEVICES = ("runtimes", "max_batch", "max_wait")
"""Fields that are required for, and limited to, classes without an endpoint."""

_PRICES_OF_USE = (
    "usd_per_million_input",
    "usd_per_million_output",
    "usd_per_million_cached_input",
    "usd_per_request",
)
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
    if not _is_pattern(hardware.notice.says):
        yield "notice.says", "a regular expression", hardware.notice.says
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


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _malformed_networks(webhooks: Webhooks) -> Contradictions:
    for place, network in enumerate(webhooks.networks):
        if not _is_network(network):
            yield f"webhooks.networks.{place}", "a network such as 10.0.0.0/8", network


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


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
