"""Moves waiting jobs between queues: each tick it inspects the queues and carries out `rebalance`'s moves.

Work that cannot move, because it may run only in its class, has devices retargeted to it (`retargeter`).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from broker.port import Moved, MoveStep, Peeked
from broker.valkey.jobs import YieldAnswer, YieldAsk
from broker.valkey.mover import ValkeyQueueMover
from broker.valkey.processes import Leadership
from router.decide.moves.rebalance import Flows, Move, rebalance
from router.decide.moves.waiting import abandoned, backlogged, window_per_level
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import Rules
from router.service.events import MoveTraces, SentEvents
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from router.upkeep.leader import Duty
from router.upkeep.waiting import (
    FIELDS,
    WaitingJob,
    groups_of,
    moves_of_abandoned,
    read_waiting,
    receipts_of,
    relocation_of,
    running_groups,
    steps_of,
)
from tasks.heartbeat import Yieldable
from taxiway.contract.job import JobState

logger = logging.getLogger(__name__)

READ_TOGETHER = 250
"""Messages read before the event loop runs other tasks."""

RUNNING_EXAMINED = 32
"""Running jobs of a class that one tick examines, at random."""

MOVED_AT_ONCE = 100
"""Messages moved together: the most that a dying router leaves half moved, and the size of one call to the server."""


@dataclass(eq=False)
class Mover(Duty):
    """Moves waiting jobs. `moves` counts them by source, target and kind since the start."""

    queue_mover: ValkeyQueueMover
    leadership: Leadership
    fleet: FleetReader
    store: RouterStore
    rules: Rules
    events: SentEvents
    moves: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _flows: Flows = field(default_factory=Flows)

    def __post_init__(self) -> None:
        super().__init__(self.rules.topology.rebalance.tick)

    async def tick(self) -> None:
        """Inspect the queues once, and move."""
        self._flows.begin()
        working, rules = self.fleet.working, self.rules.topology.rebalance
        if working.fleet.stale:
            return
        names = backlogged(working, rules.tick)
        depths, waiting = await self._inspect(names, window_per_level(rules.window, names, working.backlog))
        groups = groups_of([*waiting.values()], working, rules.max_moves_per_job)
        running = {} if working.fleet.draining else await self._running(working)
        groups += running_groups(running.values(), working, rules.max_moves_per_job)
        for _, job in running.values():
            depths[job.queue] = depths.get(job.queue, 0) + 1
        work = {name: working.backlog.levels(name) for name in working.backlog.classes}
        decided = rebalance(groups, work, depths, rules, self._flows.closed(rules.still))
        await self._make([move for move in decided if move.jobs[0] not in running], waiting)
        for move in decided:
            if move.jobs[0] in running:
                await self._relocate(move, *running[move.jobs[0]])
        _, waiting = await self._inspect(abandoned(working), MOVED_AT_ONCE)  # not in queues.yaml any more
        await self._make(moves_of_abandoned(waiting.values(), working), waiting)

    async def _running(self, working: WorkingSnapshot) -> dict[str, tuple[Yieldable, WaitingJob]]:
        """Some of the running jobs that can yield, by id, if there is another class to run them."""
        classes = [name for name in working.backlog.classes if working.fleet.of_class(name)]
        found: dict[str, tuple[Yieldable, WaitingJob]] = {}
        for name in classes if len(classes) > 1 and self.rules.topology.rebalance.max_moves_per_job else ():
            running = [one for device in working.fleet.of_class(name) for one in device.yieldable if one.tag]
            some = random.sample(running, min(len(running), RUNNING_EXAMINED))
            if not some:
                continue
            peeked = await self.queue_mover.held(name, [(one.tag, one.level) for one in some])
            fields = await self.queue_mover.records([one.job for one in some], FIELDS)
            now, catalogue = self.store.clock.now(), self.rules.catalogue
            for one, message, record in zip(some, peeked, fields, strict=True):
                job = message and read_waiting(message, record, catalogue, now, JobState.RUNNING)
                if job:
                    found[one.job] = one, job
        return found

    async def _relocate(self, move: Move, running: Yieldable, job: WaitingJob) -> None:
        """Ask a running job to yield and go on in another class, while this router leads."""
        now = self.store.clock.now()
        steps = steps_of(move, {running.job: job}, now, self.rules)
        await self.store.audit.write(receipts_of(move, steps, {running.job: job}, now, self.rules))
        for step in steps:
            ask = YieldAsk(running.job, running.token, move.reason, to=relocation_of(step, running.tag))
            if await self.leadership.campaign() and (await self.store.jobs.ask_to_yield([ask]))[0] is YieldAnswer.ASKED:
                self.events.add(running.job, step.queue, step.envelope)
                await self._note([_moved(move, 1, now)])
        self._flows.note([move])

    async def _inspect(self, names: Sequence[str], most: int) -> tuple[dict[str, int], dict[str, WaitingJob]]:
        """The queue depth of each of these classes, and by id the movable jobs among those that its queue serves last.

        Up to `most` of each level are read.
        """
        depths, waiting = {}, dict[str, WaitingJob]()
        for name in names:
            depths[name], messages = await self.queue_mover.peek(name, most)
            for start in range(0, len(messages), READ_TOGETHER):
                for job in await self._read(messages[start : start + READ_TOGETHER]):
                    waiting.setdefault(job.peeked.job, job)
        return depths, waiting

    async def _read(self, messages: Sequence[Peeked]) -> list[WaitingJob]:
        fields = await self.queue_mover.records([one.job for one in messages], FIELDS)
        now = self.store.clock.now()
        pairs = zip(messages, fields, strict=True)
        jobs = (read_waiting(message, record, self.rules.catalogue, now) for message, record in pairs)
        return [job for job in jobs if job is not None]

    async def _make(self, decided: Sequence[Move], waiting: dict[str, WaitingJob]) -> None:
        now, made = self.store.clock.now(), []
        for move in decided:
            steps = steps_of(move, waiting, now, self.rules)
            await self.store.audit.write(receipts_of(move, steps, waiting, now, self.rules))
            traces = MoveTraces(move, steps)
            outcomes = await self._move(steps)
            moved = [step for step, done in zip(steps, outcomes, strict=True) if done]
            traces.end(moved)
            for step in moved:
                self.events.add(step.peeked.job, step.queue, step.envelope)
            if moved:
                made.append(_moved(move, len(moved), now))
        self._flows.note(decided)
        await self._note(made)

    async def _move(self, steps: Sequence[MoveStep]) -> list[bool]:
        """Move while this router leads; returns which messages moved."""
        done: list[bool] = []
        for start in range(0, len(steps), MOVED_AT_ONCE):
            token = await self.leadership.campaign()  # deciding may have taken longer than the lease
            if not token:
                break
            done += await self.queue_mover.move(token, steps[start : start + MOVED_AT_ONCE])
        return done + [False] * (len(steps) - len(done))

    async def _note(self, made: Sequence[Moved]) -> None:
        for moved in made:
            self.moves[moved.source, moved.target, moved.kind] += moved.jobs
            logger.info("moved", extra=msgspec.structs.asdict(moved))
        if made:
            await self.queue_mover.note_moves(made)


def _moved(move: Move, jobs: int, now: float) -> Moved:
    return Moved(at=now, source=move.source, target=move.target, kind=move.kind, jobs=jobs, reason=move.reason)
