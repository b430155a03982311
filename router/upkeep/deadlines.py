"""Ends jobs at their deadline, wherever they are. Every router does this, not only the leader."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from broker.valkey.jobs import Ending, Overdue, exceeded
from broker.valkey.queues import ValkeyTransport
from router.service.celery_message import NOTHING_AFTER, After, after_failure
from router.service.events import end_all
from router.service.store import RouterStore
from taxiway.contract.job import JobState, failure_meta
from taxiway.contract.limits import ELEMENTS, LARGE
from taxiway.contract.wire import decode_envelope
from taxiway.errors import BrokerUnavailableError, InvalidRequestError

DEADLINE_TICK = 0.05
"""Shortest pause between two checks, in seconds: waiters are notified at most this, plus a round trip, late."""

LONGEST_PAUSE = 0.5
"""Longest pause in seconds: a router that knew of an earlier deadline may have died."""

GROUPS_A_CHECK = 4
"""Groups of jobs, of up to `TAKE_AT_MOST`, that one check takes, so that no script blocks the store for long."""

ENDING_LEASE = 1.0
"""Seconds after which another router ends jobs that were taken and not ended: their router may have died."""


class Deadlines:
    """Ends jobs past their deadline by the store's clock. It checks when the first known deadline passes."""

    def __init__(self, store: RouterStore, transport: ValkeyTransport) -> None:
        self._store = store
        self._transport = transport
        self._next = 0.0
        self._sooner = asyncio.Event()

    def expect(self, at: float) -> None:
        """Register a deadline; 0 means none."""
        if 0 < at < self._next:
            self._next = at
            self._sooner.set()

    async def run(self) -> None:
        """Check indefinitely; outages are logged by other loops."""
        while True:
            with suppress(BrokerUnavailableError):
                while await self.fire() == GROUPS_A_CHECK:
                    pass
            await asyncio.sleep(DEADLINE_TICK)
            await self._wait()

    async def fire(self) -> int:
        """End the jobs in the groups that are due; returns the number of groups."""
        self._next = self._store.clock.now() + LONGEST_PAUSE
        groups, overdue, due = await self._store.jobs.overdue(GROUPS_A_CHECK, ENDING_LEASE)
        self.expect(due)
        if overdue:
            await self._end(overdue)
        return groups

    async def _end(self, overdue: Sequence[Overdue]) -> None:
        """End jobs, and what was to follow those in holding: the workers that take the others' messages report it."""
        held = [one.job for one in overdue if one.course.held]
        messages = await self._store.holding.messages(held, LARGE) if held else {}
        ended = [_expired(one, messages.get(one.job)) for one in overdue]
        await end_all(self._store, self._transport, ended)

    async def _wait(self) -> None:
        while (left := self._next - self._store.clock.now()) > 0:
            self._sooner.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._sooner.wait(), left)


def _expired(overdue: Overdue, message: bytes | None) -> tuple[Ending, After]:
    """A job's end, and what follows it by its message."""
    error = exceeded(overdue.course)
    ending = Ending(overdue.job, JobState.EXPIRED, failure_meta(overdue.job, error), reply=overdue.reply)
    if message is not None:
        with suppress(InvalidRequestError):
            return ending, after_failure(decode_envelope(message), overdue.job, error, ELEMENTS)
    return ending, NOTHING_AFTER
