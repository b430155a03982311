"""Asks running jobs to yield their slots to more urgent ones that this router placed and that no free slot took."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from broker.port import Moved
from broker.valkey.jobs import YieldAnswer, YieldAsk
from broker.valkey.mover import ValkeyQueueMover
from router.decide.moves.preempt import LET_START, Occupant, Waiter, Yielding, late_rates, penalty, preempt
from router.decide.placement import Placement
from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from taxiway.contract.job import JobState
from taxiway.contract.keys import PATIENT
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

CALLABLE = "python"
"""The runtime whose rows wait for a running callable; all others run beside it."""

FORGET_AFTER = 10.0
"""Seconds for which a request to yield is remembered: no heartbeat lists that run any more."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A placed job that may be late behind running ones; times are on the monotonic clock."""

    job: str
    hardware_class: str
    placed: float
    due: float
    run: float
    penalty: float
    for_callable: bool
    """It waits for a running callable to end, also at the worker that holds both; else for an endpoint's slot."""
    held: str = ""
    """The token of the claim under which a worker holds it."""

    @property
    def place(self) -> tuple[str, str]:
        """The class where it waits, and the worker that holds it, if one does."""
        return self.hardware_class, self.held.rpartition("#")[0]


class Yielder:
    """Watches the urgent jobs that this router placed. `yields` counts requests to yield by class since the start."""

    def __init__(self, fleet: FleetReader, store: RouterStore, queue_mover: ValkeyQueueMover, rules: Rules) -> None:
        self.yields: Counter[tuple[str, ...]] = Counter()
        self._fleet, self._store, self._queue_mover, self._rules = fleet, store, queue_mover, rules
        self._waiting: dict[str, _Waiting] = {}
        self._asked: dict[tuple[str, str], float] = {}  # runs that were asked, or are over: job, token, and when
        self._woken = asyncio.Event()

    def expect(self, job: str, placement: Placement) -> None:
        """Watch a job that was just placed, if others can yield to it: also those that no heartbeat lists yet."""
        needs, candidate = placement.needs, placement.candidate
        name, for_callable = candidate.hardware_class, not candidate.variant.on_endpoint
        if needs.level >= PATIENT or needs.deadline is None:
            return
        if for_callable and candidate.variant.runtime != CALLABLE:
            return
        now, rate = time.monotonic(), late_rates(self._rules.topology)[needs.level]
        run = placement.at_most - float(placement.figures.wait[placement.index])
        value = penalty(rate, placement.work)
        self._waiting[job] = _Waiting(job, name, now, now + needs.deadline, run, value, for_callable)
        self._woken.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self._woken.wait()
            await asyncio.sleep(LET_START)
            with contextlib.suppress(BrokerUnavailableError):  # the consuming loop reports it
                await self.look(time.monotonic())
            if not self._waiting:
                self._woken.clear()

    async def look(self, now: float) -> None:
        """Decide once, at `now` on the monotonic clock, and ask."""
        self._waiting = {job: one for job, one in self._waiting.items() if one.due - one.run > now}
        self._asked = {run: at for run, at in self._asked.items() if now - at < FORGET_AFTER}
        devices = [device for device in self._fleet.working.fleet.devices if device.yieldable]
        occupied = {name for device in devices for name in device.classes}
        due = [
            one for one in self._waiting.values() if now - one.placed >= LET_START and one.hardware_class in occupied
        ]
        due = await self._not_begun(due) if due else due
        for place in {one.place: None for one in due}:
            held = {one.job: one.held for one in due if one.place == place}
            waiters = [Waiter(one.job, one.due - now, one.run, one.penalty) for one in due if one.place == place]
            most = self._rules.topology.rebalance.max_moves_per_job
            decided = preempt(waiters, [*self._occupants(*place)], most=most)
            if decided:
                await self._ask(place[0], decided, held, now)

    async def _not_begun(self, due: Sequence[_Waiting]) -> list[_Waiting]:
        """Those of these jobs that wait, and who holds them now; the others are not watched any more."""
        records = await self._queue_mover.records([one.job for one in due], ("state", "holder"))
        found = []
        for one, record in zip(due, records, strict=True):
            held = record.get("holder", "").partition(" ")[0]
            if record.get("state") != JobState.QUEUED or (held and not one.for_callable):
                self._waiting.pop(one.job, None)
            else:
                found.append(replace(one, held=held))
        return found

    async def _ask(self, name: str, decided: Sequence[Yielding], held: Mapping[str, str], now: float) -> None:
        asks = [
            YieldAsk(one.occupant.job, one.occupant.token, one.reason, one.waiter.job, held[one.waiter.job])
            for one in decided
        ]
        answers = await self._store.jobs.ask_to_yield(asks)
        made = []
        for one, answer in zip(decided, answers, strict=True):
            if answer is not YieldAnswer.NOT_WAITING:
                self._asked[one.occupant.job, one.occupant.token] = now
            if answer is not YieldAnswer.NOT_HELD:
                self._waiting.pop(one.waiter.job, None)
            if answer is YieldAnswer.ASKED:
                made.append(one.reason)
        if made:
            self.yields[name,] += len(made)
            at = self._store.clock.now()
            moved = Moved(at=at, source=name, target=name, kind="yield", jobs=len(made), reason=made[0])
            logger.info("asked to yield", extra={"class": name, "jobs": len(made), "reason": made[0]})
            await self._queue_mover.note_moves([moved])

    def _occupants(self, name: str, worker: str) -> Iterator[Occupant]:
        """The running jobs of a class, or of one worker, that can yield and were not asked yet."""
        topology, now = self._rules.topology, self._store.clock.now()
        hardware, rates = topology.hardware[name], late_rates(topology)
        for device in self._fleet.working.fleet.of_class(name):
            for one in device.yieldable:
                if worker in ("", device.worker) and (one.job, one.token) not in self._asked:
                    yield Occupant(
                        job=one.job,
                        token=one.token,
                        left=one.left,
                        redo=one.redo,
                        due=one.due - now if one.due else math.inf,
                        penalty=penalty(rates[one.level], one.run + one.left),
                        price=hardware.dollars_per_hour / 3600,
                        cuts=one.cuts,
                    )
