"""Per-tenant facts: answer lengths, today's spending and recent usage. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from router.decide.classify import Allowance
from tasks.models.lengths import Lengths, read_lengths
from tasks.topology import Tenant, Topology
from taxiway.contract.keys import lengths_cell

MEMORY = 10.0
"""Time constant, in seconds, of the decay of a tenant's usage: short bursts do not put a tenant over its share."""

_DAY = 86_400.0  # seconds
_SMOOTHING = 0.2  # exponential smoothing of the release interval
_FORGOTTEN = 1e-4  # share of the highest usage


def day_of(now: float) -> str:
    """The UTC date of `now`, by the store's clock."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


class Shares:
    """Virtual time of each recently active tenant: US dollars of device time bound for it, over its weight.

    A tenant above the mean is *over its fair share*: while queues are long, its requests are held (`capacity`), and all
    others bypass them. A tenant that is alone never is. Credit is limited to `CREDIT`; otherwise a tenant with low
    usage could fill the queues before it is over its fair share. Each router counts only what it binds itself, which is
    a fair sample of the fleet.
    """

    CREDIT = 0.02
    """The most that a tenant may be below the mean when it is charged, as a share of the mean."""

    MIN_WORK = 0.04
    """Seconds of work that keep a device busy between two releases from holding: two intervals' worth."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._usage: dict[str, float] = {}
        self._total = 0.0
        self._work_limit = self.MIN_WORK

    def record_interval(self, seconds: float) -> None:
        """Record the time since the last release from holding: the longer it is, the more work is bound."""
        self._work_limit += _SMOOTHING * (max(2 * seconds, self.MIN_WORK) - self._work_limit)

    def work_limit(self, tenant: str) -> float | None:
        """Seconds of work that may be bound ahead of a request of a tenant over its fair share; None for any other."""
        return self._work_limit if self.over_fair_share(tenant) else None

    def charge(self, tenant: str, dollars: float) -> None:
        """Count what is bound for a tenant."""
        before = self._usage.get(tenant, 0.0)
        least = (1 - self.CREDIT) * self._total / max(len(self._usage), 1)
        self._usage[tenant] = max(before, least) + dollars / self._weights.get(tenant, 1.0)
        self._total += self._usage[tenant] - before

    def decay(self, seconds: float) -> None:
        """Decay all usage by elapsed time; inactive tenants are forgotten."""
        kept, most = math.exp(-seconds / MEMORY), max(self._usage.values(), default=0.0)
        self._usage = {name: kept * had for name, had in self._usage.items() if had > _FORGOTTEN * most}
        self._total = sum(self._usage.values())

    def over_fair_share(self, tenant: str) -> bool:
        """Whether the tenant's usage is above the mean of the active tenants."""
        return self._usage.get(tenant, 0.0) * len(self._usage) > self._total * (1 + 1e-9)

    def bypasses_holding(self, tenant: str) -> bool:
        """Whether the tenant's requests bypass held jobs: others are active, and it is not over its fair share."""
        return len(self._usage) > (tenant in self._usage) and not self.over_fair_share(tenant)


class Tenants:
    """The store's facts about tenants at the last read; spending grows as this router places more.

    Args:
        lengths: answer lengths as stored, by `keys.lengths_cell`.
        day: the date of `spent`.
        spent: US dollars by tenant.
        shares: each tenant's recent usage; it outlives the snapshot.
    """

    def __init__(
        self,
        lengths: Mapping[str, bytes] | None = None,
        day: str = "",
        spent: Mapping[str, float] | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.shares = shares or Shares({})
        self._lengths = lengths or {}
        self._day = day
        self._spent = dict(spent or {})

    def lengths(self, model: str, tenant: str) -> Lengths:
        """Recent lengths of `model`'s answers to the tenant; empty if none are stored."""
        raw = self._lengths.get(lengths_cell(model, tenant))
        return read_lengths(raw) if raw is not None else {}

    def allowance(self, tenant: str, topology: Topology, now: float) -> Allowance | None:
        """What the tenant may still spend today; None if unbounded."""
        rules = topology.tenants.get(tenant)
        if rules is None or rules.usd_per_day is None:
            return None
        day = day_of(now)
        spent = self._spent.get(tenant, 0.0) if day == self._day else 0.0
        return Allowance(tenant, day, rules.usd_per_day, rules.usd_per_day - spent, _DAY - now % _DAY)

    def spend(self, allowance: Allowance, dollars: float) -> None:
        """Count the cost of a placement under the allowance."""
        if allowance.day == self._day:
            self._spent[allowance.tenant] = self._spent.get(allowance.tenant, 0.0) + dollars
