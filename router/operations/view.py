"""The fleet and its models as shown to operators and callers.

One value, `FleetView`, is behind `GET /v2/fleet`, `taxiway top` and the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from broker.port import Head, Moved, QueueMover
from router.decide.classify import Constraints, classify
from router.decide.scaling import ScalingTarget
from router.decide.snapshot import FleetSnapshot
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from tasks.heartbeat import HEARTBEAT, DeviceFacts, is_emulated
from tasks.models.catalogue import Catalogue, Model, TensorSpec, Variant
from tasks.topology import HardwareClass, Topology
from taxiway.contract.keys import LEVELS
from taxiway.contract.values import BATCH_AXIS


class ClassView(msgspec.Struct, frozen=True, kw_only=True):
    """One hardware class. Times in seconds, money in US dollars.

    `depth` is waiting messages by level if the broker reports it, else one total. `work` is device seconds queued and
    running, `held` those in holding for the class, both by level. `oldest` is the age of the oldest waiting job since
    acceptance. `replicas` is the number of devices there should be, and `why` the reason.
    """

    device: str
    devices: int
    emulated: int
    usd_per_hour: float
    spending: float
    utilisation: float
    depth: tuple[int, ...]
    oldest: float
    work: tuple[float, ...]
    held: tuple[float, ...]
    rows_per_second: float
    running: int
    warm: tuple[str, ...]
    replicas: int | None
    why: str


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole fleet; `stale` if its state could not be read recently. Moves are latest first.

    `silent` has the workers left out of `devices`, with the seconds since their last heartbeat: they may have died, or
    lost the state store. `held` counts the held jobs, `dead` the dead letters. `disabled` gives by name why models are
    not served. `outdated` gives by name and version which models are served as they were before their file became
    invalid. The processes in `restart` use a queues.yaml that has changed since they started.
    """

    stale: bool
    now: float
    held: int
    dead: int
    classes: dict[str, ClassView]
    devices: tuple[DeviceFacts, ...]
    moves: tuple[Moved, ...]
    silent: dict[str, float] = {}
    disabled: Mapping[str, str] = {}
    outdated: Mapping[str, str] = {}
    restart: tuple[str, ...] = ()

    @property
    def spending(self) -> float:
        """US dollars per hour for all live devices."""
        return sum(one.spending for one in self.classes.values())


SILENT = 2.5 * HEARTBEAT
"""Seconds without a heartbeat after which a device is not shown; decisions still use it until `GONE_AFTER`."""


async def view_fleet(
    topology: Topology, reader: FleetReader, queue_mover: QueueMover, targets: Mapping[str, ScalingTarget], store: Store
) -> FleetView:
    """The fleet now, with its queues and held jobs.

    Raises:
        BrokerUnavailableError: the broker or the state store does not answer.
    """
    now, fleet = store.now(), reader.working.fleet
    silent = {} if fleet.stale else silent_for(fleet.devices, reader.heartbeats, now)
    fleet = replace(fleet, devices=tuple(device for device in fleet.devices if device.worker not in silent))
    held, dead = await store.held_and_dead()
    heads = {name: await queue_mover.head(name) for name in sorted(topology.hardware)}
    since = await _accepted(queue_mover, [job for head in heads.values() for job in head.first])
    classes = {
        name: _class_view(name, topology.hardware[name], fleet, head, targets.get(name), _oldest(head, since, now))
        for name, head in heads.items()
    }
    moves = tuple(await queue_mover.moves())
    return FleetView(
        stale=fleet.stale,
        now=now,
        held=held,
        dead=dead,
        classes=classes,
        devices=fleet.devices,
        moves=moves,
        silent=silent,
    )


def silent_for(devices: Sequence[DeviceFacts], heartbeats: Mapping[str, float], now: float) -> dict[str, float]:
    """Seconds since the last heartbeat of each worker that has been silent for longer than `SILENT`."""
    ages = {device.worker: now - heartbeats.get(device.worker, now) for device in devices}
    return {worker: round(age, 3) for worker, age in ages.items() if age > SILENT}


async def _accepted(queue_mover: QueueMover, jobs: Sequence[str]) -> Mapping[str, float]:
    """The acceptance time of each of these jobs that has a record."""
    records = await queue_mover.records(jobs, ("accepted",)) if jobs else []
    return {job: float(its["accepted"]) for job, its in zip(jobs, records, strict=True) if "accepted" in its}


def _oldest(head: Head, accepted: Mapping[str, float], now: float) -> float:
    """Seconds since the oldest of the jobs served next was accepted; 0 if none is known to wait."""
    return max([0.0, *(now - accepted[job] for job in head.first if job in accepted)])


def _class_view(
    name: str, hardware: HardwareClass, fleet: FleetSnapshot, head: Head, target: ScalingTarget | None, oldest: float
) -> ClassView:
    devices = fleet.of_class(name)
    none = (0.0,) * LEVELS
    price = hardware.dollars_per_second * 3600
    return ClassView(
        device=hardware.device,
        devices=len(devices),
        emulated=sum(is_emulated(device.kind, hardware) for device in devices),
        usd_per_hour=price,
        spending=price * len(fleet.own(name)),
        utilisation=sum(device.utilisation for device in devices) / len(devices) if devices else 0.0,
        depth=head.depths,
        oldest=oldest,
        work=tuple(fleet.work.get(name, none)),
        held=tuple(fleet.held.get(name, none)),
        rows_per_second=sum(rate for traffic, rate in fleet.rates.items() if traffic.partition("|")[0] == name),
        running=sum(device.running for device in devices),
        warm=tuple(sorted({key.partition("/")[0] for device in devices for key in device.warm})),
        replicas=None if target is None else target.replicas,
        why="no fleet snapshot yet" if target is None else target.reason,
    )


def model_metadata(catalogue: Catalogue, model: Model) -> dict[str, Any]:
    """The protocol's model metadata, plus the parameters that the model takes."""
    return {
        "name": model.name,
        "versions": [str(m.version) for m in catalogue.versions(model.name)],
        "platform": f"taxiway_{model.pipeline}",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
        "parameters": {name: msgspec.to_builtins(spec) for name, spec in model.parameters.items()},
        "summary": model.summary,
        "licence": model.licence,
    }


def model_list(catalogue: Catalogue, fleet: FleetSnapshot) -> list[dict[str, Any]]:
    """Every model by name: versions and aliases, plus variants and summary of the version that the bare name means.

    `disabled` is why the bare name is not served. `problems` lists other faults: invalid files of other versions, or of
    a version still served from before its file became invalid; and, by variant, why live devices could not load it.
    """
    disabled = {_bare(reference) for reference in catalogue.disabled}
    return [_listed(catalogue, name, fleet) for name in sorted({m.name for m in catalogue.models.values()} | disabled)]


def _listed(catalogue: Catalogue, name: str, fleet: FleetSnapshot) -> dict[str, Any]:
    versions = catalogue.versions(name)
    current = catalogue.resolve(name) if catalogue.serves(name) else None
    entry = {
        "name": name,
        "versions": [str(m.version) for m in versions],
        "aliases": {alias: str(m.version) for m in versions for alias in m.aliases},
        "variants": {} if current is None else {key: _variant(v) for key, v in current.variants.items()},
        "summary": "" if current is None else current.summary,
    }
    problems = _problems(catalogue, name) | ({} if current is None else _unloadable(current, fleet))
    if current is None and name in problems:
        entry["disabled"] = problems.pop(name)
    return entry | ({"problems": problems} if problems else {})


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "runtime": variant.runtime,
        "precision": variant.precision,
        "accuracy": variant.accuracy,
        "memory": int(variant.memory),
    }


def _problems(catalogue: Catalogue, name: str) -> dict[str, str]:
    """Faults in the files of a model."""
    found = {**catalogue.disabled, **catalogue.outdated}
    return {reference: why for reference, why in sorted(found.items()) if _bare(reference) == name}


def _unloadable(model: Model, fleet: FleetSnapshot) -> dict[str, str]:
    """Why live devices could not load variants of the model, by variant."""
    found: dict[str, str] = {}
    for device in fleet.devices:
        for key, why in device.unavailable.items():
            if key.partition("/")[0] == model.id:
                found.setdefault(key.partition("/")[2], f"{device.worker}: {why}")
    return found


def _bare(reference: str) -> str:
    return reference.partition(":")[0]


def unready(model: Model, topology: Topology, fleet: FleetSnapshot) -> str:
    """Why no live device has or can load the model; empty if one does."""
    if fleet.stale:
        return "the fleet snapshot is stale"
    candidates, refusals = classify(model, Constraints(), topology, fleet)
    if any(candidate.devices for candidate in candidates):
        return ""
    reasons = [f"{one.hardware_class}/{one.variant}: {one.reason}" for one in refusals if not one.ever]
    return "; ".join(reasons) or "no live device can run it"


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    tensor = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    axis = {BATCH_AXIS: spec.batch_axis} if spec.batch_axis != 0 else {}
    return tensor | axis | ({"optional": True} if spec.optional else {})
