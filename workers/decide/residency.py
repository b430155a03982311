"""Which loaded variants are unloaded for another. Pure: sizes, uses and the time are arguments.

The least valuable leave: a variant is worth the seconds that loading it again takes, times how often it is used, a byte
that it holds. Source: Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy (HP
Laboratories, 1998), whose ageing is here that uses fade.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FADE = 300.0
"""Seconds after which a use counts 1/e: some tens of the longest loads, so a pause between bursts costs no reload."""


class NoRoomError(Exception):
    """A variant needs more memory than the device may use, even with nothing else on it."""


class InUseError(Exception):
    """A variant needs memory that is held by others which are in use: it may be loaded once they are not."""


@dataclass(frozen=True, slots=True)
class Uses:
    """How often something is used: `rate` a second as of the last use, which was at `last`, in seconds."""

    rate: float = 0.0
    last: float = 0.0

    def at(self, now: float) -> float:
        """Uses a second, as of now."""
        return self.rate * math.exp(min(0.0, self.last - now) / FADE)

    def once_more(self, now: float) -> Uses:
        """With a use now."""
        return Uses(self.at(now) + 1 / FADE, now)


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded variant: bytes it holds, its uses, and the seconds that loading it takes."""

    variant: str
    memory: int
    uses: Uses
    load: float
    in_use: bool = False

    def value(self, now: float) -> float:
        """Seconds of loading that a byte of it saves in a second."""
        return self.uses.at(now) * self.load / self.memory if self.memory else math.inf


def evict(loaded: Sequence[Resident], need: int, budget: int, now: float) -> list[str]:
    """The variants to unload so that `need` more bytes fit into `budget`: the least valuable first, none in use.

    Raises:
        NoRoomError: `need` alone is over the budget.
        InUseError: it does not fit beside those in use.
    """
    if need > budget:
        raise NoRoomError(f"needs {need} bytes, the device has {budget} for models")
    kept = sum(resident.memory for resident in loaded if resident.in_use)
    if kept + need > budget:
        raise InUseError(f"needs {need} bytes, of {budget} for models {kept} are in use")
    used = sum(resident.memory for resident in loaded)
    leaving: list[str] = []
    idle = (resident for resident in loaded if not resident.in_use)
    for resident in sorted(idle, key=lambda r: (r.value(now), r.uses.last, r.variant)):
        if used + need <= budget:
            break
        leaving.append(resident.variant)
        used -= resident.memory
    return leaving
