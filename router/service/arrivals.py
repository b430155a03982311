"""The router's main loop: takes arrivals, decides each one and forwards them together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from broker.port import Arrival, DeadLetter, ForwardOutcome
from broker.valkey.queues import ValkeyTransport
from router.decide.fairness import over_depth
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import Order, Place, Rules
from router.service.decision import Cancel, Decision, End, GiveUp, decide_read, end_of, read, refuse, undecidable
from router.service.events import end_all
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from taxiway.backoff import Outage
from taxiway.contract.limits import values_beyond
from taxiway.contract.values import referred
from taxiway.contract.wire import Envelope
from taxiway.errors import FleetUnavailable, InvalidRequestError
from taxiway.running import beside

logger = logging.getLogger(__name__)

IDLE = 1.0
"""Longest wait of an idle router for an arrival before it checks again, in seconds."""


@dataclass(slots=True, eq=False)
class Intake:
    """Takes arrivals, decides each one and forwards them together."""

    transport: ValkeyTransport
    fleet: FleetReader
    store: RouterStore
    rules: Rules
    placed: Callable[[Place], None]
    """Called for each job that is placed."""
    refused: Callable[[Envelope, str, str], None]
    """Called with the message, job and error code of each refusal."""
    dead_lettered: int = 0
    _stopping: bool = False
    _idle: bool = False
    _running: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin; the task ends by itself, after its turn, once the intake retires."""
        self._running = asyncio.create_task(self._run(), name="consume")
        return self._running

    def retire(self) -> None:
        """Take no more arrivals, and finish those that were taken."""
        self._stopping = True
        if self._idle and self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        outage = Outage(logger, "server unavailable", server="state store")
        while not self._stopping:
            try:
                arrivals = await self.transport.take()
                if arrivals:
                    await self._handle(arrivals, self.store.clock.stored_now())
                else:
                    await self._pause()
                outage.over()
            except FleetUnavailable as error:
                self.transport.abandon()
                await asyncio.sleep(outage.pause(error))

    async def _pause(self) -> None:
        self._idle = True
        try:
            await self.transport.wait(IDLE)
        finally:
            self._idle = False

    async def _handle(self, arrivals: Sequence[Arrival], now: float) -> None:
        working = self.fleet.working
        found = [await self._read(arrival, now) for arrival in arrivals]
        decisions = [self._decide(one, arrival, working) for one, arrival in zip(found, arrivals, strict=True)]
        again = [isinstance(one, End) and (one.deviceless or one.crowded) for one in decisions]
        if any(again):
            tenants = {one.request.tenant for one in found if isinstance(one, Order)}
            deviceless = any(isinstance(one, End) and one.deviceless for one in decisions)
            await (self.fleet.read() if deviceless else self.fleet.read_depths(tenants))
            working = self.fleet.working
            drawn = zip(found, arrivals, decisions, again, strict=True)
            decisions = [self._decide(one, a, working) if retry else d for one, a, d, retry in drawn]
        trios = zip(arrivals, found, decisions, strict=True)
        placed = [(a, one, d) for a, one, d in trios if isinstance(one, Order) and isinstance(d, Place)]
        if len(placed) < len(decisions):
            await self._answer(arrivals, decisions)
        settled = await self._forward(placed) if placed else set()
        left = {arrival.tag for arrival in arrivals} - settled
        if left:
            await self.transport.settle(sorted(left))

    async def decide(self, arrival: Arrival, now: float, working: WorkingSnapshot) -> Decision:
        """The decision for an arrival; an admitted one is counted as placed."""
        return self._decide(await self._read(arrival, now), arrival, working)

    async def _read(self, arrival: Arrival, now: float) -> Order | Decision:
        try:
            return await beside(len(arrival.raw), read, arrival, self.rules, now)
        except Exception as error:  # a message that cannot be decided must not stop the others
            return _undecided(arrival, error)

    def _decide(self, found: Order | Decision, arrival: Arrival, working: WorkingSnapshot) -> Decision:
        try:
            decision = decide_read(found, self.rules, working)
        except Exception as error:  # as above
            return _undecided(arrival, error)
        if isinstance(decision, Place):
            self.placed(decision)
        return decision

    async def _forward(self, placed: Sequence[tuple[Arrival, Order, Place]]) -> set[str]:
        """Forward placed arrivals; returns the tags that are settled by that.

        The store may refuse those of tenants with a bounded depth: they stay taken until that is answered.
        """
        outgoing = [one.outgoing for *_, one in placed]
        if any("open" in one.fields for one in outgoing):
            outgoing = [msgspec.structs.replace(one, tag="") for one in outgoing]
        forwarded = await self.fleet.forward(self.transport.forward, outgoing)
        over = []
        for (arrival, order, one), outcome in zip(placed, forwarded, strict=True):
            if outcome is ForwardOutcome.OVER:
                over.append((arrival, refuse(order, self.rules, over_depth(one.outgoing.fields))))
            elif outcome is not ForwardOutcome.NEW:
                await self._drop_blobs(one.outgoing.job, one.outgoing.envelope)
        if over:
            await self._answer([arrival for arrival, _ in over], [decision for _, decision in over])
        return {one.tag for one in outgoing}

    async def _drop_blobs(self, job: str, envelope: Envelope) -> None:
        refs = await beside(len(envelope.body), _referred, envelope, self.rules.topology.limits.elements)
        if refs:
            await self.store.jobs.drop_blobs(job, refs)

    async def _answer(self, arrivals: Sequence[Arrival], decisions: Sequence[Decision]) -> None:
        """End, cancel or dead-letter arrivals that are not forwarded."""
        answered = list(zip(arrivals, decisions, strict=True))
        if ended := [(arrival, end) for arrival, one in answered if (end := end_of(one)) is not None]:
            await self._end(ended)
        if cancelled := [one.job for one in decisions if isinstance(one, Cancel)]:
            await self.store.jobs.cancel(cancelled)
        if dead := [DeadLetter(one.reason, time.time(), a.raw) for a, one in answered if isinstance(one, GiveUp)]:
            await self.store.jobs.dead_letter(dead)
            self.dead_lettered += len(dead)
            for dead_letter in dead:
                logger.warning("message dead-lettered", extra={"reason": dead_letter.reason})

    async def _end(self, ended: Sequence[tuple[Arrival, End]]) -> None:
        self.store.audit.add(end.receipt for _, end in ended if end.receipt is not None)
        await end_all(self.store, self.transport, [(end.ending, end.after) for _, end in ended])
        await self.store.jobs.refuse([end.refusal for _, end in ended if end.refusal is not None])
        refused = {end.ending.job: end.refused for _, end in ended if end.refused is not None}
        if refused:  # also those that ended before: by a router that died before it listed them
            await self.store.jobs.note_refused(refused)
        for arrival, end in ended:
            if end.unserved is not None:
                self.store.unserved.add(self.store.clock.now(), end.unserved)
            assert arrival.envelope is not None  # else it has no job
            self.refused(arrival.envelope, end.ending.job, end.code)
            await self._drop_blobs(end.ending.job, arrival.envelope)


def _referred(envelope: Envelope, most: int) -> list[str]:
    """The blobs that a message refers to; empty if its body cannot be read or has more than `most` values."""
    with suppress(InvalidRequestError):
        body = envelope.payload()
        if values_beyond(body, most) is None:
            return [blob.ref for blob in referred(body)]
    return []


def _undecided(arrival: Arrival, error: Exception) -> GiveUp:
    logger.error("arrival could not be processed", extra={"tag": arrival.tag}, exc_info=error)
    return undecidable(arrival, error)
