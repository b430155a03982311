"""Samples the fleet for operators: what it looked like in the last 15 minutes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from router.decide.snapshot import FleetSnapshot
from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from router.upkeep.leader import Duty
from tasks.heartbeat import HEARTBEAT, DeviceFacts
from tasks.history import ServiceLatency
from tasks.topology import Topology

EVERY = 5.0
"""Seconds between two samples."""

SAMPLES = 180
"""Samples that are kept: 15 minutes."""


class ClassSample(msgspec.Struct, frozen=True, array_like=True):
    """One hardware class at one instant."""

    waiting: int
    """Messages in its queue, at all levels."""
    utilisation: float
    """0 to 1, the mean of its devices since the sample before."""
    devices: int
    """Live devices that serve it."""
    dollars: float
    """What its own devices cost, in US dollars an hour."""


class MovedSample(msgspec.Struct, frozen=True, array_like=True):
    """Waiting jobs that were moved from one class to another since the sample before."""

    source: str
    target: str
    kind: str
    """`rescue`, `save`, `balance`: why, as in `Moved`."""
    jobs: int


class FleetSample(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet at one instant."""

    at: float
    """Unix seconds by the state store's clock."""
    held: int
    """Jobs that are bound to no class."""
    plan: int
    """The number of the plan that is followed; 0 if none is."""
    classes: dict[str, ClassSample]
    """By name."""
    moves: tuple[MovedSample, ...] = ()
    """What was moved since the sample before."""
    services: tuple[ServiceLatency, ...] = ()
    """What was recorded since the sample before: of one slice and service, the latest counts."""


class Timeline(Duty):
    """Reads utilisation with each heartbeat, and adds a sample every `EVERY` seconds.

    `moves` counts the moved jobs by source, target and kind.
    """

    def __init__(
        self, store: RouterStore, fleet: FleetReader, rules: Rules, moves: Mapping[tuple[str, ...], int]
    ) -> None:
        super().__init__(HEARTBEAT)
        self._store = store
        self._fleet = fleet
        self._rules = rules
        self._moves = moves
        self._moved = Counter(moves)
        self._busy: list[Mapping[str, float]] = []
        self._services: list[ServiceLatency] = []

    def note(self, services: Sequence[ServiceLatency]) -> None:
        """A slice of arrivals was recorded: the next sample has this."""
        self._services += services

    async def tick(self) -> None:
        """Observe the fleet, and store a sample if one is due."""
        fleet, topology = self._fleet.snapshot, self._rules.topology
        if fleet.stale:
            return
        self._busy.append({name: utilisation_of(fleet.of_class(name)) for name in topology.hardware})
        if len(self._busy) * self.pause < EVERY:
            return
        waiting, held = await self._store.fleet.waiting(sorted(topology.hardware))
        now, moved = self._store.clock.stored_now(), Counter(self._moves)
        sample = FleetSample(
            at=round(now, 1),
            held=held,
            plan=0 if fleet.plan is None else fleet.plan.number,
            classes=_classes(fleet, topology, waiting, self._busy),
            moves=tuple(
                MovedSample(source, target, kind, jobs)
                for (source, target, kind), jobs in sorted((moved - self._moved).items())
            ),
            services=tuple(one for one in self._services if one.begin > now - SAMPLES * EVERY),
        )
        self._busy.clear()
        self._services.clear()
        self._moved = moved
        await self._store.fleet.add_sample(msgspec.json.encode(sample), SAMPLES)


def utilisation_of(devices: Sequence[DeviceFacts]) -> float:
    """The mean utilisation of devices, 0 to 1; 0 of none."""
    return sum(device.utilisation for device in devices) / len(devices) if devices else 0.0


def _classes(
    fleet: FleetSnapshot, topology: Topology, waiting: Mapping[str, int], busy: Sequence[Mapping[str, float]]
) -> dict[str, ClassSample]:
    return {
        name: ClassSample(
            waiting=depth,
            utilisation=round(sum(seen.get(name, 0.0) for seen in busy) / len(busy), 3),
            devices=len(fleet.of_class(name)),
            dollars=round(fleet.spending(name, topology.hardware[name]), 4),
        )
        for name, depth in waiting.items()
    }
