"""The router's main loop: takes arrivals, decides each one and forwards them together; also places HTTP requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence

import msgspec

from broker.port import Arrival, DeadLetter, ForwardOutcome, Outgoing, QueueMover, Transport, beside
from broker.valkey.leader import Leadership, ValkeyQueueMover
from broker.valkey.queues import ValkeyTransport
from router.decide.fairness import check_store, over_depth
from router.decide.prefixes import Earlier, Prefixes
from router.decide.scaling import Scaler
from router.decide.working_snapshot import WorkingSnapshot
from router.metrics import Counters, OutcomeCounters, RecentOutcomes
from router.problems import problems
from router.service.admission import Admitted, Order, Rules, admit
from router.service.decision import Decision, decide_read, read, refuse, undecidable
from router.service.events import SentEvents, end_all, trace_placement, trace_refusal
from router.service.repository import Repository
from router.service.results import Results, WaitTimeouts
from router.service.snapshot_reader import FleetReader, FolderWatch
from router.service.store import RouterStore
from router.upkeep.deadlines import Deadlines
from router.upkeep.housekeeping import Housekeeping
from router.upkeep.leader import LEASE, Leader
from router.upkeep.mover import Mover
from router.upkeep.recorder import Recorder
from router.upkeep.releaser import Releaser
from router.upkeep.retargeter import Retargeter
from router.view import FleetView, view_fleet, view_plan
from router.webhooks import Webhooks
from tasks.models.folder import APART, ModelsFolder
from tasks.settings import Settings
from taxiway.connection import settle
from taxiway.contract.limits import values_beyond
from taxiway.contract.values import referred
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, NoDeviceError, TaxiwayError

logger = logging.getLogger(__name__)

IDLE = 1.0
"""Longest wait of an idle router for an arrival before it checks again, in seconds."""

TIDY = 1.0
"""Seconds between two checks for dead routers."""

ACCEPT = 1.75
"""Seconds, plus up to `CHECK_EVERY`, that an HTTP caller waits for the broker: it gets an answer within two."""

TURN = 2.0
"""Longest wait of a stopping router for its loops to finish their current work, in seconds."""

AGAIN = 0.2
"""Seconds after which a loop that is still running is cancelled again."""

_BACKOFF = (0.05, 1.0)  # seconds: first and longest pause while the broker is away


class Submissions:
    """Forwards single messages; those that arrive while a call is in progress share the next one."""

    def __init__(self, transport: Transport, fleet: FleetReader) -> None:
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
            snapshots = self._fleet.snapshots()
            forwarded = await self._transport.forward([outgoing for outgoing, _ in batch], snapshots)
            self._fleet.mark_stored(snapshots)
            for (_, done), fresh in zip(batch, forwarded, strict=True):
                settle(done, fresh)
        except Exception as error:  # the next call is made regardless
            if not isinstance(error, BrokerUnavailableError):
                logger.exception("forwarding failed", extra={"messages": len(batch)})
            for _, done in batch:
                settle(done, error)


class Router:
    """One router. Any number of routers are competing consumers of the same arrivals."""

    def __init__(self, settings: Settings, rules: Rules, name: str, folder: ModelsFolder) -> None:
        self.name = name
        self.rules = rules
        self.store = RouterStore(settings.state, rules.topology.limits)
        prefixes = Prefixes() if settings.broker_is_state else None  # else no message is led anywhere
        self.fleet = FleetReader(self.store, rules.topology, rules.book, rules.starts, prefixes)
        self.folder = FolderWatch(folder, rules, self.fleet, self.store, name)
        self.repository = Repository(rules, self.fleet, self.folder, self.store)
        self.results = Results(settings.state, self.store, name)
        self.transport = open_transport(settings, rules, name)
        self.queue_mover = open_queue_mover(settings)
        self._events = SentEvents(name)
        tick = rules.topology.rebalance.tick
        self.leadership = Leadership(settings.state, name, LEASE * tick)
        self.mover = Mover(self.queue_mover, self.leadership, self.fleet, self.store, rules, self._events)
        self.scaler = Scaler(rules.topology)
        self.placed: Counter[tuple[str, ...]] = Counter()
        self.refused: Counter[tuple[str, ...]] = Counter()
        self.parked = 0
        self.outcomes, self._lately = OutcomeCounters(), RecentOutcomes()
        self.wait_timeouts = WaitTimeouts()
        self.webhooks = Webhooks(settings.state, self.store, rules, name)
        self._submissions = Submissions(self.transport, self.fleet)
        self._releaser = Releaser(self.leadership, rules, self.store, self.transport, self.fleet, placed=self._count)
        retargeter = Retargeter(settings, rules, self.fleet, self.store)
        housekeeping = Housekeeping(self.transport, self.store, self.fleet, rules)
        self._recorder = Recorder(settings.state, self.store, rules.topology.limits)
        duties = (self.mover, self._releaser, retargeter, housekeeping, self._recorder)
        self._leader = Leader(self.leadership, duties, tick)
        self._deadlines = Deadlines(self.store, self.transport)
        self._stopping = False
        self._idle = False
        self._consumer: asyncio.Task[None] | None = None
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
            }.items()
        ]
        self._consumer = asyncio.create_task(self._consume(), name="consume")
        self._turning = [self._consumer, asyncio.create_task(self._leader.run(), name="leader")]

    async def retire(self) -> None:
        """Take no more arrivals, finish or return what was taken and resign; the HTTP door is still served."""
        self._stopping = True
        self._leader.leave()
        if self._idle and self._consumer is not None:
            self._consumer.cancel()
        if self._turning:
            await asyncio.wait(self._turning, timeout=TURN)
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
        await self.leadership.close()
        await self.queue_mover.close()
        await self.transport.close()
        await self.store.close()

    async def failed(self) -> BaseException | None:
        """Wait until one of this router's loops ends with an unexpected error; returns the error."""
        done, _ = await asyncio.wait([*self._turning, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
        task = done.pop()
        return None if task.cancelled() else task.exception()

    async def place(self, order: Order) -> Admitted:
        """Place a request of the HTTP door. The fleet is read again before the request fails for lack of a device.

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

    async def forward(self, admitted: Admitted) -> bool:
        """Forward a placed request; False if its id already has a job.

        Raises:
            BrokerUnavailableError: the broker did not accept it. Unexpected errors are raised unchanged.
            OverloadedError: its tenant has as many unfinished jobs as it may, by the store's count.
        """
        outgoing = admitted.outgoing
        try:
            outcome = await self.wait_timeouts.wait(self._submissions.forward(outgoing), ACCEPT)
        except TimeoutError as error:
            message = f"the broker did not accept the request within {ACCEPT:g} s"
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
            refused=self.refused,
            ended=self.store.ended,
            outcomes=self.outcomes.outcomes,
            latency=self.outcomes.latency,
            parked=self.parked,
            rejected=self.outcomes.rejected,
            used=self.outcomes.used,
            dollars=self.outcomes.dollars,
            webhooks=self.webhooks.outcomes,
        )

    async def _admit(self, order: Order) -> Admitted:
        try:
            return self._admit_now(order)
        except NoDeviceError:
            await self.fleet.read()
            return self._admit_now(order)

    def _admit_now(self, order: Order) -> Admitted:
        working = self.fleet.working
        check_store(working.depths, self.rules.topology)
        return admit(order, self.rules, working)

    async def view(self) -> FleetView:
        """The fleet as shown to operators.

        Raises:
            BrokerUnavailableError: the broker or the state store does not answer.
        """
        topology, catalogue = self.rules.topology, self.rules.catalogue
        view = await view_fleet(topology, self.fleet, self.queue_mover, self.scaler.targets(), self.store)
        reports = await self.store.catalogues()
        tuner, latest = await self.store.tuner()
        waiting, given_up = await self.webhooks.figures()
        failing = await self.store.failing()
        view = msgspec.structs.replace(
            view,
            webhooks_waiting=waiting,
            webhooks_dead=given_up,
            tokens=sum(use.input + use.output for use in self.outcomes.used.values()),
            disabled=catalogue.disabled,
            outdated=catalogue.outdated,
            unloaded=tuple(sorted(self.rules.unloaded & catalogue.models.keys())),
            restart=tuple(name for name, report in sorted(reports.items()) if report.queues_changed),
            queues_wrong={name: report.queues_wrong for name, report in sorted(reports.items()) if report.queues_wrong},
            clocks={name: report.clock for name, report in sorted(reports.items()) if abs(report.clock) >= APART},
            plan=view_plan(self.fleet.followed, self.fleet.snapshot, view.now, reports.values(), tuner, latest),
            ended=self._lately.ended,
            missed=self._lately.missed,
            failing=failing,
        )
        return msgspec.structs.replace(view, problems=problems(view))

    async def _consume(self) -> None:
        outage = Outage("broker")
        while not self._stopping:
            try:
                taken = await self.transport.take()
                if taken.arrivals:
                    await self._handle(taken.arrivals, taken.now)
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
        if any(d.deviceless for d in decisions):
            await self.fleet.read()
            working = self.fleet.working
            drawn = zip(found, arrivals, decisions, strict=True)
            decisions = [self._decide(one, a, working) if d.deviceless else d for one, a, d in drawn]
        trios = zip(arrivals, found, decisions, strict=True)
        placed = [(a, one, d.admitted) for a, one, d in trios if isinstance(one, Order) and d.admitted is not None]
        if len(placed) < len(decisions):
            await self._answer(arrivals, decisions)
        settled = await self._forward(placed) if placed else set()
        left = {d.tag for d in decisions} - settled
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
        if decision.admitted is not None:
            self._count(decision.admitted)
        return decision

    async def _forward(self, placed: Sequence[tuple[Arrival, Order, Admitted]]) -> set[str]:
        """Forward placed arrivals; returns the tags that are settled by that.

        The store may refuse those of tenants with a bounded depth: they stay taken until that is answered.
        """
        snapshots, outgoing = self.fleet.snapshots(), [one.outgoing for *_, one in placed]
        if any("open" in one.fields for one in outgoing):
            outgoing = [msgspec.structs.replace(one, tag="") for one in outgoing]
        forwarded = await self.transport.forward(outgoing, snapshots)
        self.fleet.mark_stored(snapshots)
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
            await self.store.drop_blobs(job, refs)

    async def _answer(self, arrivals: Sequence[Arrival], decisions: Sequence[Decision]) -> None:
        """End, cancel or dead-letter arrivals that are not forwarded."""
        endings = [(d.ending, d.after) for d in decisions if d.ending is not None]
        cancelled = [d.cancel for d in decisions if d.cancel]
        letters = [
            DeadLetter(d.letter, time.time(), a.raw) for a, d in zip(arrivals, decisions, strict=True) if d.letter
        ]
        if endings:
            await end_all(self.store, self.transport, endings)
            await self.store.refuse([d.refusal for d in decisions if d.refusal is not None])
            refused = {d.ending.job: d.refused for d in decisions if d.ending is not None and d.refused is not None}
            if refused:  # also those that ended before: by a router that died before it listed them
                await self.store.note_refused(refused)
        for arrival, decision in zip(arrivals, decisions, strict=True):
            if decision.ending is not None and arrival.envelope is not None:
                self._refuse(arrival.envelope, decision.ending.job, decision.code)
                await self._drop_blobs(decision.ending.job, arrival.envelope)
        if cancelled:
            await self.store.cancel(cancelled)
        if letters:
            await self.store.add_dead_letters(letters)
            self.parked += len(letters)
            for letter in letters:
                logger.warning("message dead-lettered", extra={"reason": letter.reason})

    def _count(self, admitted: Admitted) -> None:
        self.fleet.count(admitted.placement, admitted.outgoing.fields["tenant"])
        self._deadlines.expect(admitted.ticket.deadline_at)
        trace_placement(admitted, self.store)
        if admitted.placement.held:
            self._releaser.wake()
            return
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
                self._lately.observe((self.outcomes.outcomes, self.store.ended), time.monotonic())
            with contextlib.suppress(BrokerUnavailableError):  # the consuming loop reports it
                recovered = await self.transport.tidy()
                if recovered:
                    logger.warning("arrivals recovered", extra={"messages": recovered})
                await self._events.send(self.transport)
            await asyncio.sleep(TIDY)


def _referred(envelope: Envelope, most: int) -> list[str]:
    """The blobs that a message refers to; empty if its body cannot be read or has more than `most` values."""
    try:
        body = envelope.payload()
    except InvalidRequestError:
        return []
    return [blob.ref for blob in referred(body)] if values_beyond(body, most) is None else []


def _undecided(arrival: Arrival, error: Exception) -> Decision:
    logger.error("arrival could not be processed", extra={"tag": arrival.tag}, exc_info=error)
    return undecidable(arrival, error)


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end.

    Python 3.11's `wait_for` can lose a cancellation that arrives as its timeout expires.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN)
    await asyncio.gather(*tasks, return_exceptions=True)


class Outage:
    """Logs once that a server is unavailable and once that it is back, and gives the pause between attempts."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._failures = 0

    def pause(self, error: FleetUnavailable) -> float:
        """Seconds to wait after one more failure."""
        first, longest = _BACKOFF
        if self._failures == 0:
            logger.warning("server unavailable", extra={"server": self._server, "error": error.message})
        self._failures += 1
        return min(first * float(2 ** min(self._failures - 1, 10)), longest)

    def over(self) -> None:
        """The server answered."""
        if self._failures:
            logger.info("server available again", extra={"server": self._server, "failures": self._failures})
        self._failures = 0


def open_transport(settings: Settings, rules: Rules, name: str) -> Transport:
    """The transport for the broker in `settings`."""
    keep_record, durability = rules.topology.limits.keep_record, rules.topology.limits.durability
    if settings.broker.startswith("amqp"):
        from broker.rabbitmq import RabbitTransport  # routers of other brokers start sooner without aio-pika

        return RabbitTransport(
            broker=settings.broker,
            state=settings.state,
            name=name,
            keep_record=keep_record,
            queues=lambda: rules.topology.hardware.keys(),
            durability=durability,
        )
    return ValkeyTransport(
        broker=settings.broker, state=settings.state, name=name, keep_record=keep_record, durability=durability
    )


def open_queue_mover(settings: Settings) -> QueueMover:
    """The class queues of the broker that `settings` name, for moving what waits in them."""
    if settings.broker.startswith("amqp"):
        from broker.rabbitmq import RabbitQueueMover

        return RabbitQueueMover(broker=settings.broker, state=settings.state)
    return ValkeyQueueMover(broker=settings.broker, state=settings.state)
