"""Which loaded variants are unloaded to free memory. Pure: sizes, uses and the time are arguments.

The least valuable variants are unloaded. A variant's value is its load time, times its use rate, per byte it holds.
Patient rows displace what urgent rows use only now and then: each time it is loaded again for the next urgent row.

Source: Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy (HP Laboratories,
1998), with decaying use rates in place of its ageing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FADE = 300.0
"""Seconds after which a use counts 1/e: tens of times the longest load, so a pause between bursts causes no reload."""

DISPLACING = 0.1
"""Share of a device's time for loads on behalf of patient rows that displace what urgent rows use."""


class NoRoomError(Exception):
    """A variant needs more memory than the device may use, even with nothing else on it."""


class InUseError(Exception):
    """The memory that a variant needs is held by variants in use; it can be loaded once they are free."""


@dataclass(frozen=True, slots=True)
class Uses:
    """A use rate: `rate` per second as of the last use, at time `last`."""

    rate: float = 0.0
    last: float = 0.0

    def at(self, now: float) -> float:
        """Uses per second now."""
        return self.rate * math.exp(min(0.0, self.last - now) / FADE)

    def once_more(self, now: float) -> Uses:
        """The same with one more use now."""
        return Uses(self.at(now) + 1 / FADE, now)


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded variant: bytes it holds, its uses, and the seconds that loading it takes."""

    variant: str
    memory: int
    uses: Uses
    load: float
    in_use: bool = False
    urgent: bool = False
    """Urgent rows have run on it since it was loaded."""

    def value(self, now: float) -> float:
        """Load seconds saved per second and byte."""
        return self.uses.at(now) * self.load / self.memory if self.memory else math.inf


def evict(loaded: Sequence[Resident], need: int, budget: int, now: float, *, sparing: bool = False) -> list[Resident]:
    """The variants to unload so that `need` more bytes fit into `budget`: the least valuable first, none in use.

    `sparing` keeps those that urgent rows use as if they were in use.

    Raises:
        NoRoomError: `need` alone is over the budget.
        InUseError: it does not fit next to the variants in use.
    """
    if need > budget:
        raise NoRoomError(f"needs {need} bytes, the device has {budget} for models")
    idle = [resident for resident in loaded if not (resident.in_use or (sparing and resident.urgent))]
    kept = sum(resident.memory for resident in loaded) - sum(resident.memory for resident in idle)
    if kept + need > budget:
        raise InUseError(f"needs {need} bytes, of {budget} for models {kept} are in use")
    used = sum(resident.memory for resident in loaded)
    leaving: list[Resident] = []
    for resident in sorted(idle, key=lambda r: (r.value(now), r.uses.last, r.variant)):
        if used + need <= budget:
            break
        leaving.append(resident)
        used -= resident.memory
    return leaving


def spared_for(load: float, displaced: Sequence[Resident]) -> float:
    """Seconds for which patient rows displace nothing more that urgent rows use, after a load that did."""
    again = sum(resident.load for resident in displaced if resident.urgent)
    return (load + again) / DISPLACING if again else 0.0
