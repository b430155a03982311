"""What the fleet reports, as a snapshot: live devices, the work that waits, and the rates at which rows arrive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from router.decide.snapshot import FleetSnapshot, occupied_by, with_hosts, with_occupied
from tasks.heartbeat import GONE_AFTER, HEARTBEAT, DeviceFacts
from taxiway.contract.keys import ARRIVED, LEVELS, WAITING

BEAT = 0.25
"""Seconds between two snapshots."""

RATE_MEMORY = 5.0
"""Seconds over which arrival rates are averaged: a few of a live burst, far less than a batch horizon."""

STARTS_FOR = 90.0
"""Seconds for which a request to start devices of a class counts: three of KEDA's default polling intervals."""

Work = Mapping[str, tuple[float, ...]]
"""Device seconds by hardware class, one figure per level."""

_decode_facts = msgspec.json.Decoder(DeviceFacts).decode


@dataclass(frozen=True, slots=True)
class FleetFacts:
    """The fleet's keys, read together."""

    now: float
    """The store's time."""
    devices: Mapping[str, bytes]
    """The last heartbeat of each worker, encoded; `heartbeats` has its time."""
    heartbeats: Mapping[str, float]
    work: Mapping[str, float]
    """Device seconds by class and level, queued or held, and rows that arrived by flow (`work_from`)."""
    lengths: Mapping[str, bytes] = field(default_factory=dict)
    """Answer lengths by model and tenant, as stored."""
    starts: Mapping[str, float] = field(default_factory=dict)
    """When an autoscaler last declared that it starts devices of a class."""
    draining: bool = False
    """The site hands its work to other fleets."""
    spent: Mapping[str, float] = field(default_factory=dict)
    """US dollars by tenant on the day of `now`."""
    used: float = 0.0
    """Share of its memory that the store uses."""
    refuses: bool = False
    """The store cannot write to its disk, and accepts no writes."""
    plan: bytes = b""
    """As stored, one byte longer than it may be at most; empty if there is none."""
    open: Mapping[str, float] = field(default_factory=dict)
    """Unfinished jobs of tenants with a bounded depth."""


def named(pairs: Sequence[bytes]) -> dict[str, bytes]:
    """A server's list of alternating names and values, as a mapping."""
    return {name.decode(): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}


def figures(pairs: Sequence[bytes]) -> dict[str, float]:
    """The same, where the values are numbers."""
    return {name: float(value) for name, value in named(pairs).items()}


@dataclass(frozen=True, slots=True)
class Arrived:
    """Total rows that arrived in each flow (`keys.flow`) at `now` by the store's clock, and their rates, rows/s."""

    now: float
    rows: Mapping[str, float]
    rates: Mapping[str, float]


def arrived_since(before: Arrived | None, facts: FleetFacts) -> Arrived:
    """The rates after one more read, each an exponential mean over `RATE_MEMORY` seconds."""
    cells = (cell.partition("|") for cell in facts.work if cell.startswith(f"{ARRIVED}|"))
    rows = {flow: facts.work[f"{kind}|{flow}"] for kind, _, flow in cells}
    if before is None:
        return Arrived(facts.now, rows, {})
    span = max(facts.now - before.now, 1e-3)
    kept = math.exp(-span / RATE_MEMORY)
    came = {flow: max(count - before.rows.get(flow, 0.0), 0.0) / span for flow, count in rows.items()}
    rates = {flow: kept * before.rates.get(flow, 0.0) + (1 - kept) * rate for flow, rate in came.items()}
    return Arrived(facts.now, rows, rates)


@dataclass(frozen=True, slots=True)
class MissedBeats:
    """When the store last took no heartbeats, by its own clock: no device is gone for missing those.

    `read_at` is the time of the last read.
    """

    since: float = math.inf
    until: float = -math.inf
    read_at: float = math.inf

    def after(self, facts: FleetFacts) -> MissedBeats:
        """The same, after one more read: the store refuses writes, or could not be read in time for a heartbeat."""
        unread = facts.now - self.read_at > HEARTBEAT
        if not unread and not facts.refuses:
            return MissedBeats(self.since, self.until, facts.now)
        began = self.read_at if unread else facts.now
        return MissedBeats(self.since if self._excuses(began) else began, facts.now, facts.now)

    def lives(self, beat: float, now: float) -> bool:
        """Whether a device with its last heartbeat at `beat` is live: recent, or so when the first was missed."""
        return now - beat <= GONE_AFTER or (self._excuses(now) and self.since - beat <= GONE_AFTER)

    def _excuses(self, now: float) -> bool:
        """Whether heartbeats are missed, or are taken again for less time than a device may be silent."""
        return now - self.until <= GONE_AFTER


NONE_MISSED = MissedBeats()


def snapshot_from(
    facts: FleetFacts, missed: MissedBeats = NONE_MISSED, starts: Set[str] = frozenset()
) -> FleetSnapshot:
    """The snapshot in the store's keys; devices gone by the store's clock, or unreadable, are left out.

    `starts` are classes whose devices are started on demand, besides those named in the store's keys.
    """
    live = sorted(name for name, at in facts.heartbeats.items() if missed.lives(at, facts.now))
    reports = []
    for name in live:
        with suppress(KeyError, msgspec.MsgspecError):
            reports.append(_decode_facts(facts.devices[name]))
    devices = tuple(_since(device, facts.now - facts.heartbeats.get(device.worker, facts.now)) for device in reports)
    work, held = work_from(facts.work)
    requested_starts = {name for name, at in facts.starts.items() if facts.now - at <= STARTS_FOR}
    startable = tuple(sorted(requested_starts | starts))
    occupied = occupied_by(devices, {name: facts.now - at for name, at in facts.heartbeats.items()})
    work = with_occupied(work, occupied)
    return FleetSnapshot(
        devices=with_hosts(devices),
        work=work,
        held=held,
        startable=startable,
        draining=facts.draining,
        occupied=occupied,
        now=facts.now,
    )


def _since(device: DeviceFacts, age: float) -> DeviceFacts:
    """A device's facts, reported `age` seconds ago, adjusted to the present."""
    endpoint = device.endpoint
    if endpoint is not None and endpoint.peer is not None:
        peer = replace(endpoint.peer, age=endpoint.peer.age + max(age, 0.0))
        device = replace(device, endpoint=replace(endpoint, peer=peer))
    if not device.blocked:
        return device
    return replace(device, blocked=max(device.blocked - age, 0.0))


def work_from(cells: Mapping[str, float]) -> tuple[Work, Work]:
    """Device seconds bound to each class, and those held for it, as counted in the cells of `WORK`."""
    bound, held = dict[str, list[float]](), dict[str, list[float]]()
    for cell, seconds in cells.items():
        place, _, level = cell.rpartition("|")
        waiting, _, hardware_class = place.rpartition("|")
        if level.isdigit() and int(level) < LEVELS:
            work = held if waiting == WAITING else bound
            work.setdefault(hardware_class, [0.0] * LEVELS)[int(level)] = max(seconds, 0.0)
    return _frozen(bound), _frozen(held)


def _frozen(work: Mapping[str, list[float]]) -> Work:
    return {name: tuple(levels) for name, levels in work.items()}
