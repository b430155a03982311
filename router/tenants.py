"""What is known of tenants at one reading: how long answers to them are, and what they spent today. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from router.classify import Allowance
from tasks.lengths import Lengths, read_lengths
from tasks.topology import Topology
from taxiway.keys import lengths_cell

_DAY = 86_400.0  # seconds


def day_of(now: float) -> str:
    """The date, in UTC, of `now` by the store's clock."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


class Tenants:
    """What the store knew of tenants when it was read; spending grows as this router places more.

    Args:
        lengths: how long answers were, as the store keeps it, by `keys.lengths_cell`.
        day: the date that `spent` is of.
        spent: US dollars by tenant.
    """

    def __init__(
        self, lengths: Mapping[str, bytes] | None = None, day: str = "", spent: Mapping[str, float] | None = None
    ) -> None:
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
