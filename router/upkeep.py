"""What one router does for the fleet while it leads: duties, each with its own tick, and one election for all.

The duties are moving, releasing, retargeting, housekeeping and recording the history. Every router does the following
itself:

- ending jobs at their deadline: waiters are notified within `DEADLINE_TICK`, even while no router leads, and the
router that placed a job knows its deadline; taking a group of jobs in the store is exclusive anyway;
- having the append-only file rewritten (`store.AppendOnlyFile`): a store that cannot write cannot elect a leader;
- returning what was in flight under an ended session: each router checks when it renews its own session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

import msgspec
from kombu.exceptions import KombuError

from broker.port import Transport
from broker.valkey.leader import Leadership
from broker.valkey.records import Ending, Overdue, exceeded
from router.decide.retarget import Conditions, Retarget, retarget
from router.service.admission import Rules
from router.service.decision import misdirected
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from router.view import model_list
from tasks.celery_app import make_app
from tasks.settings import Settings
from tasks.topology import Topology
from taxiway.contract.job import JobState, failure_meta
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

LEASE = 1.5
"""Lease duration, in ticks of the rebalancer."""

RENEW = 0.5
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
            await asyncio.sleep(RENEW * self._tick)

    async def _perform(self, duty: Duty) -> None:
        while not self._leaving:
            if self._leadership.token:
                try:
                    await duty.tick()
                except BrokerUnavailableError as error:
                    logger.debug("duty undone", extra={"duty": type(duty).__name__, "error": error.message})
            await duty.rest()


HOUSEKEEPING_TICK = 1.0
"""Seconds between two ticks."""

PUBLISH = 30.0
"""Seconds after which the model list is published again; within `HOUSEKEEPING_TICK` if it has changed."""


class Housekeeping(Duty):
    """Publishes the models, ends requests sent to Celery's default queue, and removes expired jobs from the index."""

    def __init__(self, transport: Transport, store: Store, fleet: FleetReader, rules: Rules) -> None:
        super().__init__(HOUSEKEEPING_TICK)
        self._transport = transport
        self._store = store
        self._fleet = fleet
        self._rules = rules
        self._published = b"", 0.0  # what the fleet can run, and when that was published

    async def tick(self) -> None:
        """Do each once."""
        await self._publish_models()
        await self._end_astray()
        await self._store.forget_listed()

    async def _publish_models(self) -> None:
        """Publish the content of `GET /v2/models` to clients of the broker, when it has changed or needs renewal."""
        listed, now = msgspec.json.encode(model_list(self._rules.catalogue, self._fleet.snapshot)), time.monotonic()
        published, at = self._published
        if published != listed or now - at > PUBLISH:
            await self._store.publish_models(listed)
            self._published = listed, now

    async def _end_astray(self) -> None:
        """End requests sent by plain Celery to its default queue, which has no consumer, with an error that says so."""
        astray = await self._transport.astray()
        if astray:
            await self._store.finish([ending for arrival in astray if (ending := misdirected(arrival)) is not None])
            await self._transport.forget(astray)
            logger.warning("requests sent to Celery's default queue", extra={"messages": len(astray)})


class Retargeter(Duty):
    """Asks workers to serve other classes. Their heartbeats show the effect."""

    def __init__(self, settings: Settings, topology: Topology, fleet: FleetReader, store: Store) -> None:
        super().__init__(topology.rebalance.tick)
        self._fleet = fleet
        self._store = store
        self._app = make_app(settings, topology)
        self._topology = topology
        self._conditions = Conditions()

    def begin(self) -> None:
        """Conditions observed before another router led are superseded."""
        self._conditions = Conditions()
        super().begin()

    async def tick(self) -> None:
        """Evaluate the fleet, and send workers the resulting commands."""
        fleet, now = self._fleet.working.fleet, self._store.now()
        if fleet.stale:
            return
        self._conditions.observe(fleet, self._topology, now)
        decided = retarget(fleet, self._topology, self._conditions, now)
        if decided:
            self._conditions.note(decided, now)
            await asyncio.to_thread(self._command, decided)
        for one in decided:
            logger.info("retargeted", extra=asdict(one))

    def _command(self, decided: Sequence[Retarget]) -> None:
        connection = self._app.connection_for_write()
        lost: tuple[type[BaseException], ...] = (KombuError, OSError, *connection.connection_errors)
        try:
            with connection:
                for one in decided:
                    self._app.control.broadcast(
                        one.action.value,
                        arguments={"queue": one.hardware_class},
                        destination=[one.worker],
                        connection=connection,
                    )
        except lost as error:
            raise BrokerUnavailableError(f"the broker did not accept a worker command: {error}") from error


DEADLINE_TICK = 0.05
"""Shortest pause between two checks, in seconds: waiters are notified at most this, plus a round trip, late."""

LONGEST = 0.5
"""Longest pause in seconds: a router that knew of an earlier deadline may have died."""

AT_ONCE = 4
"""Groups of jobs, of up to `TAKE_AT_MOST`, that one check takes, so that no script blocks the store for long."""

ENDING_LEASE = 1.0
"""Seconds after which another router ends jobs that were taken and not ended: their router may have died."""


class Deadlines:
    """Ends jobs past their deadline by the store's clock. It checks when the first known deadline passes."""

    def __init__(self, store: Store) -> None:
        self._store = store
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
                while await self.fire() == AT_ONCE:
                    pass
            await asyncio.sleep(DEADLINE_TICK)
            await self._wait()

    async def fire(self) -> int:
        """End the jobs in the groups that are due; returns the number of groups."""
        self._next = self._store.now() + LONGEST
        groups, overdue, due = await self._store.overdue(AT_ONCE, ENDING_LEASE)
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
