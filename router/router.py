"""The composition root: one router's parts, their loops, and what the HTTP API asks of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from broker.port import ForwardOutcome
from broker.valkey.leases import Leadership
from broker.valkey.mover import ValkeyQueueMover
from broker.valkey.queues import ValkeyTransport
from router.decide.fairness import check_store, over_depth
from router.decide.prefixes import Earlier, Prefixes
from router.decide.scaling import Scaler
from router.service.admission import Order, Place, Rules, admit
from router.service.arrivals import Intake
from router.service.counters import Counters, OutcomeCounters, RecentOutcomes
from router.service.events import SentEvents, trace_placement, trace_refusal
from router.service.repository import Repository
from router.service.results import Results, WaitTimeouts
from router.service.snapshot_reader import FleetReader, FolderWatch
from router.service.store import RouterStore
from router.service.submissions import Submissions
from router.upkeep.deadlines import Deadlines
from router.upkeep.housekeeping import Housekeeping
from router.upkeep.leader import LEADER_LEASE, Leader
from router.upkeep.mover import Mover
from router.upkeep.recorder import Recorder
from router.upkeep.releaser import Releaser
from router.upkeep.retargeter import Retargeter
from router.upkeep.timeline import Timeline
from router.upkeep.webhooks import WebhookDelivery
from router.upkeep.yielding import Yielder
from tasks.models.folder import ModelsFolder
from tasks.settings import Settings
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError, NoDeviceError, TaxiwayError

if TYPE_CHECKING:
    from router.service.amqp_bridge import AmqpBridge

logger = logging.getLogger(__name__)

TIDY = 1.0
"""Seconds between two checks for dead routers."""

ACCEPT = 1.75
"""Seconds, plus up to `CHECK_EVERY`, that an HTTP caller waits for the broker: it gets an answer within two."""

STOP_WAIT = 2.0
"""Longest wait of a stopping router for its loops to finish their current work, in seconds."""

CANCEL_AGAIN = 0.2
"""Seconds after which a loop that is still running is cancelled again."""


class Router:
    """One router. Any number of routers are competing consumers of the same arrivals."""

    def __init__(self, settings: Settings, rules: Rules, name: str, folder: ModelsFolder, amqp: str = "") -> None:
        """A router; with the address of a RabbitMQ it takes what producers send there, too."""
        self.name = name
        self.rules = rules
        self.store = RouterStore(settings.broker, rules.topology.limits)
        self.fleet = FleetReader(self.store, rules.topology, rules.book, rules.starts, Prefixes())
        self.folder = FolderWatch(folder, rules, self.fleet, self.store, name)
        self.repository = Repository(rules, self.fleet, self.folder, self.store)
        self.results = Results(settings.broker, self.store, name)
        limits = rules.topology.limits
        self.transport = ValkeyTransport(
            settings.broker, name=name, keep_record=limits.keep_record, confirmed_by=limits.confirmed_by
        )
        self.queue_mover = ValkeyQueueMover(settings.broker)
        self._events = SentEvents(name)
        tick = rules.topology.rebalance.tick
        leadership = Leadership(settings.broker, name, LEADER_LEASE * tick)
        self.mover = Mover(self.queue_mover, leadership, self.fleet, self.store, rules, self._events)
        self.yielder = Yielder(self.fleet, self.store, self.queue_mover, rules)
        self.scaler = Scaler(rules.topology)
        self.placed: Counter[tuple[str, ...]] = Counter()
        self.refused: Counter[tuple[str, ...]] = Counter()
        self.outcomes, self.lately = OutcomeCounters(), RecentOutcomes()
        self.wait_timeouts = WaitTimeouts()
        self.webhooks = WebhookDelivery(settings.broker, self.store, rules, name)
        self._submissions = Submissions(self.transport, self.fleet)
        self._releaser = Releaser(leadership, rules, self.store, self.transport, self.fleet, placed=self._count)
        retargeter = Retargeter(settings, rules, self.fleet, self.store)
        housekeeping = Housekeeping(self.transport, self.store, self.fleet, rules)
        timeline = Timeline(self.store, self.fleet, rules, self.mover.moves)
        self._recorder = Recorder(settings.broker, self.store, rules.topology.limits, timeline.note)
        duties = (self.mover, self._releaser, retargeter, housekeeping, self._recorder, timeline)
        self._leader = Leader(leadership, duties, tick)
        self._deadlines = Deadlines(self.store, self.transport)
        self._bridge = open_bridge(amqp, settings, self) if amqp else None
        self._stopping = False
        self.intake = Intake(self.transport, self.fleet, self.store, rules, placed=self._count, refused=self._refuse)
        self._turning: list[asyncio.Task[None]] = []  # what ends by itself, after its turn, when the router retires
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def leaving(self) -> bool:
        """Whether the router takes no more arrivals and is about to stop."""
        return self._stopping

    async def start(self) -> None:
        """Read the fleet if possible, then take arrivals and run the background loops until `stop`."""
        with contextlib.suppress(BrokerUnavailableError):
            await self.fleet.read()
            await self.webhooks.read()
        await self.folder.begin()
        self._keepers = [
            asyncio.create_task(keep, name=name)
            for name, keep in {
                "fleet": self.fleet.run(),
                "folder": self.folder.run(),
                "results": self.results.run(),
                "tidy": self._tidy(),
                "deadlines": self._deadlines.run(),
                "webhooks": self.webhooks.run(),
                "yielder": self.yielder.run(),
                **({} if self._bridge is None else {"bridge": self._bridge.run()}),
            }.items()
        ]
        self._turning = [self.intake.start(), asyncio.create_task(self._leader.run(), name="leader")]

    async def retire(self) -> None:
        """Take no more arrivals, finish or return what was taken and resign; HTTP is still served."""
        self._stopping = True
        self._leader.leave()
        self.intake.retire()
        if self._turning:
            await asyncio.wait(self._turning, timeout=STOP_WAIT)
        with contextlib.suppress(BrokerUnavailableError):  # other routers recover them once this session ends
            await self.transport.retire()

    async def stop(self) -> None:
        """Retire, then disconnect."""
        await self.retire()
        await self.webhooks.retire()
        await _end([*self._turning, *self._keepers])
        await self.webhooks.close()
        await self.results.close()
        await self._recorder.close()
        await self._leader.close()
        await self.queue_mover.close()
        await self.transport.close()
        if self._bridge is not None:
            await self._bridge.close()
        await self.store.close()

    async def failed(self) -> BaseException | None:
        """Wait until one of this router's loops ends with an unexpected error; returns the error."""
        done, _ = await asyncio.wait([*self._turning, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
        task = done.pop()
        return None if task.cancelled() else task.exception()

    async def place(self, order: Order) -> Place:
        """Place a request of the HTTP API. The fleet is read again before the request fails for lack of a device.

        Raises:
            TaxiwayError: as `admit` raises it.
        """
        try:
            admitted = await self._admit(order)
        except TaxiwayError as error:
            self._refuse(order.envelope, order.job, error.code)
            raise
        self._count(admitted)
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
            self._refuse(outgoing.envelope, outgoing.job, over.code)
            raise over
        return outcome is ForwardOutcome.NEW

    def done(self) -> Counters:
        """Counters since this router started, for its metrics."""
        return Counters(
            placed=self.placed,
            moved=self.mover.moves,
            yields=self.yielder.yields,
            refused=self.refused,
            ended=self.store.jobs.ended,
            outcomes=self.outcomes.outcomes,
            latency=self.outcomes.latency,
            dead_lettered=self.intake.dead_lettered,
            rejected=self.outcomes.rejected,
            used=self.outcomes.used,
            dollars=self.outcomes.dollars,
            webhooks=self.webhooks.outcomes,
        )

    async def _admit(self, order: Order) -> Place:
        try:
            return self._admit_now(order)
        except NoDeviceError:
            await self.fleet.read()
            return self._admit_now(order)

    def _admit_now(self, order: Order) -> Place:
        working = self.fleet.working
        check_store(working.depths, self.rules.topology)
        return admit(order, self.rules, working)

    def _count(self, admitted: Place) -> None:
        self.fleet.count(admitted.placement, admitted.outgoing.fields["tenant"])
        self._deadlines.expect(admitted.ticket.deadline_at)
        trace_placement(admitted, self.store)
        if admitted.placement.held:
            self._releaser.wake()
            return
        self.yielder.expect(admitted.outgoing.job, admitted.placement)
        hardware_class = admitted.placement.candidate.hardware_class
        if admitted.prefixes and self.fleet.prefixes is not None:
            self.fleet.prefixes.note(admitted.prefixes, Earlier(admitted.outgoing.job, hardware_class))
        self.placed[hardware_class, admitted.placement.table.model.id] += 1
        self._events.add(admitted.outgoing.job, admitted.outgoing.queue, admitted.outgoing.envelope)

    def _refuse(self, envelope: Envelope, job: str, code: str) -> None:
        self.refused[code,] += 1
        trace_refusal(envelope.headers, job, code)

    async def _tidy(self) -> None:
        while True:
            if not self.fleet.working.fleet.stale:
                working, self.scaler.topology = self.fleet.working, self.rules.topology
                self.scaler.observe(working.fleet, time.monotonic(), working.depths.classes)
                self.outcomes.update(working.fleet.devices)
                self.lately.observe((self.outcomes.outcomes, self.store.jobs.ended), time.monotonic())
            with contextlib.suppress(BrokerUnavailableError):  # the consuming loop reports it
                recovered = await self.transport.tidy()
                if recovered:
                    logger.warning("arrivals recovered", extra={"messages": recovered})
                await self._events.send(self.transport)
            await asyncio.sleep(TIDY)


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end.

    Python 3.11's `wait_for` can lose a cancellation that arrives as its timeout expires.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN)
    await asyncio.gather(*tasks, return_exceptions=True)


def open_bridge(amqp: str, settings: Settings, router: Router) -> AmqpBridge:
    """The bridge to the RabbitMQ at that address."""
    from router.service.amqp_bridge import AmqpBridge  # other routers start sooner without aio-pika

    return AmqpBridge(amqp, settings.broker, router.name, router.store, router.rules.topology.limits.confirmed_by)
