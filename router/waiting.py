"""What the leader does with waiting work: it moves it between queues, and releases what is held.

Each tick it inspects the queues and carries out `rebalance`'s moves: messages and their records become groups of
similar jobs, which `rebalance` decides on. Work that cannot move, because it may run only in its class, has devices
retargeted to it (`upkeep.Retargeter`). Held jobs are placed while queues have capacity.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, TypeVar

import msgspec

from broker.port import Moved, Peeked, QueueMover, Step, Transport
from broker.valkey.forwarding import Drawn, HoldingQueue
from broker.valkey.leader import Leadership
from router.decide.classify import Needs
from router.decide.cost import has_capacity
from router.decide.explain import read_basis
from router.decide.fairness import FairOrder, Releasable, kind_of
from router.decide.rebalance import Flows, Group, Move, rebalance
from router.decide.snapshot import Backlog
from router.decide.working_snapshot import TOLERANCE, WorkingSnapshot, shown
from router.service.admission import Admitted, Rules
from router.service.decision import Decision, decide_held
from router.service.events import MoveTraces, SentEvents
from router.service.snapshot_reader import BEAT, FleetReader
from router.service.store import Store
from router.upkeep import Duty
from tasks.models.catalogue import Catalogue, Model
from tasks.ticket import TicketError, read_ticket, sign
from taxiway.contract.job import JobState, MoveRecord, read_moves
from taxiway.contract.keys import work_cell
from taxiway.contract.wire import HEADER, Envelope
from taxiway.errors import InvalidRequestError, ModelUnavailableError, UnknownModelError

FIELDS = ("state", "model", "hardware_class", "variant", "level", "deadline_at", "work", "basis", "moves")
"""Fields of a job's record that are read for this."""

_ALIKE = 2.0  # sizes and times left within this factor count as equal; at 1.5 a tick takes 50 % longer


class Queued(Protocol):
    """A job in a class's queue: `work` is its device seconds there, `kind` is equal for similar jobs."""

    @property
    def queue(self) -> str:
        """The class that it waits for."""

    @property
    def level(self) -> int:
        """Its level there."""

    @property
    def work(self) -> float:
        """Its device seconds there."""

    @property
    def kind(self) -> Hashable:
        """What jobs of one group have in common."""


Q = TypeVar("Q", bound=Queued)


@dataclass(frozen=True, slots=True)
class Waiting:
    """One waiting job: its message, and its record's content. `work` is device seconds in its present class."""

    peeked: Peeked
    model: Model
    needs: Needs
    variant: str
    work: float
    moves: tuple[MoveRecord, ...]

    @property
    def queue(self) -> str:
        """As `Queued.queue`."""
        return self.peeked.queue

    @property
    def level(self) -> int:
        """As `Queued.level`."""
        return self.peeked.level

    @property
    def kind(self) -> Hashable:
        """As `Queued.kind`."""
        needs = self.needs
        sizes = (needs.rows, magnitude(needs.size), magnitude(needs.deadline))
        return (self.queue, needs.level, self.model.id, self.variant, needs.constraints, *sizes)


def read_waiting(peeked: Peeked, fields: Mapping[str, str], catalogue: Catalogue, now: float) -> Waiting | None:
    """The job of a message; None if it must not be moved: another release placed it, or it is not waiting."""
    basis = read_basis(fields.get("basis", ""))
    if basis is None or fields.get("state") != JobState.QUEUED or fields.get("hardware_class") != peeked.queue:
        return None
    try:
        model = catalogue.resolve(fields.get("model", ""))
        moves = read_moves(fields.get("moves", ""))
    except (UnknownModelError, ModelUnavailableError, msgspec.MsgspecError):
        return None
    deadline_at = float(fields["deadline_at"])
    needs = replace(basis.needs, deadline=deadline_at - now if deadline_at else None, level=int(fields["level"]))
    return Waiting(peeked, model, needs, fields["variant"], float(fields["work"]), moves)


def backlogged(working: WorkingSnapshot, tick: float) -> list[str]:
    """The classes with more work than they serve within a tick; empty if all work is on the only live class."""
    devices = {name: len(working.fleet.of_class(name)) for name in working.backlog.classes}
    behind = [name for name, live in devices.items() if sum(working.backlog.levels(name)) > tick * live]
    return behind if any(live for name, live in devices.items() if behind != [name]) else []


def window_per_level(window: int, names: Sequence[str], backlog: Backlog) -> int:
    """Jobs to inspect at each level of these queues: one window, shared by the levels that have work."""
    filled = sum(seconds > TOLERANCE for name in names for seconds in backlog.levels(name))
    return max(window // max(filled, 1), 1)


def group_by_kind(jobs: Iterable[Q], backlog: Backlog) -> list[list[tuple[Q, float]]]:
    """The jobs by kind, each with the device seconds served before it.

    They arrive in the order of `QueueMover.peek` and keep it: within each queue and level, last served first.
    """
    before = {name: list(accumulate(backlog.levels(name))) for name in backlog.classes}
    kinds: dict[Hashable, list[tuple[Q, float]]] = {}
    for job in jobs:
        levels = before[job.queue]
        levels[job.level] -= job.work
        kinds.setdefault(job.kind, []).append((job, max(levels[job.level], 0.0)))
    return list(kinds.values())


def groups_of(jobs: Sequence[Waiting], working: WorkingSnapshot, max_moves_per_job: int) -> list[Group]:
    """Groups of the jobs, given in the order of `QueueMover.peek`: within each queue and level, last served first."""
    groups = (_group(members, working, max_moves_per_job) for members in group_by_kind(jobs, working.backlog))
    return [group for group in groups if group is not None]


def steps_of(move: Move, waiting: Mapping[str, Waiting], now: float, rules: Rules) -> list[Step]:
    """The steps of a move: each job's message under a new ticket, and its record's new fields.

    A message without a ticket of our routers is left where it is: a worker refuses it there.
    """
    steps = (_step(move, waiting[job], now, rules) for job in move.jobs)
    return [step for step in steps if step is not None]


def rest_of_move(peeked: Peeked, fields: Mapping[str, str], rules: Rules) -> Step | None:
    """The remaining step of a move whose router died after it changed the record; None if there is none.

    Possible only if messages and records are stored apart (RabbitMQ). If the copy was published already, only one of
    them runs.
    """
    target = fields.get("hardware_class", "")
    if fields.get("state") != JobState.QUEUED or target == peeked.queue or target not in rules.topology.hardware:
        return None
    try:
        moves = read_moves(fields.get("moves", ""))
        if not moves or (moves[-1].source, moves[-1].target) != (peeked.queue, target):
            return None
        envelope = _ordered(target, fields["variant"], moves[-1].reason, peeked.envelope, rules)
    except (TicketError, InvalidRequestError, msgspec.MsgspecError):
        return None
    return Step(peeked, target, envelope)


def magnitude(value: float | None) -> int | None:
    """Equal for values within the factor `_ALIKE`: sizes, and times left."""
    return None if value is None else round(math.log(max(value, 1e-3), _ALIKE))


def _group(members: Sequence[tuple[Waiting, float]], working: WorkingSnapshot, most: int) -> Group | None:
    """The group of similar jobs, with the needs of the one served last; None if none of them may move."""
    last, ahead = members[0]
    here = (last.peeked.queue, last.variant)
    table = working.table(last.model, last.needs.constraints)
    names = [(c.hardware_class, c.variant_name) for c in table.candidates]
    if here not in names:
        table = working.table(last.model, last.needs.constraints, here)
        names = [(c.hardware_class, c.variant_name) for c in table.candidates]
    free = tuple(job.peeked.job for job, _ in reversed(members) if len(job.moves) < most)
    if here not in names or not free:
        return None
    return Group(table, last.needs, names.index(here), ahead, free)


def _step(move: Move, job: Waiting, now: float, rules: Rules) -> Step | None:
    try:
        envelope = _ordered(move.target, move.variant, move.reason, job.peeked.envelope, rules)
    except (TicketError, InvalidRequestError):
        return None
    made = MoveRecord(at=now, source=move.source, target=move.target, kind=move.kind, reason=move.reason)
    fields = {
        "hardware_class": move.target,
        "variant": move.variant,
        "reason": move.reason,
        "cell": work_cell(move.target, move.level),
        "work": repr(move.work),
        "moves": msgspec.json.encode((*job.moves, made)).decode(),
    }
    return Step(job.peeked, move.target, envelope, fields)


def _ordered(target: str, variant: str, reason: str, envelope: Envelope, rules: Rules) -> Envelope:
    """The message under a ticket that includes its new class."""
    body = envelope.payload()
    old = read_ticket(envelope.headers.get(HEADER), body, rules.secret)
    price = rules.topology.hardware[target].price
    unsigned = msgspec.structs.replace(
        old,
        variants={**old.variants, target: variant},
        prices={**old.prices, target: price.usd_per_hour},
        tariffs=old.tariffs if price.tariff is None else {**old.tariffs, target: price.tariff},
        reason=reason,
    )
    text = shown(old.model, target, variant, reason)
    headers = {**envelope.headers, HEADER: sign(unsigned, body, rules.secret), "kwargsrepr": text}
    return msgspec.structs.replace(envelope, headers=headers)


logger = logging.getLogger(__name__)

AT_ONCE = 250
"""Messages read before the event loop runs other tasks."""

MOVED_AT_ONCE = 100
"""Messages moved together: the most that a dying router leaves half moved, and the size of one call to the server."""


class Mover(Duty):
    """Moves waiting jobs. `moves` counts them by source, target and kind since the start."""

    def __init__(
        self,
        queue_mover: QueueMover,
        leadership: Leadership,
        fleet: FleetReader,
        store: Store,
        rules: Rules,
        events: SentEvents,
    ) -> None:
        super().__init__(rules.topology.rebalance.tick)
        self.moves: Counter[tuple[str, ...]] = Counter()
        self._queue_mover = queue_mover
        self._leadership = leadership
        self._fleet = fleet
        self._store = store
        self._rules = rules
        self._events = events
        self._flows = Flows()

    async def tick(self) -> None:
        """Inspect the queues once, and move."""
        self._flows.begin()
        working, rules = self._fleet.working, self._rules.topology.rebalance
        if working.fleet.stale:
            return
        try:
            depths, waiting = await self._inspect()
            groups = groups_of([*waiting.values()], working, rules.max_moves_per_job)
            work = {name: working.backlog.levels(name) for name in working.backlog.classes}
            decided = rebalance(groups, work, depths, rules, self._flows.closed(rules.still))
            await self._make(decided, waiting)
        finally:
            await self._queue_mover.put_back()

    async def _inspect(self) -> tuple[dict[str, int], dict[str, Waiting]]:
        """The queue depth of each class, and by id the movable jobs among those that its queue serves last.

        On RabbitMQ a job may be in the queue twice: one of the two copies is moved.
        """
        depths, waiting = {}, dict[str, Waiting]()
        working, rules = self._fleet.working, self._rules.topology.rebalance
        names = backlogged(working, rules.tick)
        most = window_per_level(rules.window, names, working.backlog)
        for name in names:
            shown = await self._queue_mover.peek(name, most)
            depths[name] = shown.depth
            for start in range(0, len(shown.messages), AT_ONCE):
                read = await self._read(shown.messages[start : start + AT_ONCE])
                for job in read:
                    waiting.setdefault(job.peeked.job, job)
        return depths, waiting

    async def _read(self, messages: Sequence[Peeked]) -> list[Waiting]:
        fields = await self._queue_mover.records([one.job for one in messages], FIELDS)
        now = self._store.now()
        pairs = list(zip(messages, fields, strict=True))
        cut = (rest_of_move(one, its, self._rules) for one, its in pairs)
        await self._move([step for step in cut if step is not None])
        seen = (read_waiting(one, its, self._rules.catalogue, now) for one, its in pairs)
        return [job for job in seen if job is not None]

    async def _make(self, decided: Sequence[Move], waiting: dict[str, Waiting]) -> None:
        now, made = self._store.now(), []
        for move in decided:
            steps = steps_of(move, waiting, now, self._rules)
            traces = MoveTraces(move, steps)
            done = await self._move(steps)
            gone = [step for step, moved in zip(steps, done, strict=True) if moved]
            traces.end(gone)
            for step in gone:
                self._events.add(step.peeked.job, step.queue, step.envelope)
            if gone:
                made.append(_moved(move, len(gone), now))
        self._flows.note(decided)
        await self._note(made)

    async def _move(self, steps: Sequence[Step]) -> list[bool]:
        """Move while this router leads; returns which messages moved."""
        done: list[bool] = []
        for start in range(0, len(steps), MOVED_AT_ONCE):
            token = await self._leadership.campaign()  # deciding may have taken longer than the lease
            if not token:
                break
            done += await self._queue_mover.move(token, steps[start : start + MOVED_AT_ONCE])
        return done + [False] * (len(steps) - len(done))

    async def _note(self, made: Sequence[Moved]) -> None:
        for moved in made:
            self.moves[moved.source, moved.target, moved.kind] += moved.jobs
            logger.info("moved", extra=msgspec.structs.asdict(moved))
        if made:
            await self._queue_mover.note_moves(made)


def _moved(move: Move, jobs: int, now: float) -> Moved:
    return Moved(at=now, source=move.source, target=move.target, kind=move.kind, jobs=jobs, reason=move.reason)


RELEASE_TICK = 0.02
"""Seconds between two ticks while jobs are held: queues are kept filled to their horizon, which may be short."""

RELEASE_LEASE = 5.0
"""Seconds after which jobs that a router drew and did not place return to holding: it may have died."""

_CHUNKS = (16, 64, 256)  # jobs drawn in consecutive draws from one queue; surplus jobs are returned


class Releaser(Duty):
    """Releases held jobs. `placed` is called for each job that leaves holding for a queue."""

    def __init__(
        self,
        leadership: Leadership,
        rules: Rules,
        store: Store,
        transport: Transport,
        fleet: FleetReader,
        *,
        placed: Callable[[Admitted], None],
    ) -> None:
        super().__init__(BEAT)
        self._leadership = leadership
        self._rules = rules
        self._store = store
        self._transport = transport
        self._fleet = fleet
        self._placed = placed
        self._order = FairOrder(rules.topology.tenants)
        self._batch = max(hardware.max_batch for hardware in rules.topology.hardware.values())
        self._expected = False
        self._began = 0.0

    def wake(self) -> None:
        """Signal that a job is about to be held."""
        self._expected = True
        if self.pause > RELEASE_TICK:
            super().wake()

    async def tick(self) -> None:
        """Release, while the fleet's facts show held jobs."""
        if not self._expected and not self._fleet.working.held.seconds.any():
            self.pause = BEAT
            return
        began, held = time.monotonic(), True
        if self.pause == RELEASE_TICK:
            self._fleet.shares.record_interval(began - self._began)
        self._began, self.pause = began, RELEASE_TICK
        self._expected = False
        try:
            held = await self._release_due()
        finally:
            self._expected = self._expected or held

    async def _release_due(self) -> bool:
        """Release as many jobs as fill the queues to their horizons; returns whether any were held."""
        survey = await self._store.survey()
        if not survey.queues or self._fleet.working.fleet.stale:
            return False
        self._fleet.replace_work(survey.work)
        found = [one for queue in survey.queues if (one := _releasable(queue)) is not None]
        self._order.set_present(one.kind.tenant for one in found)
        ready = {one: 0 for one in found if one.queue.due <= survey.now or self._has_capacity(one)}
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
        working = self._fleet.working
        try:
            table = working.table(self._rules.catalogue.resolve(held.kind.model), held.kind.constraints)
        except (UnknownModelError, ModelUnavailableError):
            return True
        work_limit = working.tenants.shares.work_limit(held.kind.tenant)
        return has_capacity(table, held.queue.level, working.ahead(released=True), brief=work_limit)

    async def _release(self, held: Releasable, most: int) -> bool:
        """Place the queue's first jobs, up to `most`; returns whether there may be capacity for more of them."""
        now, drawn = await self._store.draw(self._leadership.token, held.queue.name, most, RELEASE_LEASE)
        company = min(held.queue.jobs, self._batch)
        decisions = [self._decide(one, now, company) for one in drawn]
        admitted = [d.admitted for d in decisions if d.admitted is not None]
        bound = [one for one in admitted if not one.placement.held]
        endings = [d.ending for d in decisions if d.ending is not None and not d.deviceless]
        back = [one.outgoing.job for one in admitted if one.placement.held]
        back += [d.ending.job for d in decisions if d.ending is not None and d.deviceless]
        await self._forward(bound)
        if endings:
            await self._store.finish(endings)
        if back:
            await self._store.give_back(back)
        self._order.charge(held.kind.tenant, sum(one.placement.device_dollars for one in bound))
        return len(drawn) == most and not back

    def _decide(self, drawn: Drawn, now: float, company: int) -> Decision:
        decision = decide_held(drawn, self._rules, self._fleet.working, now=now, company=company)
        if decision.admitted is not None and not decision.admitted.placement.held:
            self._placed(decision.admitted)
        return decision

    async def _forward(self, bound: Sequence[Admitted]) -> None:
        if bound:
            snapshots = self._fleet.snapshots()
            await self._transport.release([one.outgoing for one in bound], snapshots)
            self._fleet.mark_stored(snapshots)


def _releasable(queue: HoldingQueue) -> Releasable | None:
    kind = kind_of(queue.name)
    return None if kind is None else Releasable(queue, kind)
