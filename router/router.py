"""The composition root: one router's parts and their loops. `api.routing.router` adds what callers of HTTP need."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Coroutine
from typing import TYPE_CHECKING, Any

from broker.valkey.mover import ValkeyQueueMover
from broker.valkey.processes import Leadership
from broker.valkey.queues import ValkeyTransport
from router.service.admission import Place, Rules
from router.service.arrivals import Intake
from router.service.events import SentEvents, trace_placement, trace_refusal
from router.service.snapshot_reader import FleetReader, FolderWatch
from router.service.store import RouterStore
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
from tasks.queues.receipts import Chain
from tasks.settings import Settings
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from broker.amqp import AmqpBridge

logger = logging.getLogger(__name__)

TIDY = 1.0
"""Seconds between two checks for dead routers."""

STOP_WAIT = 2.0
"""Longest wait of a stopping router for its loops to finish their current work, in seconds."""

CANCEL_AGAIN = 0.2
"""Seconds after which a loop that is still running is cancelled again."""


class Router:
    """One router. Any number of routers are competing consumers of the same arrivals."""

    def __init__(self, settings: Settings, rules: Rules, name: str, folder: ModelsFolder, amqp: str = "") -> None:
        """A router; with the address of a RabbitMQ it takes what producers send there, too."""
        self.name = name
        self.settings = settings
        self.rules = rules
        chain = Chain(rules.topology.site, name, rules.sign)
        self.store = RouterStore(settings.broker, rules.topology.limits, chain)
        self.fleet = FleetReader(self.store, rules.topology, rules.book, rules.starts)
        self.folder = FolderWatch(folder, rules, self.fleet, self.store, name)
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
        self.placed: Counter[tuple[str, ...]] = Counter()
        self.refused: Counter[tuple[str, ...]] = Counter()
        self.webhooks = WebhookDelivery(settings.broker, self.store, rules, name)
        self._releaser = Releaser(leadership, rules, self.store, self.transport, self.fleet, placed=self.count)
        retargeter = Retargeter(settings, rules, self.fleet, self.store)
        housekeeping = Housekeeping(self.transport, self.store, self.fleet, rules, folder.queues)
        timeline = Timeline(self.store, self.fleet, rules, self.mover.moves)
        self._recorder = Recorder(settings.broker, self.store, rules.topology.limits, timeline.note)
        duties = (self.mover, self._releaser, retargeter, housekeeping, self._recorder, timeline)
        self._leader = Leader(leadership, duties, tick)
        self._deadlines = Deadlines(self.store, self.transport)
        self._bridge: AmqpBridge | None = None
        if amqp:
            from broker.amqp import AmqpBridge  # other routers start sooner without aio-pika

            self._bridge = AmqpBridge(amqp, settings.broker, name, self.store.jobs.dead_letter, limits.confirmed_by)
        self.leaving = False  # it takes no more arrivals, and is about to stop
        self.intake = Intake(self.transport, self.fleet, self.store, rules, placed=self.count, refused=self.refuse)
        self._turning: list[asyncio.Task[None]] = []  # what ends by itself, after its turn, when the router retires
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read the fleet if possible, then take arrivals and run the background loops until `stop`."""
        with contextlib.suppress(BrokerUnavailableError):
            await self.fleet.read()
            await self.webhooks.read()
        await self.folder.report()  # before any request is accepted
        self._keepers = [asyncio.create_task(loop, name=name) for name, loop in self.loops().items()]
        self._turning = [self.intake.start(), asyncio.create_task(self._leader.run(), name="leader")]

    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """What runs until the router stops, by name."""
        return {
            "fleet": self.fleet.run(),
            "folder": self.folder.run(),
            "tidy": self._tidy(),
            "deadlines": self._deadlines.run(),
            "webhooks": self.webhooks.run(),
            "yielder": self.yielder.run(),
            **({} if self._bridge is None else {"bridge": self._bridge.run()}),
        }

    async def retire(self) -> None:
        """Take no more arrivals, finish or return what was taken and resign; HTTP is still served."""
        self.leaving = True
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
        await self._recorder.close()
        with contextlib.suppress(BrokerUnavailableError):
            await self.store.audit.write()
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

    def count(self, admitted: Place) -> None:
        """Count a job that was just placed."""
        self.fleet.count(admitted.placement, admitted.outgoing.fields["tenant"], admitted.outgoing.job)
        self._deadlines.expect(admitted.ticket.deadline_at)
        trace_placement(admitted, self.store)
        if admitted.placement.held:
            self._releaser.wake()
            return
        self.yielder.expect(admitted.outgoing.job, admitted.placement)
        hardware_class = admitted.placement.candidate.hardware_class
        if admitted.prefixes:
            self.fleet.prefixes.note(admitted.prefixes, admitted.outgoing.job, hardware_class)
        self.placed[hardware_class, admitted.placement.table.model.id] += 1
        self._events.add(admitted.outgoing.job, admitted.outgoing.queue, admitted.outgoing.envelope)

    def refuse(self, envelope: Envelope, job: str, code: str) -> None:
        """Count a request that was refused with an error of this code."""
        self.refused[code,] += 1
        trace_refusal(envelope.headers, job, code)

    async def _tidy(self) -> None:
        while True:
            with contextlib.suppress(BrokerUnavailableError):  # the consuming loop reports it
                recovered = await self.transport.tidy()
                if recovered:
                    logger.warning("arrivals recovered", extra={"messages": recovered})
                await self._events.send(self.transport)
                await self.store.unserved.write()
                await self.store.audit.write()
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
