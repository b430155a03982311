"""Which of several operators works: the holder of a Lease."""

from __future__ import annotations

import time

from controller.cluster import Cluster, ConflictError, Object

DURATION = 15
"""Seconds for which a Lease holds after it was renewed."""

RENEWAL = 5.0
"""Seconds between two renewals."""


class Leader:
    """Takes and keeps one Lease. Expiry is measured from when a renewal was seen, not by the holder's clock."""

    def __init__(self, cluster: Cluster, lease: str, name: str) -> None:
        self._cluster, self._lease, self._name = cluster, lease, name
        self._renewed = -RENEWAL
        self._held = False
        self._seen: tuple[Object | None, float] = (None, 0.0)

    async def leads(self) -> bool:
        """Take or keep the Lease, and whether it is ours."""
        now = time.monotonic()
        if self._held and now < self._renewed + RENEWAL:
            return True
        found = await self._cluster.lease(self._lease)
        spec = None if found is None else found["spec"]
        if spec != self._seen[0]:
            self._seen = (spec, now)
        self._held = False
        if spec is not None and spec["holderIdentity"] != self._name and now < self._seen[1] + DURATION:
            return False
        try:
            await self._cluster.write_lease(self._lease, self._name, DURATION, found)
        except ConflictError:
            return False
        self._held, self._renewed = True, now
        return True
