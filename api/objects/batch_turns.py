"""Which batches a router works on, and which of their lines may begin: in turn, by tenant. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

TURN_SECONDS = 30.0
"""Seconds after which a batch gives way to that of a tenant that has as few."""


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that this router works on, or may work on."""

    name: str
    tenant: str
    working: bool
    since: float  # when it began to, or to wait; seconds
    loses: bool = False  # whether it would have to begin again what it does now


def next_batches(batches: Sequence[OpenBatch], now: float, most: int) -> list[str]:
    """The names of up to `most` batches to work on; `batches` are all, oldest first.

    Each tenant has one before another has two. Of tenants with as many, those go on that had less than a turn, and then
    come those that waited longest. A tenant's own batches do not take turns: the oldest ends first.
    """
    places = Counter[str]()
    ranked = list[tuple[int, int, float, int, str]]()
    for one in sorted(batches, key=lambda one: (not one.working, one.since if one.working else 0.0)):
        tired = one.working and not one.loses and now - one.since >= TURN_SECONDS
        ranked.append((places[one.tenant], 2 if tired else int(not one.working), one.since, len(ranked), one.name))
        places[one.tenant] += 1
    return [name for *_, name in sorted(ranked)[:most]]


class LineWindow:
    """Bytes of the lines that run at a router, and of answers that are not written yet, by tenant.

    Tenants share `most` of them; a tenant that holds none may begin one line, however long.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = Counter[str]()
        self.tenants = 1  # that have batches which are worked on

    def fits(self, tenant: str, size: int) -> bool:
        """Whether a line of `size` bytes may begin."""
        held = self._held[tenant]
        return held <= 0 or held + size <= self._most // max(self.tenants, 1)

    def add(self, tenant: str, size: int) -> None:
        """Count `size` more bytes, or fewer if it is negative."""
        self._held[tenant] += size
        if not self._held[tenant]:
            del self._held[tenant]
