"""Whose turn it is to leave holding: by deadline within a tenant, by weighted fair virtual time between them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from broker.valkey.holding import Line
from router.decide.classify import Constraints
from tasks.topology import Tenant


class HeldKind(msgspec.Struct, frozen=True, array_like=True):
    """What the jobs of one holding queue have in common: tenant, model (`name:version`), and so the same candidates."""

    tenant: str
    model: str
    constraints: Constraints

    @property
    def queue(self) -> str:
        """The holding queue's name."""
        return _encode(self).decode()


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(HeldKind).decode


def kind_of(queue: str) -> HeldKind | None:
    """What a holding queue's name says; None where another release wrote it."""
    try:
        return _decode(queue)
    except msgspec.MsgspecError:
        return None


@dataclass(frozen=True, slots=True)
class Turn:
    """A holding queue that may be released from, and whose."""

    line: Line
    kind: HeldKind


class FairOrder:
    """Virtual time by tenant, in US dollars of device time over the tenant's weight.

    Who has had the least is next. A tenant that comes (again) begins where the one that has had least is: nobody saves
    up turns while nothing of theirs waits.
    """

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._had: dict[str, float] = {}

    def meet(self, tenants: Iterable[str]) -> None:
        """These tenants have jobs in holding, no others."""
        present = set(tenants)
        floor = min((had for name, had in self._had.items() if name in present), default=0.0)
        self._had = {name: self._had.get(name, floor) for name in present}

    def next(self, turns: Iterable[Turn]) -> Turn:
        """Whose turn it is: the earliest deadline of the tenant that has had least."""
        return min(turns, key=lambda turn: (self._had[turn.kind.tenant], turn.line.due, turn.line.queue))

    def charge(self, tenant: str, dollars: float) -> None:
        """Count what a tenant's released jobs cost."""
        self._had[tenant] += dollars / self._weights.get(tenant, 1.0)
