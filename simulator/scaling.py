"""The one scaling rule of all policies: how many devices of a class are on."""

from __future__ import annotations

import math

TARGET = 0.65
"""Target utilisation of devices (DESIGN §7: 0.6–0.7 where live work runs)."""

LONGEST = 3600.0
"""Seconds within which work without a deadline must be done."""


def density(work: float, deadline: float, alone: float) -> float:
    """Devices that one job occupies until it is due: its device seconds over the seconds available.

    The sum of the densities of all jobs in a class is about the number of devices that earliest-deadline-first needs
    (Liu and Layland, 1973).
    """
    return work / max(min(deadline, LONGEST), alone, work)


def wanted(load: float, jobs: int, *, minimum: int, count: int) -> int:
    """Devices that should be on for jobs with a total density of `load`; at least one if there are jobs."""
    least = max(minimum, 1 if jobs else 0)
    return min(count, max(least, math.ceil(load / TARGET - 1e-9)))


class Need:
    """When each further device of a class was last needed.

    A device is switched off when it was not needed for as long as starting it again would cost: the ski-rental rule, at
    most twice the cost of knowing the future (Karlin et al., 1988). Both costs are seconds at the same price.
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
        while powered and now - self._last[powered - 1] >= self.keep_alive:
            powered -= 1
        return powered
