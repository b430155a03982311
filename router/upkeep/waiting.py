"""Waiting jobs as the leader sees them, and the steps that move them. No I/O.

Messages and their records become groups of similar jobs, for `rebalance` to decide on; a decided move becomes one step
per job.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from broker.port import MoveStep, Peeked
from broker.valkey.forwarding import addressed
from broker.valkey.jobs import Relocation
from router.decide.basis import read_basis
from router.decide.classify import Needs
from router.decide.cost import horizon
from router.decide.moves.rebalance import Group, Kind, Move
from router.decide.moves.waiting import Queued, group_by_kind, magnitude
from router.decide.placement import Placement, choose, seed_of
from router.decide.working_snapshot import WorkingSnapshot, shown
from router.service.admission import Rules
from tasks.heartbeat import Yieldable
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.queues.locality import labels_of
from tasks.queues.receipts import EARLIER, PlacementReceipt, lacking
from tasks.ticket import TicketError, attach, read_ticket
from taxiway.contract.job import JobState, MoveRecord, decode_moves
from taxiway.contract.keys import work_cell
from taxiway.contract.wire import HEADER, Envelope, encode_envelope
from taxiway.errors import InvalidRequestError, ModelUnavailableError, TaxiwayError, UnknownModelError

FIELDS = ("state", "model", "hardware_class", "variant", "level", "deadline_at", "work", "basis", "moves")
"""Fields of a job's record that are read for this."""

TOGETHER = 16
"""Most jobs of a class that is gone that move by one choice; the next choice counts them as work ahead."""


@dataclass(frozen=True, slots=True)
class WaitingJob(Queued):
    """One waiting job: its message, and its record's content."""

    peeked: Peeked
    model: Model
    needs: Needs
    variant: str
    moves: tuple[MoveRecord, ...]

    @classmethod
    def of(
        cls, peeked: Peeked, model: Model, needs: Needs, variant: str, work: float, moves: tuple[MoveRecord, ...]
    ) -> WaitingJob:
        """The job of a message; its record says the rest."""
        sizes = (needs.rows, magnitude(needs.size), magnitude(needs.deadline))
        kind = (peeked.queue, needs.level, model.id, variant, needs.constraints, *sizes)
        return cls(peeked.queue, peeked.level, work, kind, peeked, model, needs, variant, moves)


def read_waiting(
    peeked: Peeked, fields: Mapping[str, str], catalogue: Catalogue, now: float, state: JobState = JobState.QUEUED
) -> WaitingJob | None:
    """The job of a message; None if it must not be moved: another release placed it, or it is not in this state."""
    basis = read_basis(fields.get("basis", ""))
    if basis is None or fields.get("state") != state or fields.get("hardware_class") != peeked.queue:
        return None
    try:
        model = catalogue.resolve(fields.get("model", ""))
        moves = decode_moves(fields.get("moves", "[]"))
    except (UnknownModelError, ModelUnavailableError, msgspec.MsgspecError):
        return None
    deadline_at = float(fields["deadline_at"])
    needs = replace(basis.needs, deadline=deadline_at - now if deadline_at else None, level=int(fields["level"]))
    return WaitingJob.of(peeked, model, needs, fields["variant"], float(fields["work"]), moves)


def moves_of_abandoned(jobs: Iterable[WaitingJob], working: WorkingSnapshot) -> list[Move]:
    """Moves of such classes' jobs, given in the order of `peek`, to where they would be placed now.

    Those that would be held or refused stay. The moved work is added to the backlog.
    """
    kinds: dict[Hashable, list[WaitingJob]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).insert(0, job)
    moves: list[Move] = []
    for alike in sorted(kinds.values(), key=lambda alike: alike[0].level):
        while alike and (placement := _placed_now(alike[0], working)) is not None:
            count = min(_fitting(placement), TOGETHER, len(alike))
            moves.append(_move_to(placement, alike[:count]))
            working.backlog.add(placement.candidate.hardware_class, placement.level, count * placement.work)
            del alike[:count]
    return moves


def groups_of(jobs: Sequence[WaitingJob], working: WorkingSnapshot, max_moves_per_job: int) -> list[Group]:
    """Groups of the jobs, given in the order of `peek`: within each queue and level, last served first."""
    groups = (_group(members, working, max_moves_per_job) for members in group_by_kind(jobs, working.backlog))
    return [group for group in groups if group is not None]


def running_groups(
    running: Iterable[tuple[Yieldable, WaitingJob]], working: WorkingSnapshot, max_moves_per_job: int
) -> list[Group]:
    """A group of each running job that can yield."""
    groups = []
    for described, job in running:
        rest = replace(job, needs=_needs_of_rest(described, job.needs))
        group = _group([(rest, 0.0)], working, max_moves_per_job - described.cuts)
        if group is not None:
            groups.append(replace(group, repeats=described.redo, kind=described.kind))
    return groups


def _needs_of_rest(described: Yieldable, needs: Needs) -> Needs:
    """The needs of a running job's next run; what is written of a generation counts as part of its prompt."""
    whole = max(described.run + described.left, 1e-9)
    if needs.longest:
        share = described.left / whole
        return replace(needs, output=round(needs.output * share), longest=round(needs.longest * share))
    return replace(needs, size=needs.size * min((described.left + described.redo) / whole, 1.0))


def relocation_of(step: MoveStep, tag: str) -> Relocation:
    """The step of a running job, whose message its worker holds under the tag."""
    message = encode_envelope(addressed(step.envelope, step.queue, step.peeked.level))
    return Relocation(tag, step.queue, message, step.fields)


def steps_of(move: Move, waiting: Mapping[str, WaitingJob], now: float, rules: Rules) -> list[MoveStep]:
    """The steps of a move: each job's message under a new ticket, and its record's new fields.

    A message without a ticket of our routers is left where it is: a worker refuses it there.
    """
    steps = (_step(move, waiting[job], now, rules) for job in move.jobs)
    return [step for step in steps if step is not None]


def receipts_of(
    move: Move, steps: Iterable[MoveStep], waiting: Mapping[str, WaitingJob], now: float, rules: Rules
) -> list[PlacementReceipt]:
    """A receipt for each step of a job that has labels."""
    jobs = (waiting[step.peeked.job] for step in steps)
    labelled = ((job, labels_of(job.needs.constraints.locality)) for job in jobs if job.needs.constraints.locality)
    return [
        PlacementReceipt(
            job=job.peeked.job,
            event="moved",
            at=now,
            labels=dict.fromkeys(labels, (EARLIER,)),
            lacking=lacking(labels, rules.topology),
            hardware_class=move.target,
            source=move.source,
            move=len(job.moves) + 1,
            model=job.model.id,
        )
        for job, labels in labelled
    ]


def _group(members: Sequence[tuple[WaitingJob, float]], working: WorkingSnapshot, most: int) -> Group | None:
    """The group of similar jobs, with the needs of the one served last; None if none of them may move.

    The bound on moves keeps jobs from bouncing; what waits where nothing serves it may move again.
    """
    last, ahead = members[0]
    here = (last.peeked.queue, last.variant)
    table = working.table(last.model, last.needs.constraints)
    names = [(c.hardware_class, c.variant_name) for c in table.candidates]
    if here not in names:
        table = working.table(last.model, last.needs.constraints, here)
        names = [(c.hardware_class, c.variant_name) for c in table.candidates]
    if here not in names:
        return None
    stranded = most > 0 and not table.live[names.index(here)]
    free = tuple(job.peeked.job for job, _ in reversed(members) if len(job.moves) < most or stranded)
    if not free:
        return None
    return Group(table, last.needs, names.index(here), ahead, free)


def _placed_now(job: WaitingJob, working: WorkingSnapshot) -> Placement | None:
    """Where the job would be placed if it came now; None if it would be held or refused."""
    try:
        table = working.table(job.model, job.needs.constraints)
        placement = choose(table, job.needs, working.ahead(released=True), seed=seed_of(job.peeked.job))
    except TaxiwayError:
        return None
    return None if placement.held else placement


def _fitting(placement: Placement) -> int:
    """How many such jobs the queue takes before it is past its horizon; at least one."""
    index, table = placement.index, placement.table
    free = float(horizon(table, placement.needs)[index] - placement.figures.wait[index])
    return 1 + int(min(max(free * float(table.servers[index]) / max(placement.work, 1e-9), 0.0), 1e9))


def _move_to(placement: Placement, jobs: Sequence[WaitingJob]) -> Move:
    source = jobs[0].queue
    return Move(
        kind=Kind.RESCUE,
        source=source,
        target=placement.candidate.hardware_class,
        variant=placement.candidate.variant_name,
        level=placement.level,
        jobs=tuple(job.peeked.job for job in jobs),
        work=placement.work,
        cost=placement.cost,
        reason=f"{Kind.RESCUE}: {source} is not in queues.yaml; {placement.reason}",
    )


def _step(move: Move, job: WaitingJob, now: float, rules: Rules) -> MoveStep | None:
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
    return MoveStep(job.peeked, move.target, envelope, fields)


def _ordered(target: str, variant: str, reason: str, envelope: Envelope, rules: Rules) -> Envelope:
    """The message under a ticket that includes its new class."""
    body = envelope.payload()
    old = read_ticket(envelope.headers.get(HEADER), body, rules.secret)
    hardware = rules.topology.hardware[target]
    tariff = hardware.price.tariff
    unsigned = msgspec.structs.replace(
        old,
        variants={**old.variants, target: variant},
        prices={**old.prices, target: hardware.dollars_per_hour},
        tariffs=old.tariffs if tariff is None else {**old.tariffs, target: tariff},
        reason=reason,
    )
    text = shown(old.model, target, variant, reason)
    placed = msgspec.structs.replace(envelope, headers={**envelope.headers, "kwargsrepr": text})
    attach(unsigned, placed, body, rules.secret)
    return placed
