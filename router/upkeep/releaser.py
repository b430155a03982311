"""Places held jobs while queues have capacity: by weighted fair turns between tenants, by deadline within one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from broker.valkey.forwarding import Drawn
from broker.valkey.processes import Leadership
from broker.valkey.queues import ValkeyTransport
from router.decide.cost import has_capacity
from router.decide.facts import BEAT
from router.decide.fairness import RELEASE_TICK, FairOrder, Releasable, kind_of
from router.service.admission import Place, Rules
from router.service.decision import End, decide_held
from router.service.events import end_all
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from router.upkeep.leader import Duty
from taxiway.errors import ModelUnavailableError, UnknownModelError

RELEASE_LEASE = 5.0
"""Seconds after which jobs that a router drew and did not place return to holding: it may have died."""

_CHUNKS = (16, 64, 256)  # jobs drawn in consecutive draws from one queue; surplus jobs are returned


@dataclass(eq=False)
class Releaser(Duty):
    """Releases held jobs. `placed` is called for each job that leaves holding for a queue."""

    leadership: Leadership
    rules: Rules
    store: RouterStore
    transport: ValkeyTransport
    fleet: FleetReader
    placed: Callable[[Place], None]
    _expected: bool = False
    _began: float = 0.0

    def __post_init__(self) -> None:
        super().__init__(BEAT)
        self._order = FairOrder(self.rules.topology.tenants)
        self._batch = max(hardware.max_batch for hardware in self.rules.topology.hardware.values())

    def wake(self) -> None:
        """Signal that a job is about to be held."""
        self._expected = True
        if self.pause > RELEASE_TICK:
            super().wake()

    async def tick(self) -> None:
        """Release, while the fleet's facts show held jobs."""
        if not self._expected and not self.fleet.working.held.seconds.any():
            self.pause = BEAT
            return
        began, held = time.monotonic(), True
        if self.pause == RELEASE_TICK:
            self.fleet.shares.record_interval(began - self._began)
        self._began, self.pause = began, RELEASE_TICK
        self._expected = False
        try:
            held = await self._release_due()
        finally:
            self._expected = self._expected or held

    async def _release_due(self) -> bool:
        """Release as many jobs as fill the queues to their horizons; returns whether any were held."""
        survey = await self.store.holding.survey()
        if not survey.queues or self.fleet.working.fleet.stale:
            return False
        self.fleet.replace_work(survey.work)
        found = [Releasable(*one, kind) for one in survey.queues if (kind := kind_of(one[0])) is not None]
        self._order.set_present(one.kind.tenant for one in found)
        ready = {one: 0 for one in found if one.due <= survey.now or self._has_capacity(one)}
        until = time.monotonic() + BEAT
        while ready and time.monotonic() < until:
            first = self._order.next(ready)
            chunk = _CHUNKS[min(ready[first], len(_CHUNKS) - 1)]
            if await self._release(first, chunk):
                ready[first] += 1
            else:
                del ready[first]
        return True

    def _has_capacity(self, held: Releasable) -> bool:
        """Whether a job of the queue may be placed now. If its model is gone it may, to notify its submitter."""
        working = self.fleet.working
        try:
            table = working.table(self.rules.catalogue.resolve(held.kind.model), held.kind.constraints)
        except (UnknownModelError, ModelUnavailableError):
            return True
        work_limit = working.tenants.shares.work_limit(held.kind.tenant)
        return has_capacity(table, held.level, working.ahead(released=True), work_limit=work_limit)

    async def _release(self, held: Releasable, most: int) -> bool:
        """Place the queue's first jobs, up to `most`; returns whether there may be capacity for more of them."""
        now, drawn = await self.store.holding.draw(self.leadership.token, held.name, most, RELEASE_LEASE)
        expected_batch = min(held.jobs, self._batch)
        decisions = [self._decide(one, now, expected_batch) for one in drawn]
        placed = [one for one in decisions if isinstance(one, Place)]
        bound = [one for one in placed if not one.placement.held]
        ended = [one for one in decisions if isinstance(one, End)]
        endings = [(one.ending, one.after) for one in ended if not one.deviceless]
        self.store.audit.add(one.receipt for one in ended if one.receipt is not None and not one.deviceless)
        back = [one.outgoing.job for one in placed if one.placement.held]
        back += [one.ending.job for one in ended if one.deviceless]
        if bound:
            await self.fleet.forward(self.transport.release, [one.outgoing for one in bound])
        if endings:
            await end_all(self.store, self.transport, endings)
        if back:
            await self.store.holding.give_back(back)
        self._order.charge(held.kind.tenant, sum(one.placement.device_dollars for one in bound))
        return len(drawn) == most and not back

    def _decide(self, drawn: Drawn, now: float, expected_batch: int) -> Place | End:
        decision = decide_held(drawn, self.rules, self.fleet.working, now=now, expected_batch=expected_batch)
        if isinstance(decision, Place) and not decision.placement.held:
            self.placed(decision)
        return decision
