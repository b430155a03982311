"""How much memory the bodies of requests take that a router serves. Pure, but for what it remembers."""

from __future__ import annotations

from collections import defaultdict

from tasks.topology import Topology
from taxiway.errors import FleetUnavailable, RateLimitedError

AGAIN = 1.0
"""Seconds after which a refused request may be sent again: small bodies go sooner, large ones take longer to send."""


class Bodies:
    """The bytes of bodies of each tenant: those that came, and those that were declared and may come."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._held: defaultdict[str, int] = defaultdict(int)
        self._all = 0

    def take(self, tenant: str, size: int) -> None:
        """Count `size` more bytes of `tenant`; every call that returns needs a `give_back`.

        Raises:
            RateLimitedError: its bodies would take more than `bodies`.
            FleetUnavailable: all bodies would take more than `all_bodies`.
        """
        rules, limits = self._topology.tenants.get(tenant), self._topology.limits
        most = limits.bodies if rules is None or rules.bodies is None else rules.bodies
        held = self._held.get(tenant, 0)
        if held + size > most:
            message = f"the tenant {tenant!r} has {held} bytes of bodies under way, and may have {most} (bodies)"
            raise RateLimitedError(f"{message}: this has {size}", tenant=tenant, retry_after=AGAIN)
        if self._all + size > limits.all_bodies:
            message = (
                f"the router has {self._all} bytes of bodies under way, and takes {limits.all_bodies} (all_bodies)"
            )
            raise FleetUnavailable(f"{message}: this has {size}", retry_after=AGAIN)
        self._held[tenant] += size
        self._all += size

    def give_back(self, tenant: str, size: int) -> None:
        """Count them no more."""
        self._all -= size
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]
