"""What a request needs, and which candidates could run it at all. Reads headers only, never the payload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import DeviceFacts, lacking, variant_key
from tasks.models.discovered import discovered_by
from tasks.models.model import Model, Variant
from tasks.queues.endpoints import Endpoint
from tasks.queues.locality import joined, missing
from tasks.topology import HardwareClass, Service, Topology
from taxiway.contract.request import Priority, Terms
from taxiway.contract.wire import key_id
from taxiway.errors import wrong_field

BACKGROUND = 600.0
"""Deadlines longer than this, in seconds, are batch work."""

LATENCY_CRITICAL = 1.0
"""Deadlines up to this, in seconds, are latency-critical: a person is waiting."""

LEAVING = "the site drains, and another one offers to run it"
"""Why a class is refused by `leaving`."""

_PRIORITY_SHIFT: Mapping[Priority, int] = {"high": -1, "normal": 0, "low": 1}


@dataclass(frozen=True, slots=True)
class Constraints:
    """What rules candidates out regardless of load. Requests with equal constraints share a candidate table.

    `classes` are the only hardware classes that the tenant may use; None if it may use all. `asks` is what a chat asks
    for that not every variant honours.
    """

    service: str = ""
    locality: str | None = None
    min_accuracy: float | None = None
    preemptible: bool = False
    classes: tuple[str, ...] | None = None
    asks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a tenant has left of its daily budget: `left` of `usd_per_day` US dollars on `day`.

    It resets in `renewed_in` seconds.
    """

    tenant: str
    day: str
    usd_per_day: float
    left: float
    renewed_in: float


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `tokens` of a prompt, which a device of a class has read before."""

    hardware_class: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Needs:
    """A request's service terms, with defaults from queues.yaml."""

    deadline: float | None
    """Seconds that are left; None without a deadline."""
    level: int
    """The queue's priority level, 0 is the most urgent."""
    rows: int
    size: float
    """Of one row, in the model's unit, the answer included."""
    payload: int = 0
    """Bytes sent to the device."""
    budget: float | None = None
    """US dollars."""
    constraints: Constraints = Constraints()
    allowance: Allowance | None = None
    """What its tenant may still spend; None if that is unbounded."""
    expected_batch: int = 0
    """Jobs of the same kind that left holding together with it."""
    work_limit: float | None = None
    """Seconds of work that may be bound ahead of it, if its tenant is over its fair share."""
    output: int = 0
    """The predicted answer's part of `size`."""
    longest: int = 0
    """The longest answer that it allows, in the same unit."""
    prefix: Prefix | None = None
    """What of the prompt some device has read before."""
    most_read: int = 0
    """The most tokens of a row's prompt, where a budget has to bear them."""

    @property
    def affordable(self) -> float:
        """The most that the request may cost: the lower of its budget and its tenant's remaining allowance."""
        budget = math.inf if self.budget is None else self.budget
        return budget if self.allowance is None else min(budget, self.allowance.left)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A hardware class and a variant that could run a request, with the live devices able to run it.

    `devices` is empty if the class is configured but no live device serves it; `absent` says why.
    """

    hardware_class: str
    hardware: HardwareClass
    variant_name: str
    variant: Variant
    devices: tuple[DeviceFacts, ...]
    absent: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A hardware class and a variant that cannot run a request, and why. `ever` is False if this may change.

    `asked` names what the request asks for that only this variant does not honour.
    """

    hardware_class: str
    variant: str
    reason: str
    ever: bool = True
    asked: tuple[str, ...] = ()


def needs_of(
    terms: Terms,
    topology: Topology,
    *,
    rows: int,
    size: float,
    asks: tuple[str, ...] = (),
    left: float = math.inf,
    locality: str | None = None,
) -> Needs:
    """The request's needs: its own terms, completed from its service, under its tenant's rules.

    Its deadline is at most `left` seconds. `locality` is what its model and its content say of where it may go.

    Raises:
        InvalidRequestError: unknown service, the message lists the known ones; or it has no locality, and the fleet
            requires one.
    """
    name, service = service_of(terms, topology)
    tenant = topology.rules_of(terms.tenant)
    locality = joined(terms.locality, tenant.locality, locality) or topology.locality.default
    if locality is None and topology.locality.required:
        raise wrong_field("locality", "a label, as this fleet refuses work that may go anywhere", None)
    deadline = terms.deadline if terms.deadline is not None else service.deadline
    if left < (math.inf if deadline is None else deadline):
        deadline = left
    return Needs(
        deadline=deadline,
        level=level_of(deadline, terms.priority or service.priority),
        rows=rows,
        size=size,
        budget=terms.budget,
        constraints=Constraints(name, locality, terms.min_accuracy, service.preemptible, tenant.classes, asks),
    )


def service_of(terms: Terms, topology: Topology) -> tuple[str, Service]:
    """The terms' service and its name. Raises `InvalidRequestError` if it is unknown."""
    name = terms.service or topology.default_service
    if name not in topology.service:
        raise wrong_field("service", f"one of {sorted(topology.service)}", name)
    return name, topology.service[name]


def level_of(deadline: float | None, priority: Priority) -> int:
    """The queue's priority level, 0 (first) to 3: set by the deadline, shifted by the priority."""
    if deadline is not None and deadline <= LATENCY_CRITICAL:
        base = 0
    else:
        base = 1 if deadline is not None and deadline <= BACKGROUND else 2
    return min(max(base + _PRIORITY_SHIFT[priority], 0), 3)


def classify(
    model: Model, constraints: Constraints, topology: Topology, fleet: FleetSnapshot
) -> tuple[list[Candidate], list[Refusal]]:
    """Every (hardware class, variant) pair of `model`: the candidates, and why the other pairs are refused."""
    candidates, refusals = [], []
    live = {name: fleet.of_class(name) for name in topology.hardware}
    keys = {label: key_id(key) for label, key in topology.locality.sealing(constraints.locality).items()}
    pairs = product(sorted(topology.hardware.items()), sorted(model.variants.items()))
    for (name, hardware), (variant_name, variant) in pairs:
        reason = _class_refusal(model, variant_name, name, hardware, constraints)
        if reason is not None:
            refusals.append(Refusal(name, variant_name, reason))
            continue
        forwards = hardware.endpoint.forwards if hardware.endpoint is not None else ()
        asked = tuple(variant.forwarding(forwards).refuses(constraints.asks)) if constraints.asks else ()
        if asked:
            refusals.append(Refusal(name, variant_name, f"it does not honour {', '.join(asked)}", asked=asked))
            continue
        why = [
            (_device_refusal(model, variant_name, variant, device, keys, constraints.service), device)
            for device in live[name]
        ]
        able = tuple(device for refusal, device in why if refusal is None)
        if why and not able:
            refusals.append(Refusal(name, variant_name, str(why[0][0]), ever=False))
        else:
            absent = "" if able else _absence(name, fleet)
            candidates.append(Candidate(name, hardware, variant_name, variant, able, absent))
    return candidates, refusals


def _absence(name: str, fleet: FleetSnapshot) -> str:
    """Why no device serves a class: one of its own may be out of service."""
    faults = (f"{device.worker} is out of service: {device.fault}" for device in fleet.own(name) if device.fault)
    return next(faults, "no device of the class is live")


def leaving(
    candidates: list[Candidate], refusals: list[Refusal], fleet: FleetSnapshot
) -> tuple[list[Candidate], list[Refusal]]:
    """The same while the site drains: what other fleets offer to run, they alone may have."""
    away = [one for one in candidates if one.hardware.is_peer]
    if not (fleet.draining and any(one.devices for one in away)):
        return candidates, refusals
    stay = (one for one in candidates if not one.hardware.is_peer)
    return away, [*refusals, *(Refusal(one.hardware_class, one.variant_name, LEAVING, ever=False) for one in stay)]


def with_place(
    pair: tuple[str, str] | None, candidates: list[Candidate], refusals: list[Refusal], model: Model, topology: Topology
) -> tuple[list[Candidate], list[Refusal]]:
    """The same with the class and variant of a job that waits there, without devices if all refuse it at present."""
    here = [one for one in refusals if (one.hardware_class, one.variant) == pair and not one.ever]
    if pair is None or not here:
        return candidates, refusals
    name, variant = pair
    place = Candidate(name, topology.hardware[name], variant, model.variants[variant], (), here[0].reason)
    kept = sorted([*candidates, place], key=lambda one: (one.hardware_class, one.variant_name))
    return kept, [one for one in refusals if one not in here]


def _class_refusal(
    model: Model, variant_name: str, name: str, hardware: HardwareClass, constraints: Constraints
) -> str | None:
    """Why no device of the class can ever run the variant under the constraints; None if one can."""
    allowed = constraints.classes
    if allowed is not None and name not in allowed:
        return f"the tenant may use {', '.join(allowed)}, not this class"
    return _unfit(model, variant_name, hardware) or _forbidden(model.variants[variant_name], hardware, constraints)


def _unfit(model: Model, variant_name: str, hardware: HardwareClass) -> str | None:
    variant = model.variants[variant_name]
    if variant.runtime not in hardware.runtimes:
        return f"the class runs {', '.join(hardware.runtimes)}, not {variant.runtime}"
    if hardware.endpoint is not None and (reason := _unserved(model, variant_name, hardware.endpoint)):
        return reason
    tariff = hardware.price.tariff
    if tariff is not None and tariff.of_tokens and model.size_unit != "tokens":
        return f"the class charges for tokens, which the model's size_unit ({model.size_unit}) does not count"
    if hardware.device not in variant.profiles and "cpu" not in variant.profiles:
        return f"the variant has no profile for {hardware.device}"
    if hardware.memory is not None and variant.memory > hardware.memory:
        return f"needs {variant.memory} bytes of memory, the class has {hardware.memory}"
    return None


def _unserved(model: Model, variant: str, endpoint: Endpoint) -> str:
    """Why an endpoint does not serve the model's variant by what queues.yaml says; empty if it may."""
    if model.discovered:
        return "" if endpoint.discover else "the class's endpoint does not discover its models"
    if endpoint.name_of(model.name, model.version, variant) is not None:
        return ""
    others = (other for other in model.variants if endpoint.name_of(model.name, model.version, other) is not None)
    if (other := next(others, None)) is not None:
        return f"the class's endpoint serves {model.id} as {other}"
    return f"the class's endpoint serves {', '.join(endpoint.models) or 'what it announces'}, not {model.id}"


def _forbidden(variant: Variant, hardware: HardwareClass, constraints: Constraints) -> str | None:
    if missing(constraints.locality, hardware.labels):
        return f"the data must stay on {constraints.locality!r}, which the class is not"
    if hardware.capacity == "spot" and not constraints.preemptible:
        return "the class is spot capacity, for work that may be interrupted"
    if constraints.min_accuracy is None or (variant.accuracy or 0.0) >= constraints.min_accuracy:
        return None
    stated = "not stated" if variant.accuracy is None else f"{variant.accuracy:g}"
    return f"its accuracy is {stated}, the request needs at least {constraints.min_accuracy:g}"


def _device_refusal(
    model: Model, name: str, variant: Variant, device: DeviceFacts, keys: Mapping[str, str], service: str
) -> str | None:
    """Why this live device cannot run the variant now, of inputs sealed with these keys by label; None if it can."""
    if label := next((label for label in keys if keys[label] not in device.opens), ""):
        return f"{device.worker} has no key of the sealed label {label!r} ({keys[label]})"
    if variant.runtime not in device.runtimes:
        return f"{variant.runtime} is not installed on {device.worker}"
    key = variant_key(model.id, name)
    if key in device.unavailable:
        return f"unavailable on {device.worker}: {device.unavailable[key]}"
    peer = device.peer
    if peer is not None and peer.offers.get(key) and peer.offer(key, service) is None:  # without any, the line is cut
        return f"site {peer.site} offers none for {service} now"
    if model.discovered and discovered_by([(variant.runtime, device.announced)]).get(model.name) != model:
        return f"{device.worker} announces no such model"
    missing = lacking(variant.instruction_sets, device.instruction_sets)
    if missing:
        return f"{device.worker} lacks {', '.join(missing)}"
    if device.kind not in variant.profiles:
        return f"the variant has no profile for {device.kind}"
    return _memory_refusal(key, variant.memory, device)


def _memory_refusal(key: str, memory: int, device: DeviceFacts) -> str | None:
    """Why a variant cannot get the `memory` it needs, even if the worker unloaded all others; None if it can.

    A loaded variant already has its memory. Memory that other processes use on the device is not available to the
    worker.
    """
    if memory > device.memory_total:
        return f"needs {memory} bytes of memory, {device.worker} has {device.memory_total}"
    own = device.memory_free + device.memory_used
    if memory > own and key not in device.warm:
        return f"needs {memory} bytes of memory, others leave {device.worker} {own} of {device.memory_total}"
    return None
