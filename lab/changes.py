"""Changes of a fleet's hardware while a trace runs: slower devices, fewer of them, and devices that are taken away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import msgspec

from simulator.device import SimulatedDevice
from simulator.engine import RunSummary, Simulation, summarise
from simulator.fleet import Above, AtLeast0, Fleet, Stepping
from simulator.policies.policy import Policy
from simulator.pool import Pool
from simulator.workload import Workload
from tasks.topology import ClassName


class HardwareChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A change of a class's hardware: exactly one of `slower`, `available` and `reclaimed`."""

    at: AtLeast0
    """Seconds into the trace. Example: 450"""
    hardware_class: ClassName = msgspec.field(name="class")
    """The class. Example: gpu.l4"""
    slower: Above | None = None
    """Work takes this many times its profile's seconds from then on. Example: 3"""
    available: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Most devices that may be on from then on. Example: 2"""
    reclaimed: bool = False
    """Whether all devices that are on are reclaimed."""


@dataclass(frozen=True, slots=True)
class ChangingFleet(Fleet):
    """A fleet whose hardware changes."""

    events: tuple[HardwareChange, ...] = ()
    """In order of time."""


def changes_of(fleet: Fleet) -> tuple[HardwareChange, ...]:
    """The changes of a fleet's hardware, in order of time."""
    return fleet.events if isinstance(fleet, ChangingFleet) else ()


def changed(workload: Workload, *changes: HardwareChange) -> Workload:
    """The workload on a fleet whose hardware changes so."""
    assert isinstance(workload.fleet, ChangingFleet)
    return replace(workload, fleet=replace(workload.fleet, events=changes))


class ChangingPool(Pool):
    """A class whose devices may become slower, fewer, or be taken away."""

    def slow_down(self, factor: float, now: float) -> None:
        """Work takes `factor` times its profile's seconds from now on; the whole batch that runs is not affected."""
        pace, self.pace = self.pace, factor
        self._timings = tuple(timing and timing.slower(factor / pace) for timing in self._timings)
        for device in self.devices:
            if device.run is None:
                continue
            device.run.written(now)  # with the steps before
            for model, generation in device.run.generations.items():
                timing = self._timings[model]
                assert isinstance(timing, Stepping)
                generation.timing = timing
            self._expect(device)

    def limit(self, available: int, now: float) -> None:
        """At most `available` devices may be on; further ones are lost, and the jobs that they ran are queued again."""
        self.available = min(available, self.count)
        for device in [device for device in self.devices if device.on_since is not None][self.available :]:
            self._lose(device, now)
        self.feed(now)

    def reclaim(self, now: float) -> None:
        """All devices that are on are lost; the jobs that they ran are queued again."""
        for device in [device for device in self.devices if device.on_since is not None]:
            self._lose(device, now)
        self._grow(now)


GIVE_UP = 60.0
"""Seconds after which jobs are given up that wait where no device may be on, once nothing else is left."""


class ChangingSimulation(Simulation):
    """A run on a fleet whose hardware may change."""

    pool_type = ChangingPool

    def _begin(self) -> None:
        super()._begin()
        changes = changes_of(self.workload.fleet)
        self._changes = len(changes)
        for change in changes:
            self.at(change.at, partial(self._change, change), None, 0)

    def finish(self) -> None:
        """Play until the last job has ended; jobs left where no device may be on are given up after `GIVE_UP`."""
        served = self.now
        while self._inside and self.now < served + GIVE_UP:
            self.process_next()
            if self._changes or any(pool.available and pool.jobs for pool in self.pools):
                served = self.now

    def _change(self, change: HardwareChange, device: SimulatedDevice | None, version: int, now: float) -> None:
        self._changes -= 1
        pool = next(pool for pool in self.pools if pool.name == change.hardware_class)
        assert isinstance(pool, ChangingPool)
        if change.slower is not None:
            pool.slow_down(change.slower, now)
        elif change.available is not None:
            pool.limit(change.available, now)
        else:
            pool.reclaim(now)


def simulate(name: str, workload: Workload, policy: Policy, *, seed: int) -> RunSummary:
    """The figures of `policy`, called `name`, over the workload."""
    engine = ChangingSimulation(workload, policy, seed=seed)
    outcome = engine.run()
    return summarise(name, workload, outcome, engine.pools)
