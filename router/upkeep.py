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
from typing import Any

import msgspec
from kombu.exceptions import KombuError

from broker.port import Transport, beside
from broker.valkey.leader import Leadership
from broker.valkey.records import Ending, Overdue, exceeded, observe_answer, observe_call
from router.decide.history import (
    JOB,
    SETTLE,
    SLICE,
    Arrivals,
    again_at,
    arrivals_of,
    fresh_slices,
    hour_of,
    joined,
    pack,
    surplus_hours,
    unpack,
)
from router.decide.retarget import Conditions, Retarget, retarget
from router.service.admission import Rules
from router.service.decision import misdirected
from router.service.snapshot_reader import FleetReader
from router.service.store import Store, named
from router.view import model_list
from tasks.celery_app import make_app
from tasks.settings import Settings
from tasks.topology import Limits, Topology
from taxiway.connection import AsyncConnection
from taxiway.contract.job import JobState, failure_meta
from taxiway.contract.keys import HISTORY, HISTORY_OPEN, RECORDED, history_key
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey import Command, fleet_errors

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
        rules, now = self._rules, time.monotonic()
        listed = msgspec.json.encode(model_list(rules.catalogue, self._fleet.snapshot, rules.unloaded))
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


_SERVER = "state store"
_CATCH_UP = 3600.0  # seconds that a new leader observes at least, even where records are kept for less
_AT_ONCE = 4  # slices of each kind observed in one tick


class Recorder(Duty):
    """Observes each slice of arrivals once it is over, and again while some of its jobs have not ended.

    Where it is and what is left to do is in the state store: the next leader goes on from there.
    """

    def __init__(self, url: str, store: Store, limits: Limits) -> None:
        super().__init__(SETTLE)
        self._connection = AsyncConnection(url)
        self._store = store
        self._limits = limits

    async def tick(self) -> None:
        """Observe the slices that are due, and delete the oldest hours beyond the limits."""
        now = self._store.stored_now()
        until, again = await self._ask(
            ("HGET", HISTORY, RECORDED), ("ZRANGEBYSCORE", HISTORY_OPEN, "-inf", now, "LIMIT", 0, _AT_ONCE)
        )
        known = None if until is None else float(until)
        fresh = fresh_slices(known, now, longest=max(self._limits.keep_record, _CATCH_UP), most=_AT_ONCE)
        if known is None:
            await self._ask(("HSET", HISTORY, RECORDED, now))
        for begin in fresh:
            await self._record(begin, now)
        for begin in map(int, again):
            await self._renew(begin, now)
        if fresh:
            await self._trim(now)
        if _AT_ONCE in (len(fresh), len(again)):
            self.wake()

    async def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def _record(self, begin: int, now: float) -> None:
        await self._write(begin, await self._observe(begin), now, before=0)
        await self._ask(("HSET", HISTORY, RECORDED, begin + SLICE))

    async def _renew(self, begin: int, now: float) -> None:
        """Observe a slice again, unless it was deleted, or some of its records have expired since."""
        (packed,) = await self._ask(("HGET", history_key(hour_of(begin)), begin))
        stored = None if packed is None else await beside(len(packed), unpack, begin, bytes(packed))
        arrivals = await self._observe(begin)
        if stored is None or len(arrivals) < len(stored):
            await self._ask(("ZREM", HISTORY_OPEN, begin))
        else:
            await self._write(begin, arrivals, now, before=len(packed))

    async def _observe(self, begin: int) -> Arrivals:
        parts, skip = list[Arrivals](), 0
        while True:
            with fleet_errors(_SERVER):
                observed = observe_answer(await self._connection.run(observe_call(begin, begin + SLICE, skip)))
            if not observed.looked:
                return await beside(JOB.itemsize * sum(len(part) for part in parts), joined, parts)
            parts.append(arrivals_of(observed))
            skip += observed.looked

    async def _write(self, begin: int, arrivals: Arrivals, now: float, *, before: int) -> None:
        packed = await beside(JOB.itemsize * len(arrivals), pack, begin, arrivals)
        hour, at = hour_of(begin), again_at(begin, arrivals, now)
        await self._ask(
            ("HSET", history_key(hour), begin, packed),
            ("EXPIREAT", history_key(hour), int(begin) + self._limits.keep_history + 3600),
            ("HINCRBY", HISTORY, hour, len(packed) - before),
            ("ZREM", HISTORY_OPEN, begin) if at is None else ("ZADD", HISTORY_OPEN, at, begin),
        )

    async def _trim(self, now: float) -> None:
        (flat,) = await self._ask(("HGETALL", HISTORY))
        hours = {hour: int(size) for hour, size in named(flat).items() if hour != RECORDED}
        deleted = surplus_hours(hours, now, keep=self._limits.keep_history, most=self._limits.history)
        if deleted:
            await self._ask(("UNLINK", *map(history_key, deleted)), ("HDEL", HISTORY, *deleted))
            logger.debug("history deleted", extra={"hours": len(deleted), "oldest": deleted[0]})

    async def _ask(self, *commands: Command) -> list[Any]:
        with fleet_errors(_SERVER):
            return await self._connection.transaction(*commands)
