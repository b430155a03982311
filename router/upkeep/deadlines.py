"""The loop that ends jobs at their deadline, whoever has them: any router does it, also where no worker lives."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from broker.valkey.deadlines import Overdue, exceeded
from broker.valkey.endings import Ending
from router.service.store import Store
from taxiway.contract.job import JobState, failure_meta
from taxiway.errors import BrokerUnavailableError

TICK = 0.05
"""Shortest pause between two looks, in seconds: who waits hears so much, and a round trip, late at most."""

LONGEST = 0.5
"""Longest pause: a router may have died that expected something sooner."""

AT_ONCE = 4
"""Groups of jobs, of up to `TAKE_AT_MOST`, that one look takes, so that no script blocks the store for long."""

LEASE = 1.0
"""Seconds after which another router ends what one took and did not end: it may have died."""


class Deadlines:
    """Ends what is past its deadline, by the store's clock. It looks when the first that it knows of passes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next = 0.0
        self._sooner = asyncio.Event()

    def expect(self, at: float) -> None:
        """Know of a deadline; 0 is none."""
        if 0 < at < self._next:
            self._next = at
            self._sooner.set()

    async def run(self) -> None:
        """Look indefinitely; an outage is the others' to report."""
        while True:
            with suppress(BrokerUnavailableError):
                while await self.fire() == AT_ONCE:
                    pass
            await asyncio.sleep(TICK)
            await self._wait()

    async def fire(self) -> int:
        """End the jobs of the groups first due; how many groups were."""
        self._next = self._store.now() + LONGEST
        groups, overdue, due = await self._store.overdue(AT_ONCE, LEASE)
        self.expect(due)
        if overdue:
            await self._store.finish([_expired(one) for one in overdue])
        return groups

    async def _wait(self) -> None:
        while (left := self._next - self._store.now()) > 0:
            self._sooner.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._sooner.wait(), left)


def _expired(overdue: Overdue) -> Ending:
    meta = failure_meta(overdue.job, exceeded(overdue.course))
    return Ending(overdue.job, JobState.EXPIRED, meta, reply=overdue.reply)
