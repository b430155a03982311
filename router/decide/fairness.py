"""Which held job is released next: by deadline within a tenant, by weighted fair virtual time between tenants. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from broker.valkey.forwarding import HoldingQueue
from router.decide.classify import Constraints
from tasks.topology import Tenant


class HeldKind(msgspec.Struct, frozen=True, array_like=True):
    """What the jobs of one holding queue have in common: tenant, model (`name:version`) and constraints.

    Their candidates are therefore the same.
    """

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
    """The kind that a holding queue's name encodes; None if another release wrote it."""
    try:
        return _decode(queue)
    except msgspec.MsgspecError:
        return None


@dataclass(frozen=True, slots=True)
class Releasable:
    """A holding queue that may be released from, and the kind of its jobs."""

    queue: HoldingQueue
    kind: HeldKind


class FairOrder:
    """Virtual time by tenant: US dollars of device time over the tenant's weight.

    The tenant with the least is next. A tenant that appears or returns starts at the lowest virtual time present, so no
    tenant accumulates credit while it has nothing waiting.
    """

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._virtual_time: dict[str, float] = {}

    def set_present(self, tenants: Iterable[str]) -> None:
        """Set the tenants that have held jobs; all others are forgotten."""
        present = set(tenants)
        floor = min((spent for name, spent in self._virtual_time.items() if name in present), default=0.0)
        self._virtual_time = {name: self._virtual_time.get(name, floor) for name in present}

    def next(self, ready: Iterable[Releasable]) -> Releasable:
        """The next queue to release from: the earliest deadline of the tenant with the least virtual time."""
        return min(ready, key=lambda one: (self._virtual_time[one.kind.tenant], one.queue.due, one.queue.name))

    def charge(self, tenant: str, dollars: float) -> None:
        """Add the cost of a tenant's released jobs to its virtual time."""
        self._virtual_time[tenant] += dollars / self._weights.get(tenant, 1.0)
