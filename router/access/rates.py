"""Request rate limits per tenant. Pure, except for its counters."""

from __future__ import annotations

from tasks.topology import Topology

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
