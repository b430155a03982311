"""The nodes that a class's devices run on: pools, between which the Kubernetes operator's own decisions move them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from controller.decide.pools import PodLoss, PoolState, PoolTrust, allot, cheapest_to_end
from simulator.device import SimulatedDevice
from simulator.fleet import DeviceClass


class Nodes:
    """The pools of one class, first choice first; each has the next of the class's devices."""

    def __init__(self, device_class: DeviceClass) -> None:
        self._class = device_class
        self._pools = device_class.pools
        self._rules = device_class.times.rules()
        self._available = [pool.count or device_class.count for pool in self._pools]
        self._ends = list(accumulate(self._available))
        self._asked = [0] * len(self._pools)
        self._short_since: list[float | None] = [None] * len(self._pools)
        self.trusts = [PoolTrust()] * len(self._pools)

    @property
    def available(self) -> int:
        """Devices that may be on."""
        return sum(self._available)

    def spot(self, device: SimulatedDevice) -> bool:
        """Whether a device may be reclaimed."""
        return self._pools[self._place(device)].spot

    def usd_per_second(self, device: SimulatedDevice) -> float:
        """Price of a device while it is on."""
        return self._class.usd_on(self._pools[self._place(device)])

    def limit(self, name: str, available: int | None, devices: Sequence[SimulatedDevice]) -> list[SimulatedDevice]:
        """The devices that are lost when a pool has `available` nodes from now on, or loses all of them (None)."""
        place = [pool.name for pool in self._pools].index(name)
        on = [device for device in self._of(place, devices) if device.on_since is not None]
        if available is None:
            return on
        self._available[place] = min(available, len(self._of(place, devices)))
        return on[self._available[place] :]

    def free(self, devices: Sequence[SimulatedDevice]) -> SimulatedDevice | None:
        """The device that is switched on next, if there is a node for one."""
        order = sorted(range(len(self._pools)), key=lambda place: self.trusts[place].phase == "out")
        return next((device for place in order for device in self._off(place, devices)), None)

    def spread(
        self, wanted: int, devices: Sequence[SimulatedDevice], now: float
    ) -> tuple[list[SimulatedDevice], list[SimulatedDevice]]:
        """One step of the operator for `wanted` devices: those to switch on, and those to drain."""
        seen = [self._seen(place, devices, now) for place in range(len(self._pools))]
        allotted = allot(wanted, seen, self.trusts, now, self._rules)
        self.trusts, self._asked = list(allotted.trusts), list(allotted.replicas)
        on: list[SimulatedDevice] = []
        off: list[SimulatedDevice] = []
        for place, asked in enumerate(self._asked):
            staying = [device for device in self._of(place, devices) if device.on_since is not None]
            staying = [device for device in staying if not device.draining]
            started = self._off(place, devices)[: max(asked - len(staying), 0)]
            on += started
            off += _ending(staying, len(staying) - asked)
            lacks = asked > len(staying) + len(started)
            since = self._short_since[place]
            self._short_since[place] = (now if since is None else since) if lacks else None
        return on, off

    def _seen(self, place: int, devices: Sequence[SimulatedDevice], now: float) -> PoolState:
        own, since = self._of(place, devices), self._short_since[place]
        ready = sum(device.available for device in own)
        return PoolState(
            self._pools[place].name, self._asked[place], ready, 0.0 if since is None else now - since, len(own)
        )

    def _place(self, device: SimulatedDevice) -> int:
        return bisect_right(self._ends, device.index)

    def _of(self, place: int, devices: Sequence[SimulatedDevice]) -> Sequence[SimulatedDevice]:
        return devices[self._ends[place - 1] if place else 0 : self._ends[place]]

    def _off(self, place: int, devices: Sequence[SimulatedDevice]) -> Sequence[SimulatedDevice]:
        """Devices of a pool that are off and have a node."""
        own = self._of(place, devices)
        off = [device for device in own if device.on_since is None]
        return off[: max(self._available[place] - len(own) + len(off), 0)]


def _ending(devices: Sequence[SimulatedDevice], count: int) -> list[SimulatedDevice]:
    """Those of a pool that lose least."""
    named = {f"{device.index:06}": device for device in devices}
    lost = {name: PodLoss(running=len(device), warm=len(device.resident)) for name, device in named.items()}
    ready = {name for name, device in named.items() if device.serving}
    return [named[name] for name in cheapest_to_end(lost, ready, max(count, 0))]
