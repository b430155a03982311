"""How one class scales: the rules that a plan may give it, as functions of the class's present load.

The router's autoscaler and the simulator apply the same functions.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

TARGET = 0.65
"""Target utilisation of devices (DESIGN §7: 0.6–0.7 where live work runs)."""

LONGEST = 3600.0
"""Seconds within which work without a deadline must be done."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

KEEP_ALIVE = 300.0
"""Seconds before a device that is not needed is switched off, for rules on queue depth. Source: KEDA's cooldown."""


class Density(msgspec.Struct, frozen=True, tag="density", kw_only=True):
    """As many devices as the jobs' deadlines require at `target` utilisation.

    A device that is not needed is kept for `keep` seconds; for as long as its start takes if None.
    """

    target: Positive = TARGET
    keep: Seconds | None = None


class Depth(msgspec.Struct, frozen=True, tag="depth", kw_only=True):
    """One device per `jobs` waiting and running jobs, as autoscalers on queue depth do.

    `poll` is the seconds between two evaluations that may add devices.
    """

    jobs: Positive
    keep: Seconds = KEEP_ALIVE
    poll: Seconds = 15.0


ScalingRule = Density | Depth


def density(work: float, deadline: float, alone: float) -> float:
    """Devices that one job occupies until it is due: its device seconds over the seconds available.

    The sum of the densities of all jobs in a class is about the number of devices that earliest-deadline-first needs
    (Liu and Layland, 1973).
    """
    return work / max(min(deadline, LONGEST), alone, work)


def devices_wanted(rule: ScalingRule, load: float, jobs: int, *, minimum: int, count: int) -> int:
    """Devices for `jobs` with a total density of `load`; at least one if there are jobs, at most `count`."""
    needed = load / rule.target if isinstance(rule, Density) else jobs / rule.jobs
    least = max(minimum, 1 if jobs else 0)
    return min(count, max(least, math.ceil(needed - 1e-9)))


class Need:
    """When each further device of a class was last needed.

    A device is switched off when it was not needed for `keep_alive` seconds. As long as starting it again would cost is
    the ski-rental rule: at most twice the cost of knowing the future (Karlin et al., 1988).
    """

    def __init__(self, count: int, keep_alive: float) -> None:
        self.keep_alive = keep_alive
        self._last = [-math.inf] * count

    def note(self, devices: int, now: float) -> None:
        """Record that `devices` devices are needed now."""
        for rank in range(devices):
            self._last[rank] = now

    def kept(self, powered: int, now: float) -> int:
        """How many of the `powered` devices stay on."""
        while powered and now > self._last[powered - 1] and now - self._last[powered - 1] >= self.keep_alive:
            powered -= 1
        return powered

    def forget(self) -> None:
        """No device is needed any more."""
        self._last = [-math.inf] * len(self._last)
