"""queues.yaml: hardware classes with their queues and prices, services, tenants and limits.

Parsed once into frozen values.
Only this module knows the file's shape, with `endpoints` for servers that run models. `schema()` is its JSON Schema,
kept in `queues.schema.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tasks.document import DocumentError, RuntimeName, Size, Verbatim, json_schema, parse_document
from tasks.endpoints import Endpoint
from tasks.endpoints import contradictions as endpoint_contradictions
from taxiway.contract.blobs import INLINE
from taxiway.contract.bounds import ELEMENTS
from taxiway.contract.durability import Durability
from taxiway.contract.keys import ARRIVALS
from taxiway.contract.request import MAX_NAME, Priority

DeviceKind = Literal["cpu", "cuda", "tpu", "endpoint"]
ClassName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)*$", max_length=64)]
TenantName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Dollars = Annotated[float, msgspec.Meta(gt=0)]


RUN_SHARE = 0.25
"""Fraction of the tightest deadline that a batch may take: a job that arrives at its start keeps most of its time."""


RUN_STRETCH = 1.25
"""Maximum time of a batch as a multiple of its first row alone, if that row already exceeds `max_run`.

Cost shared by all rows (reading the weights once) is then paid once; a second row that costs as much as the first
waits.
"""


class TopologyError(DocumentError):
    """queues.yaml is invalid: names the file, the path inside it, what was expected and what was found."""


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one device of a class costs."""

    usd_per_hour: Dollars
    spot_usd_per_hour: Dollars | None = None


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

    `concurrency` is worker processes on one machine; `max_wait` is the longest that a batch forms, and `horizon` the
    most work that is bound to the queue, both in seconds; `warm` names models that a worker loads before it consumes.
    A batch holds no more rows than take `max_run` seconds, unless one alone takes longer: who is due soon does not wait
    behind it for more. Where it is not given, `longest_run` says it.
    A class of `spot` capacity takes only work that may be interrupted; `reclaims_per_hour` is how often a device goes.
    `notice` tells of that beforehand. `target` is the utilisation above which its time is made dearer, 0 to 1.
    At most `max_depth` jobs wait for it or run there, each of up to `payload` bytes: what is over it is refused.
    An `endpoint` is a server that runs models. Its protocol is the only one of the class's `runtimes`, its slots are
    `max_batch`, and no batch waits to form: these three fields are for other devices, which must have them.
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
    def dollars_per_second(self) -> float:
        """The price of one device of the class per second, on-demand or spot."""
        spot = self.price.spot_usd_per_hour if self.capacity == "spot" else None
        return (spot or self.price.usd_per_hour) / 3600


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Service terms under one name."""

    deadline: Annotated[float, msgspec.Meta(gt=0)] | None = None
    priority: Priority = "normal"
    preemptible: bool = False


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
    """Every bound that an operator can set; sizes in bytes, times in seconds.

    `payload` bounds one request, `elements` the values in its JSON and the elements of a BYTES tensor, and a value of
    more than `inline` bytes travels beside its message; `keep_result` and `keep_record` are how long a result and what
    is known of its job stay, and `keep_explanation` what placements are worked out again from; `lease` is how long a
    worker may be silent before its jobs run elsewhere; one that is told to stop is gone within `grace`, and one whose
    batch takes `stall` and twenty times what its profile says ends itself; `wait` bounds one long poll. A job is given
    up after `attempts` runs that ended without an answer. A worker leaves that had no memory for `memory_faults` jobs
    in a row of a model, nor for the model's example. What the HTTP door takes is accepted once it is `written`, or
    `replicated` (`durability`); it takes nothing above the share `memory` of what the state store may hold.

    Of a router's HTTP door: it holds so many `connections`; a tenant's keys may make `requests_per_second`; a client
    has `head` seconds to send what stands before a request's body, and sends or reads a MiB, or all, in `body`. Of the
    requests that are not answered yet, `bodies` bounds the bytes of one tenant's bodies, `all_bodies` of everybody's.
    """

    payload: Size = msgspec.field(default_factory=lambda: Size(16 * 2**20))  # a schema cannot show a `Size`
    elements: Positive = ELEMENTS
    inline: Size = msgspec.field(default_factory=lambda: Size(INLINE))
    keep_result: Annotated[int, msgspec.Meta(ge=1)] = 3600
    keep_record: Annotated[int, msgspec.Meta(ge=1)] = 86400
    keep_explanation: Annotated[int, msgspec.Meta(ge=1)] = 3600
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

    Every `tick` seconds at most `max_share_per_tick` of a class's waiting jobs leave it, or what keeps their new class
    busy for two ticks; each job at most `max_moves_per_job` times, and none goes back the way of the last `still`
    ticks. A move to level queues must gain `min_gain` of the time to the answer, and twice `move_cost` seconds.
    `window` is the jobs that a tick looks at in all. A device is lent to another class where that starves,
    and it idles, for `retarget` seconds, and is back as long after the last work there; None lends none.
    """

    tick: Annotated[float, msgspec.Meta(ge=0.05)] = 0.5
    max_moves_per_job: Annotated[int, msgspec.Meta(ge=0)] = 2
    max_share_per_tick: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    min_gain: Annotated[float, msgspec.Meta(ge=0)] = 0.25
    move_cost: Seconds = 0.005
    still: Annotated[int, msgspec.Meta(ge=0)] = 3
    window: Positive = 2000
    retarget: Seconds | None = 2.0


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of queues.yaml."""

    hardware: Annotated[dict[ClassName, HardwareClass], msgspec.Meta(min_length=1)]
    service: Annotated[dict[str, Service], msgspec.Meta(min_length=1)]
    default_service: str
    tenants: dict[TenantName, Tenant] = {}
    limits: Limits = msgspec.field(default_factory=Limits)
    rebalance: Rebalance = Rebalance()


def parse_topology(text: str, file: str = "queues.yaml") -> Topology:
    """The topology that the YAML `text` describes.

    Raises:
        TopologyError: naming `file`, the path inside it, what was expected and what came.
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
    """The class with what follows from its endpoint, if it has one."""
    endpoint = hardware.endpoint
    if endpoint is None:
        return hardware
    runtimes: tuple[str, ...] = (endpoint.protocol,)
    return msgspec.structs.replace(hardware, runtimes=runtimes, max_batch=endpoint.slots, max_wait=0.0)


def longest_run(hardware: HardwareClass, services: Mapping[str, Service]) -> float | None:
    """The class's `max_run`: its own, else `RUN_SHARE` of the tightest deadline among the services that it may serve.

    None where none of these has a deadline. Spot capacity serves only what may be interrupted.
    """
    if hardware.max_run is not None:
        return hardware.max_run
    served = [one for one in services.values() if hardware.capacity != "spot" or one.preemptible]
    tightest = min((one.deadline for one in served if one.deadline is not None), default=None)
    return None if tightest is None else RUN_SHARE * tightest


def load_topology(path: Path) -> Topology:
    """Read `path`.

    Raises:
        TopologyError: the file is missing or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(str(path), "", "a readable file of UTF-8 text", Verbatim(error)) from error
    return parse_topology(text, str(path))


def schema() -> dict[str, Any]:
    """The JSON Schema of queues.yaml."""
    described = json_schema(Topology)
    hardware = described["$defs"][HardwareClass.__name__]
    for name in _OF_DEVICES:
        del hardware["properties"][name]["default"]
    hardware["if"] = {"properties": {"device": {"const": "endpoint"}}}
    hardware["then"] = {"required": ["endpoint"], "properties": dict.fromkeys(_OF_DEVICES, False)}
    hardware["else"] = {"required": list(_OF_DEVICES), "properties": {"endpoint": False}}
    return described


_OF_DEVICES = ("runtimes", "max_batch", "max_wait")
"""Fields that a class has if it is none of endpoints, and must have then."""

_NOT_GIVEN: Mapping[str, object] = {"runtimes": (), "max_batch": 0, "max_wait": -1.0}


def _contradictions(topology: Topology) -> Iterator[tuple[str, str, object]]:
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
    yield from _unknown_classes(topology)
    limits = topology.limits
    if limits.keep_record < limits.keep_result:
        yield "limits.keep_record", f"at least keep_result ({limits.keep_result})", limits.keep_record
    yield from _too_small_for_a_body(topology)


def _class_contradictions(hardware: HardwareClass) -> Iterator[tuple[str, str, object]]:
    most, least = hardware.scaling.maximum, hardware.scaling.minimum
    if most is not None and most < least:
        yield "scaling.maximum", f"at least minimum ({least})", most
    if not _is_pattern(hardware.notice.says):
        yield "notice.says", "a regular expression", hardware.notice.says
    yield from _device_contradictions(hardware)


def _device_contradictions(hardware: HardwareClass) -> Iterator[tuple[str, str, object]]:
    """What a class of endpoints, or one of other devices, has too much or too little."""
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


def _too_small_for_a_body(topology: Topology) -> Iterator[tuple[str, str, object]]:
    """Bounds of all bodies under which the largest body could never be sent."""
    limits = topology.limits
    least = f"at least payload ({limits.payload})"
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


def _unknown_classes(topology: Topology) -> Iterator[tuple[str, str, object]]:
    for name, tenant in topology.tenants.items():
        for place, allowed in enumerate(tenant.classes or ()):
            if allowed not in topology.hardware:
                yield f"tenants.{name}.classes.{place}", f"one of {sorted(topology.hardware)}", allowed
