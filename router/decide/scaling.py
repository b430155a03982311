"""How many devices a class should have (DESIGN §7): enough for the arriving load, and to serve the backlog in time.

KEDA, Prometheus and the local autoscaler all get the same answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from router.decide.classify import level_of
from router.decide.snapshot import FleetSnapshot
from tasks.topology import HardwareClass, Topology
from taxiway.contract.keys import LEVELS

MAX_WINDOW = 60.0
"""Longest window of load samples, in seconds. The window is two device starts, within `MIN_WINDOW` and this bound."""

MIN_WINDOW = 2.0
"""Shortest window of load samples, in seconds: three samples."""

QUANTILE = 0.95
"""Quantile of the sampled load that the devices must carry (DESIGN §7: the 95th percentile)."""

NEGLIGIBLE = 1e-9
"""Device seconds (per second, or of work) below which a sum counts as zero: rounding errors."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A class at one instant: live devices, how many of them are busy, and device seconds waiting, by level."""

    at: float
    devices: int
    busy: float
    work: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ScalingTarget:
    """How many devices a class should have, and why; `devices` is how many are live now."""

    replicas: int
    devices: int
    reason: str


@dataclass(slots=True)
class Scaler:
    """Per-class state: load samples of the last `MAX_WINDOW` seconds, and recent scaling targets."""

    topology: Topology
    _samples: dict[str, deque[Sample]] = field(default_factory=dict)
    _recent: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    def observe(self, fleet: FleetSnapshot, now: float) -> None:
        """Sample the fleet as it is at `now`, in seconds of any monotonic clock."""
        for name, hardware in self.topology.hardware.items():
            busy = sum(device.utilisation for device in fleet.devices if device.busy_for == name)
            samples = self._samples.setdefault(name, deque())
            samples.append(Sample(now, len(fleet.own(name)), busy, _waiting(fleet, name)))
            while samples[0].at < now - _window(hardware):
                samples.popleft()
            recent = self._recent.setdefault(name, deque())
            recent.append((now, replicas(hardware, deadlines(self.topology), samples).replicas))
            while recent[0][0] < now - hardware.scaling.start:
                recent.popleft()

    def targets(self) -> Mapping[str, ScalingTarget]:
        """The scaling target of each class; empty before the first sample."""
        due = deadlines(self.topology)
        return {
            name: with_recent(
                replicas(hardware, due, self._samples[name]), [count for _, count in self._recent[name]], hardware
            )
            for name, hardware in self.topology.hardware.items()
            if name in self._samples
        }


def deadlines(topology: Topology) -> tuple[float, ...]:
    """The shortest deadline of the services at each level, in seconds; infinite if none has one."""
    shortest = [math.inf] * LEVELS
    for service in topology.service.values():
        level = level_of(service.deadline, service.priority)
        shortest[level] = min(shortest[level], math.inf if service.deadline is None else service.deadline)
    return tuple(shortest)


def replicas(hardware: HardwareClass, due: Sequence[float], samples: Sequence[Sample]) -> ScalingTarget:
    """Devices for the load in one or more samples, oldest first; `due` is each level's deadline in seconds."""
    now = samples[-1]
    load = float(np.quantile(_arriving(samples), QUANTILE))
    steady = 0 if load < NEGLIGIBLE else math.ceil(load / hardware.target) + hardware.scaling.spare
    queued, level = max((_devices_needed(now.work, due, level, hardware), level) for level in range(LEVELS))
    least, most = hardware.scaling.minimum, hardware.scaling.maximum
    count = max(steady, queued, least)
    if most is not None and count > most:
        return ScalingTarget(most, now.devices, f"{most}, the maximum; {count} would be in time")
    if count == least:
        return ScalingTarget(count, now.devices, f"{least}, the minimum; the load needs no more")
    if count == steady:
        spare = f" and {hardware.scaling.spare} spare" if hardware.scaling.spare else ""
        return ScalingTarget(
            count, now.devices, f"{load:.3g} device seconds/s at {hardware.target:.0%} utilisation{spare}"
        )
    work = sum(now.work[: level + 1])
    return ScalingTarget(
        count, now.devices, f"{work:.3g} device seconds waiting, due in {_time_available(due, level, hardware):g} s"
    )


def with_recent(target: ScalingTarget, lately: Sequence[int], hardware: HardwareClass) -> ScalingTarget:
    """The target, or a larger one from within the time that a start takes.

    Ski rental: idling for as long as a start takes costs at most twice what perfect foresight would.
    """
    most = max(lately, default=0)
    if most <= target.replicas:
        return target
    start = hardware.scaling.start
    return ScalingTarget(
        most, target.devices, f"{most} were needed within the last {start:g} s, the time a start takes"
    )


def _window(hardware: HardwareClass) -> float:
    return min(max(2 * hardware.scaling.start, MIN_WINDOW), MAX_WINDOW)


def _waiting(fleet: FleetSnapshot, hardware_class: str) -> tuple[float, ...]:
    """Device seconds that the class has to serve: bound to it, and held for it."""
    none = (0.0,) * LEVELS
    pairs = zip(fleet.work.get(hardware_class, none), fleet.held.get(hardware_class, none), strict=True)
    return tuple(bound + held for bound, held in pairs)


def _arriving(samples: Sequence[Sample]) -> list[float]:
    """Device seconds that arrived per second between consecutive samples: what was served plus queue growth."""
    came = []
    for before, after in pairwise(samples):
        span = max(after.at - before.at, 1e-3)
        growth = (sum(after.work) - sum(before.work)) / span
        came.append(max((before.busy + after.busy) / 2 + growth, 0.0))
    return came or [samples[-1].busy]


def _devices_needed(work: Sequence[float], due: Sequence[float], level: int, hardware: HardwareClass) -> int:
    """The fewest devices that serve this level and the ones above it by its deadline, earliest deadline first."""
    ahead = sum(work[: level + 1])
    return 0 if ahead < NEGLIGIBLE else math.ceil(ahead / _time_available(due, level, hardware))


def _time_available(due: Sequence[float], level: int, hardware: HardwareClass) -> float:
    """Seconds that a level's work may wait: its deadline less a start, but at least a horizon."""
    return max(min(due[level], 1e6) - hardware.scaling.start, hardware.horizon, 1e-3)
