"""The election, and what a duty of the leader is."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from broker.valkey.processes import Leadership
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

LEADER_LEASE = 1.5
"""Lease duration, in ticks of the rebalancer."""

RENEW_EVERY = 0.5
"""Ticks between two campaigns, also of routers that do not lead: another router leads within two ticks."""


class Duty(ABC):
    """Work that only the leader does: a tick, then a pause of `pause` seconds, which `wake` ends."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self._woken = asyncio.Event()

    @abstractmethod
    async def tick(self) -> None:
        """Do once what is due. May raise `BrokerUnavailableError`, which the consuming loop reports."""

    def begin(self) -> None:
        """This router was elected."""
        self.wake()

    def wake(self) -> None:
        """End the pause."""
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
        """End `run` after the ticks in progress."""
        self._leaving = True
        for duty in self._duties:
            duty.wake()

    async def close(self) -> None:
        """Disconnect."""
        await self._leadership.close()

    async def run(self) -> None:
        """Campaign and run the duties until `leave`; nothing is done while the broker is unavailable."""
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
            await asyncio.sleep(RENEW_EVERY * self._tick)

    async def _perform(self, duty: Duty) -> None:
        while not self._leaving:
            if self._leadership.token:
                try:
                    await duty.tick()
                except BrokerUnavailableError as error:
                    logger.debug("duty undone", extra={"duty": type(duty).__name__, "error": error.message})
            await duty.rest()
