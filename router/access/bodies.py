"""How much memory request bodies use in a router. Pure, except for its counters."""

from __future__ import annotations

from collections import defaultdict

from tasks.topology import Topology
from taxiway.errors import FleetUnavailable, RateLimitedError

AGAIN = 1.0
"""Seconds after which a refused request may be retried: small bodies go sooner, large ones take longer to send."""


class Bodies:
    """The bytes of each tenant's bodies: those received, and those declared and not yet received."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._held: defaultdict[str, int] = defaultdict(int)
        self._all = 0

    def take(self, tenant: str, size: int) -> None:
        """Count `size` more bytes of `tenant`; every call that returns needs a `give_back`.

        Raises:
            RateLimitedError: the tenant's bodies would exceed `bodies`.
            FleetUnavailable: all bodies would exceed `all_bodies`.
        """
        rules, limits = self._topology.tenants.get(tenant), self._topology.limits
        most = limits.bodies if rules is None or rules.bodies is None else rules.bodies
        held = self._held.get(tenant, 0)
        if held + size > most:
            message = f"tenant {tenant!r} has {held} bytes of request bodies in progress (limit {most}, bodies)"
            raise RateLimitedError(f"{message}; this one has {size}", tenant=tenant, retry_after=AGAIN)
        if self._all + size > limits.all_bodies:
            message = (
                f"the router has {self._all} bytes of request bodies in progress "
                f"(limit {limits.all_bodies}, all_bodies)"
            )
            raise FleetUnavailable(f"{message}; this one has {size}", retry_after=AGAIN)
        self._held[tenant] += size
        self._all += size

    def give_back(self, tenant: str, size: int) -> None:
        """Stop counting them."""
        self._all -= size
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]
