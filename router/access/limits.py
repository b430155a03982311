"""Limits per tenant at one router: requests per second, and memory for request bodies. Pure, except for counters."""

from __future__ import annotations

from collections import defaultdict

from tasks.topology import Topology
from taxiway.errors import FleetUnavailable, RateLimitedError

BURST = 2.0
"""Seconds' worth of requests that may arrive at once after a pause."""

_ROUNDING = 1e-6  # seconds: tolerance for rounding in sums of times


def spend(full_at: float, now: float, rate: float) -> tuple[float, float]:
    """Take one request out of a token bucket that fills at `rate` per second and holds `BURST` seconds' worth.

    The bucket is one number, the time at which it is full again.

    Returns:
        The number after the request, and 0; or the unchanged number, and the seconds until a request may be taken.

    Source: the generic cell rate algorithm, ITU-T I.371 annex A.
    """
    after = max(full_at, now) + 1 / rate
    wait = after - now - max(BURST, 1 / rate)
    return (full_at, wait) if wait > _ROUNDING else (after, 0.0)


class Rates:
    """Each tenant's token bucket."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._full_at: dict[str, float] = {}

    def wait(self, tenant: str, now: float) -> float:
        """Count a request of `tenant`. Returns 0, or the seconds after which it may retry."""
        full_at, wait = spend(self._full_at.get(tenant, 0.0), now, self.limit(tenant))
        self._full_at[tenant] = full_at
        return wait

    def limit(self, tenant: str) -> float:
        """Requests per second that `tenant` may make at this router."""
        rules = self._topology.tenants.get(tenant)
        own = rules.requests_per_second if rules is not None else None
        return own or self._topology.limits.requests_per_second


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
