"""What one router does for the fleet while it leads: duties, each with a tick of its own, and one election for all.

Duties are to move, to release, to retarget, and the housekeeping. Not among them, on every router:

- ending jobs at their deadline: who waits hears of it within `deadlines.TICK`, also while no router leads, and the
  router that placed a job knows the moment; taking a group of jobs in the store is exclusive by itself;
- having the append-only file rewritten (`service.aof`): a store that could not write cannot have been asked for a lead;
- putting back what was in flight under a session that ended: each router looks as it shows that its own lives.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from broker.valkey.leadership import Leadership
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

LEASE = 1.5
"""Ticks of the rebalancer that a lease lasts."""

RENEW = 0.5
"""Ticks between two votes, also of who waits for the lead: another router leads within two ticks."""


class Duty(ABC):
    """Work of the leader alone: a tick, then a rest of `pause` seconds, which `wake` ends."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self._woken = asyncio.Event()

    @abstractmethod
    async def tick(self) -> None:
        """Do once what is due. May raise `BrokerUnavailableError`: the consuming loop reports it."""

    def begin(self) -> None:
        """This router was elected."""
        self.wake()

    def wake(self) -> None:
        """End the rest."""
        self._woken.set()

    async def rest(self) -> None:
        """Wait until the next tick is due."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pause):
                await self._woken.wait()
        self._woken.clear()


class Leader:
    """Runs the duties while this router leads; `tick` is the rebalancer's."""

    def __init__(self, leadership: Leadership, duties: Sequence[Duty], tick: float) -> None:
        self._leadership = leadership
        self._duties = duties
        self._tick = tick
        self._leaving = False

    def leave(self) -> None:
        """End `run` after the ticks under way."""
        self._leaving = True
        for duty in self._duties:
            duty.wake()

    async def run(self) -> None:
        """Stand for election and do the duties until `leave`; while the broker is away nothing is done."""
        try:
            async with asyncio.TaskGroup() as group:
                election = group.create_task(self._stand())
                await asyncio.wait([group.create_task(self._perform(duty)) for duty in self._duties])
                election.cancel()
        finally:
            await self._leadership.resign()

    async def _stand(self) -> None:
        token = ""
        while True:
            before = token
            with suppress(BrokerUnavailableError):
                token = await self._leadership.campaign()
            if token and token != before:
                for duty in self._duties:
                    duty.begin()
            await asyncio.sleep(RENEW * self._tick)

    async def _perform(self, duty: Duty) -> None:
        while not self._leaving:
            if self._leadership.token:
                try:
                    await duty.tick()
                except BrokerUnavailableError as error:
                    logger.debug("duty undone", extra={"duty": type(duty).__name__, "error": error.message})
            await duty.rest()
