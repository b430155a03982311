"""The loop that moves waiting work: one router at a time looks at the queues each tick, and acts on `rebalance`."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

import msgspec

from router.admission import Rules
from router.rebalance import Flows, Move, rebalance
from router.snapshot import FleetReader
from router.store import Store
from router.waiting import FIELDS, Waiting, groups_of, read_waiting, steps_of
from tasks.moving import Moved, Peeked, Yard
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

AT_ONCE = 250
"""Messages that are read before the router's other work gets its turn."""

LEASE = 1.5
"""Ticks that the lead lasts; who waits for it tries twice a tick, so another router leads within two."""


class Mover:
    """Moves waiting jobs while this router leads. `moves` counts them by source, target and kind since the start."""

    def __init__(self, yard: Yard, fleet: FleetReader, store: Store, rules: Rules) -> None:
        self.moves: Counter[tuple[str, ...]] = Counter()
        self._yard = yard
        self._fleet = fleet
        self._store = store
        self._rules = rules
        self._flows = Flows()

    async def run(self) -> None:
        """Tick for ever; while the broker is away nothing moves, and the consuming loop says so."""
        tick = self._rules.topology.rebalance.tick
        while True:
            pause = tick / 2
            try:
                if await self._lead():
                    pause = tick
                    await self.tick()
            except BrokerUnavailableError as error:
                logger.debug("no moves", extra={"error": error.message})
            await asyncio.sleep(pause)

    async def tick(self) -> int:
        """Look once and move; how many jobs moved."""
        self._flows.begin()
        outlook, rules = self._fleet.outlook, self._rules.topology.rebalance
        if outlook.fleet.stale:
            return 0
        try:
            depths, waiting = await self._look()
            groups = groups_of(waiting, outlook, rules.max_moves_per_job)
            work = {name: outlook.backlog.levels(name) for name in outlook.backlog.classes}
            decided = rebalance(groups, work, depths, rules, self._flows.closed(rules.still))
            return await self._make(decided, {job.peeked.job: job for job in waiting})
        finally:
            await self._yard.put_back()

    async def _lead(self) -> str:
        return await self._yard.lead(LEASE * self._rules.topology.rebalance.tick)

    async def _look(self) -> tuple[dict[str, int], list[Waiting]]:
        """How much waits in each class, and the jobs that its queue serves last, as far as they may move."""
        depths, waiting = {}, []
        for name in self._backlogged():
            shown = await self._yard.peek(name, self._rules.topology.rebalance.window)
            depths[name] = shown.depth
            for start in range(0, len(shown.messages), AT_ONCE):
                waiting += await self._read(shown.messages[start : start + AT_ONCE])
        return depths, waiting

    def _backlogged(self) -> list[str]:
        """The classes with more work than they can do within a tick; none where all work is on the only live class."""
        outlook, tick = self._fleet.outlook, self._rules.topology.rebalance.tick
        devices = {name: len(outlook.fleet.of_class(name)) for name in outlook.backlog.classes}
        behind = [name for name, live in devices.items() if sum(outlook.backlog.levels(name)) > tick * live]
        return behind if any(live for name, live in devices.items() if behind != [name]) else []

    async def _read(self, messages: Sequence[Peeked]) -> list[Waiting]:
        fields = await self._yard.records([one.job for one in messages], FIELDS)
        now = self._store.now()
        seen = (read_waiting(one, its, self._rules.catalogue, now) for one, its in zip(messages, fields, strict=True))
        return [job for job in seen if job is not None]

    async def _make(self, decided: Sequence[Move], waiting: dict[str, Waiting]) -> int:
        now, token = self._store.now(), await self._lead()
        made = []
        for move in decided:
            jobs = sum(await self._yard.move(token, steps_of(move, waiting, now, self._rules)))
            if jobs:
                made.append(_moved(move, jobs, now))
        self._flows.note(decided)
        await self._tell(made)
        return sum(moved.jobs for moved in made)

    async def _tell(self, made: Sequence[Moved]) -> None:
        for moved in made:
            self.moves[moved.source, moved.target, moved.kind] += moved.jobs
            logger.info("moved", extra=msgspec.structs.asdict(moved))
        if made:
            await self._yard.tell(made)


def _moved(move: Move, jobs: int, now: float) -> Moved:
    return Moved(at=now, source=move.source, target=move.target, kind=move.kind, jobs=jobs, reason=move.reason)
