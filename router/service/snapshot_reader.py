"""Keeps what a router knows fresh: the fleet snapshot, and the models folder.

It reads the store periodically and counts what this router placed since. `FolderWatch` follows the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import replace

from broker.port import ForwardOutcome, Outgoing, StoredReceipts, StoredSnapshot
from router.decide.basis import pack_snapshot
from router.decide.cost import shadow_prices
from router.decide.facts import BEAT, NONE_MISSED, Arrived, arrived_since, snapshot_from, work_from
from router.decide.fairness import Depths, Shares, Tenants, day_of, depths_from
from router.decide.placement import Placement
from router.decide.plan import NO_PLAN, follow
from router.decide.prefixes import Prefixes
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import TOLERANCE, WorkingSnapshot
from router.service.admission import Rules
from router.service.store import RouterStore
from tasks.heartbeat import DeviceFacts
from tasks.models.discovered import Found, discovered_by
from tasks.models.folder import CHECK_EVERY, ModelsFolder, Reporter
from tasks.models.profiles import ProfileBook
from tasks.topology import Topology
from taxiway.backoff import Outage
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

STALE_AFTER = 3.0
"""Seconds after which a snapshot is too old to decide from."""

FORGET_AFTER = 3600.0
"""Seconds after which a gone device is deleted from the store."""

DISCOVERED = 1024
"""Models without a model.yaml that a router knows."""

_UNSTORED_LIMIT = 8  # snapshots waiting to be stored while nothing can be forwarded: two seconds of them

Forward = Callable[
    [Sequence[Outgoing], Sequence[StoredSnapshot], StoredReceipts | None], Awaitable[list[ForwardOutcome]]
]
"""`ValkeyTransport.forward`, or its `release`."""


class FleetReader:
    """The latest working snapshot, and tenants' `shares`. It is stale until the first read.

    `followed` is the stored plan, `prefixes` are those of placed prompts. `heartbeats` has the time of each device's
    last heartbeat by the store's clock, as of the last read. `discovered` are the models that endpoints announced, by
    name; one stays known after its endpoint has gone.
    """

    def __init__(
        self, store: RouterStore, topology: Topology, book: ProfileBook, starts: Set[str] = frozenset()
    ) -> None:
        self._store = store
        self._topology = topology
        self._book = book
        self._starts = starts
        self._name = uuid.uuid4().hex[:12]
        self._generation = 0
        self._unstored: deque[WorkingSnapshot] = deque(maxlen=_UNSTORED_LIMIT)
        self._used = False
        self.shares = Shares(topology.tenants)
        self.prefixes = Prefixes()
        self._set_fleet(FleetSnapshot(stale=True), Tenants(shares=self.shares))
        self._read_at = -STALE_AFTER
        self._updated_at = time.monotonic()
        self._arrived: Arrived | None = None
        self.heartbeats: Mapping[str, float] = {}
        self.followed = NO_PLAN
        self._missed = NONE_MISSED
        self.discovered: Found = {}

    @property
    def working(self) -> WorkingSnapshot:
        """The fleet at the last read, with the placements here since; `stale` if the read is too old."""
        now = time.monotonic()
        if not self._working.fleet.stale and now - self._read_at > STALE_AFTER:
            self._go_stale()
        if now - self._updated_at > TOLERANCE:
            self._working.advance(now - self._updated_at)
            self._updated_at = now
        return self._working

    @property
    def snapshot(self) -> FleetSnapshot:
        """The same as a frozen `FleetSnapshot`."""
        working = self.working
        return replace(working.fleet, work={name: working.backlog.levels(name) for name in working.backlog.classes})

    def count(self, placement: Placement, tenant: str, job: str) -> None:
        """Count a placement that this router just made; a snapshot's first placement marks it for storing."""
        self._working.count(placement, tenant)
        self._working.depths.underway[job] = placement.candidate.hardware_class
        if not self._used:
            self._used = True
            self._unstored.append(self._working)

    async def read(self) -> None:
        """Read once. On failure the last snapshot remains, marked stale, and the error is raised."""
        try:
            tenants = self._topology.tenants.items()
            facts = await self._store.fleet.facts([name for name, rules in tenants if rules.max_depth is not None])
        except BrokerUnavailableError:
            self._go_stale()
            raise
        self._arrived, self.heartbeats = arrived_since(self._arrived, facts), facts.heartbeats
        self._missed = self._missed.after(facts)
        fleet = snapshot_from(facts, self._missed, self._starts)
        self._discover(fleet.devices)
        before, self.followed = self.followed, follow(facts.plan, facts.now, self.followed)
        if self.followed.why and not before.why:  # once
            logger.warning("plan not followed", extra={"reason": self.followed.why})
        fleet = replace(fleet, plan=self.followed.plan, unplanned=self.followed.why)
        fleet = replace(fleet, rates=self._arrived.rates, shadow=self._working.fleet.shadow)
        fleet = replace(fleet, shadow=shadow_prices(self._topology, fleet))
        known = Tenants(facts.lengths, day_of(facts.now), dict(facts.spent), self.shares)
        self._set_fleet(fleet, known, depths_from(facts.work, facts.open, facts.used, refuses=facts.refuses))
        now = time.monotonic()
        self.shares.decay(now - self._read_at)
        self._read_at = self._updated_at = now
        gone = [name for name, at in facts.heartbeats.items() if facts.now - at > FORGET_AFTER]
        if gone:
            await self._store.fleet.forget_devices(gone)

    async def read_depths(self, tenants: Collection[str]) -> None:
        """Read how many jobs classes and these tenants have: of those counted since the last read, some have ended."""
        underway = self._working.depths.underway.copy()  # the store may have counted these, or not yet
        work, found = await self._store.fleet.depths(tenants)
        depths = self._working.depths
        depths.classes = depths_from(work, found, depths.used).classes
        depths.tenants.update(found)
        for name in (underway | depths.underway).values():
            depths.classes[name] = depths.classes.get(name, 0) + 1

    def replace_work(self, cells: Mapping[str, float]) -> None:
        """Replace the work counted by the figures in the cells of `WORK`, read between two snapshots."""
        self._working.replace_work(*work_from(cells))
        self._updated_at = time.monotonic()

    async def run(self) -> None:
        """Read periodically, indefinitely; an outage is logged once."""
        outage = Outage(logger, "fleet snapshot unavailable")
        while True:
            try:
                await self.read()
                outage.over()
            except BrokerUnavailableError as error:
                outage.pause(error)
            await asyncio.sleep(BEAT)

    def renew(self, topology: Topology, book: ProfileBook) -> None:
        """Use other endpoints, classes and profiles, and the catalogue's present models."""
        self._topology, self._book = topology, book
        self._working.rebuild(topology, book)

    async def forward(self, forward: Forward, placed: Sequence[Outgoing]) -> list[ForwardOutcome]:
        """Forward placed messages with their receipts, and the snapshots that they were placed from, unless stored.

        The receipts of a call whose messages are all copies go again with the next one: it may have done nothing.
        """
        unstored, keep = list(self._unstored), self._topology.limits.keep_explanation
        snapshots = [StoredSnapshot(one.snapshot_name, pack_snapshot(one.fleet), keep) for one in unstored]
        receipts = self._store.audit.sealed(one.receipt for one in placed if one.receipt is not None)
        outcomes = await forward(placed, snapshots, receipts)
        for one in placed:
            self._working.depths.underway.pop(one.job, None)
        if receipts is not None and any(one is not ForwardOutcome.COPY for one in outcomes):
            self._store.audit.written(receipts.lines)
        if unstored:
            self._unstored = deque((one for one in self._unstored if one not in unstored), maxlen=_UNSTORED_LIMIT)
        return outcomes

    def _discover(self, devices: Iterable[DeviceFacts]) -> None:
        found = discovered_by((device.runtimes[0], device.announced) for device in devices if device.announced)
        if any(self.discovered.get(name) != model for name, model in found.items()):
            kept = list((found | {name: one for name, one in self.discovered.items() if name not in found}).items())
            self.discovered = dict(kept[:DISCOVERED])

    def _go_stale(self) -> None:
        self._set_fleet(replace(self._working.fleet, stale=True), self._working.tenants)

    def _set_fleet(self, fleet: FleetSnapshot, tenants: Tenants, depths: Depths | None = None) -> None:
        self._generation += 1
        name = f"{self._name}.{self._generation}"
        self._working = WorkingSnapshot(self._topology, self._book, fleet, name, tenants, depths, self.prefixes)
        self._used = False


class FolderWatch:
    """Checks the folder once a second."""

    def __init__(self, folder: ModelsFolder, rules: Rules, fleet: FleetReader, store: RouterStore, name: str) -> None:
        self.folder = folder
        self._rules = rules
        self._fleet = fleet
        self._store = store
        self._reporter = Reporter(folder.queues, "router", name)

    async def run(self) -> None:
        """Check indefinitely."""
        while True:
            await self.report()
            self.folder.discovered = self._fleet.discovered
            if await asyncio.to_thread(self.folder.look):
                topology = self.folder.queues.topology
                self._rules.renew(topology, self.folder.catalogue, self.folder.book)
                self._fleet.renew(topology, self.folder.book)
            await asyncio.sleep(CHECK_EVERY)

    async def report(self) -> None:
        """Report this router to the store. In an outage, which another loop logs, the folder is still read."""
        plan = self._fleet.followed.plan
        self._reporter.plan = 0 if plan is None else plan.number
        with contextlib.suppress(BrokerUnavailableError):
            self._reporter.apply(await self._store.fleet.watch(self._reporter.arguments()))
