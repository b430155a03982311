"""Which loaded variants make room for another. Pure: sizes and times of use are arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class NoRoomError(Exception):
    """A variant needs more memory than the device may use, even with nothing else on it."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded variant: bytes it holds, and when it last ran, in seconds."""

    variant: str
    memory: int
    last_used: float


def evict(loaded: Sequence[Resident], need: int, budget: int) -> list[str]:
    """The variants to unload so that `need` more bytes fit into `budget`; least recently used first.

    Raises:
        NoRoomError: `need` alone is over the budget.
    """
    if need > budget:
        raise NoRoomError(f"needs {need} bytes, the device has {budget} for models")
    used = sum(resident.memory for resident in loaded)
    leaving: list[str] = []
    for resident in sorted(loaded, key=lambda r: (r.last_used, r.variant)):
        if used + need <= budget:
            break
        leaving.append(resident.variant)
        used -= resident.memory
    return leaving
