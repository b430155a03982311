"""The frozen picture of the fleet that every decision is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks.facts import DeviceFacts


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All queues and live devices at one instant.

    `work` maps each hardware class to its queued and running device seconds, one figure a priority level, highest
    first. A `stale` snapshot could not be read in time: decisions then use queues.yaml alone, and say so.
    """

    devices: tuple[DeviceFacts, ...] = ()
    work: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    stale: bool = False

    def of_class(self, hardware_class: str) -> tuple[DeviceFacts, ...]:
        """The live devices that serve a class, by name."""
        return tuple(sorted((d for d in self.devices if d.hardware_class == hardware_class), key=lambda d: d.worker))

    def ahead(self, hardware_class: str, level: int) -> float:
        """Seconds of device time that a class serves before a new job of `level`."""
        return sum(self.work.get(hardware_class, ())[: level + 1])
