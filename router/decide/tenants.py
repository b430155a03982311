"""What is known of tenants: how long answers to them are, what they spent today, and what they had lately. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from router.decide.classify import Allowance
from tasks.models.lengths import Lengths, read_lengths
from tasks.topology import Tenant, Topology
from taxiway.contract.keys import lengths_cell

MEMORY = 10.0
"""Seconds within which what a tenant had fades: bursts of a few are nobody's flood."""

_DAY = 86_400.0  # seconds
_SMOOTHING = 0.2  # of the time between two looks
_FORGOTTEN = 1e-4  # of what the tenant had that had most


def day_of(now: float) -> str:
    """The date, in UTC, of `now` by the store's clock."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


class Shares:
    """Virtual time of each tenant that was here lately: US dollars of device time bound for it, over its weight.

    Who had more than the mean is *over its fair share*: when queues are long, its requests are held (`room`), and all
    others pass them. A tenant that is alone never does. Nobody saves up more than `CREDIT`: else who had little would
    fill the queues before it is over its fair share. Each router counts what it binds itself, a fair sample of what all
    do.
    """

    CREDIT = 0.02
    """The most that a tenant is behind when it is given something, as a share of the mean."""

    LEAST = 0.04
    """Seconds of work that keep a device busy from one look at what is held to the next: two looks' worth."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._had: dict[str, float] = {}
        self._total = 0.0
        self._brief = self.LEAST

    def looked(self, seconds: float) -> None:
        """What is held was looked at, and will be again after about as long: on a slow machine, more is bound."""
        self._brief += _SMOOTHING * (max(2 * seconds, self.LEAST) - self._brief)

    def brief(self, tenant: str) -> float | None:
        """Seconds of work that may be bound before the requests of a tenant over its fair share; None for any other."""
        return self._brief if self.over_fair_share(tenant) else None

    def charge(self, tenant: str, dollars: float) -> None:
        """Count what is bound for a tenant."""
        before = self._had.get(tenant, 0.0)
        least = (1 - self.CREDIT) * self._total / max(len(self._had), 1)
        self._had[tenant] = max(before, least) + dollars / self._weights.get(tenant, 1.0)
        self._total += self._had[tenant] - before

    def fade(self, seconds: float) -> None:
        """Let time pass; a tenant that has not been here for long is forgotten."""
        kept, most = math.exp(-seconds / MEMORY), max(self._had.values(), default=0.0)
        self._had = {name: kept * had for name, had in self._had.items() if had > _FORGOTTEN * most}
        self._total = sum(self._had.values())

    def over_fair_share(self, tenant: str) -> bool:
        """Whether the tenant had more than the mean of those who were here."""
        return self._had.get(tenant, 0.0) * len(self._had) > self._total * (1 + 1e-9)

    def passes(self, tenant: str) -> bool:
        """Whether the tenant's requests pass what is held: others were here, and it does not crowd."""
        return len(self._had) > (tenant in self._had) and not self.over_fair_share(tenant)


class Tenants:
    """What the store knew of tenants when it was read; spending grows as this router places more.

    Args:
        lengths: how long answers were, as the store keeps it, by `keys.lengths_cell`.
        day: the date that `spent` is of.
        spent: US dollars by tenant.
        shares: what each had lately; it outlives the reading.
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
        """How long `model`'s answers to the tenant were lately; empty where none is remembered."""
        raw = self._lengths.get(lengths_cell(model, tenant))
        return read_lengths(raw) if raw is not None else {}

    def allowance(self, tenant: str, topology: Topology, now: float) -> Allowance | None:
        """What the tenant may still spend today; None where nothing bounds it."""
        rules = topology.tenants.get(tenant)
        if rules is None or rules.usd_per_day is None:
            return None
        day = day_of(now)
        spent = self._spent.get(tenant, 0.0) if day == self._day else 0.0
        return Allowance(tenant, day, rules.usd_per_day, rules.usd_per_day - spent, _DAY - now % _DAY)

    def spend(self, allowance: Allowance, dollars: float) -> None:
        """Count what a placement under the allowance costs."""
        if allowance.day == self._day:
            self._spent[allowance.tenant] = self._spent.get(allowance.tenant, 0.0) + dollars
