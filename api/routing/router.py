"""A router, and what the HTTP API in its process asks of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from api.routing.counters import Counts, OutcomeCounters, RecentOutcomes
from api.routing.results import Results, WaitTimeouts
from api.routing.stores import OperatorStore, StoredJobs, ValueStore
from api.routing.webhooks import WebhookRegistry
from broker.port import ForwardOutcome, Outgoing
from broker.valkey.queues import ValkeyTransport
from router.decide.fairness import RETRY_AFTER, Depths, is_crowded, over_depth
from router.decide.scaling import Scaler
from router.router import Router
from router.service.admission import Order, Place, Rules, admit, refused_receipt, sealed, unserved
from router.service.snapshot_reader import FleetReader
from tasks.models.folder import ModelsFolder
from tasks.settings import Settings
from tasks.topology import Topology
from taxiway.connection import settle
from taxiway.contract.limits import LARGE
from taxiway.errors import BrokerFullError, BrokerUnavailableError, NoDeviceError, OverloadedError, TaxiwayError
from taxiway.running import beside

logger = logging.getLogger(__name__)

ACCEPT = 1.75
"""Seconds, plus up to `CHECK_EVERY`, that a caller waits for the broker: it gets an answer within two."""

_OBSERVE = 1.0  # seconds between two looks at what the fleet counted, and at how many devices it should have


class HttpRouter(Router):
    """A router with what callers submit there and wait for, and what operators read and ask of the fleet."""

    def __init__(self, settings: Settings, rules: Rules, name: str, folder: ModelsFolder, amqp: str = "") -> None:
        super().__init__(settings, rules, name, folder, amqp)
        self.values = ValueStore(settings.broker, self.store.calls)
        self.jobs = StoredJobs(self.store.calls)
        self.operators = OperatorStore(self.store.calls, self.store.clock)
        self.results = Results(settings.broker, self.store.calls.calls, name)
        self.wait_timeouts = WaitTimeouts()
        self.registry = WebhookRegistry(self.webhooks, rules, self.store.clock)
        self.scaler = Scaler(rules.topology)
        self.outcomes, self.lately = OutcomeCounters(), RecentOutcomes()
        self._submissions = Submissions(self.transport, self.fleet)

    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """What runs until the router stops, by name."""
        return {**super().loops(), "results": self.results.run(), "observe": self._observe()}

    async def stop(self) -> None:
        """Retire, then disconnect."""
        await super().stop()
        await self.results.close()
        self.values.close()

    async def place(self, order: Order) -> Place:
        """Place a request. What is missing is read again before it fails: a device, or room for a job.

        Raises:
            TaxiwayError: as `admit` raises it.
        """
        try:
            if order.size > LARGE:
                order = await beside(order.size, sealed, order, self.rules)
            admitted = await self._admit(order)
        except TaxiwayError as error:
            self.refuse(order.envelope, order.job, error.code)
            if asked := unserved(order, self.rules, self.fleet.working, error):
                self.store.unserved.add(self.store.clock.now(), asked)
            if receipt := refused_receipt(order, self.rules, error):
                self.store.audit.add([receipt])
            raise
        self.count(admitted)
        return admitted

    async def forward(self, admitted: Place) -> bool:
        """Forward a placed request; False if its id already has a job.

        Raises:
            BrokerUnavailableError: the state store did not accept it. Unexpected errors are raised unchanged.
            OverloadedError: its tenant has as many unfinished jobs as it may, by the store's count.
        """
        outgoing = admitted.outgoing
        try:
            outcome = await self.wait_timeouts.wait(self._submissions.forward(outgoing), ACCEPT)
        except TimeoutError as error:
            message = f"the state store did not accept the request within {ACCEPT:g} s"
            raise BrokerUnavailableError(message, retry_after=1.0) from error
        if outcome is ForwardOutcome.OVER:
            over = over_depth(outgoing.fields)
            self.refuse(outgoing.envelope, outgoing.job, over.code)
            if outgoing.receipt is not None:
                self.store.audit.add([outgoing.receipt.refused(over.code)])
            raise over
        return outcome is ForwardOutcome.NEW

    def counted(self) -> Mapping[str, Counts]:
        """What this router and the workers counted since it started, by metric."""
        return {
            "placed": self.placed,
            "moved": self.mover.moves,
            "yields": self.yielder.yields,
            "refused": self.refused,
            "ended": self.store.jobs.ended,
            "parked": {(): self.intake.dead_lettered},
            "webhook_attempts": self.webhooks.outcomes,
            **self.outcomes.counted(),
        }

    async def _admit(self, order: Order) -> Place:
        try:
            return self._admit_now(order)
        except NoDeviceError:
            await self.fleet.read()
        except OverloadedError as error:
            if not is_crowded(error):
                raise
            await self.fleet.read_depths([order.request.tenant])
        return self._admit_now(order)

    def _admit_now(self, order: Order) -> Place:
        working = self.fleet.working
        check_store(working.depths, self.rules.topology)
        return admit(order, self.rules, working)

    async def _observe(self) -> None:
        while True:
            working, now = self.fleet.working, time.monotonic()
            if not working.fleet.stale:
                self.scaler.topology = self.rules.topology
                self.scaler.observe(working.fleet, now, working.depths.classes)
                self.outcomes.update(working.fleet.devices)
                refused = self.store.unserved.total, self.refused[NoDeviceError.code,]
                self.lately.observe((self.outcomes.outcomes, self.store.jobs.ended), refused, now)
            await asyncio.sleep(_OBSERVE)


class Submissions:
    """Forwards single messages; those that arrive while a call is in progress share the next one."""

    def __init__(self, transport: ValkeyTransport, fleet: FleetReader) -> None:
        self._transport = transport
        self._fleet = fleet
        self._waiting: list[tuple[Outgoing, asyncio.Future[ForwardOutcome]]] = []
        self._sender: asyncio.Task[None] | None = None

    def forward(self, outgoing: Outgoing) -> asyncio.Future[ForwardOutcome]:
        """A future of what became of the message.

        It raises what the shared call raised: a `BrokerUnavailableError`, or an unexpected error.
        """
        done: asyncio.Future[ForwardOutcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((outgoing, done))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return done

    async def _send(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._send_batch(batch)
        finally:
            self._sender = None

    async def _send_batch(self, batch: Sequence[tuple[Outgoing, asyncio.Future[ForwardOutcome]]]) -> None:
        try:
            forwarded = await self._fleet.forward(self._transport.forward, [outgoing for outgoing, _ in batch])
            for (_, done), fresh in zip(batch, forwarded, strict=True):
                settle(done, fresh)
        except Exception as error:  # the next call is made regardless
            if not isinstance(error, BrokerUnavailableError):
                logger.exception("forwarding failed", extra={"messages": len(batch)})
            for _, done in batch:
                settle(done, error)


def check_store(depths: Depths, topology: Topology) -> None:
    """Refuse every request while the state store is nearly full or accepts no writes.

    Raises:
        BrokerFullError: the store cannot write to its disk, or uses more than `limits.memory` of its memory limit.
    """
    if depths.refuses:
        message = "the state store cannot write to its disk and accepts no requests: free disk space"
        raise BrokerFullError(message, retry_after=RETRY_AFTER, resource="disk")
    if depths.used > topology.limits.memory:
        message = f"the state store uses {depths.used:.0%} of its memory, more than limits.memory allows"
        raise BrokerFullError(message, retry_after=RETRY_AFTER, resource="memory", used=depths.used)
