"""The fleet as its operators see it: one value behind `GET /v2/fleet`, `taxiway top` and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from broker.port import Head, Moved, QueueMover
from router.decide.scaling import Want
from router.decide.snapshot import FleetSnapshot
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from tasks.heartbeat import HEARTBEAT, DeviceFacts
from tasks.retarget import is_emulated
from tasks.topology import HardwareClass, Topology
from taxiway.contract.keys import LEVELS


class ClassView(msgspec.Struct, frozen=True, kw_only=True):
    """One hardware class. Times in seconds, money in US dollars.

    `depth` is waiting messages by level where the broker tells, else one figure for all; `work` is device seconds
    queued and running, `held` those in holding that the class would take, both by level. `oldest` is how long the
    oldest waiting job has been accepted. `replicas` is how many devices there should be, and `why` says why.
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
    """The whole fleet; `stale` where its state could not be read lately. The last moves come first.

    `silent` has the workers that are left out of `devices`, with the seconds since their last heartbeat: they may have
    died, or lost the state store. `held` counts the jobs in holding, `dead` the messages that were given up and kept.
    `disabled` says by name why models are not served, `outdated` by name and version which are served as they were
    before their file became wrong. The processes in `restart` go by a queues.yaml that was changed since they started.
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
        """US dollars an hour for all live devices."""
        return sum(one.spending for one in self.classes.values())


SILENT = 2.5 * HEARTBEAT
"""Seconds without a heartbeat after which a device is not shown; decisions still count on it until `GONE_AFTER`."""


async def view_fleet(
    topology: Topology, reader: FleetReader, queue_mover: QueueMover, wants: Mapping[str, Want], store: Store
) -> FleetView:
    """The fleet now, with what its queues and the store hold.

    Raises:
        BrokerUnavailableError: the broker or the state store does not answer.
    """
    now, fleet = store.now(), reader.working.fleet
    silent = {} if fleet.stale else silent_for(fleet.devices, reader.heartbeats, now)
    fleet = replace(fleet, devices=tuple(device for device in fleet.devices if device.worker not in silent))
    held, dead = await store.set_aside()
    heads = {name: await queue_mover.head(name) for name in sorted(topology.hardware)}
    since = await _accepted(queue_mover, [job for head in heads.values() for job in head.first])
    classes = {
        name: _class_view(name, topology.hardware[name], fleet, head, wants.get(name), _oldest(head, since, now))
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
    """When each of these jobs was accepted, as far as it has a record."""
    records = await queue_mover.records(jobs, ("accepted",)) if jobs else []
    return {job: float(its["accepted"]) for job, its in zip(jobs, records, strict=True) if "accepted" in its}


def _oldest(head: Head, accepted: Mapping[str, float], now: float) -> float:
    """Seconds since the oldest of those that are served next was accepted; 0 where nothing is known to wait."""
    return max([0.0, *(now - accepted[job] for job in head.first if job in accepted)])


def _class_view(
    name: str, hardware: HardwareClass, fleet: FleetSnapshot, head: Head, want: Want | None, oldest: float
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
        replicas=None if want is None else want.replicas,
        why="the fleet was not read yet" if want is None else want.reason,
    )
