"""What waits in the class queues, as `rebalance` looks at it: messages and records become groups of jobs alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from router.admission import Rules
from router.classify import Needs
from router.explain import read_basis
from router.outlook import Outlook
from router.rebalance import Group, Move
from tasks.catalogue import Catalogue, Model
from tasks.moving import Peeked, Step
from tasks.ticket import TicketError, read_ticket, sign
from taxiway.errors import InvalidRequestError, UnknownModelError
from taxiway.job import JobState, MoveRecord, read_moves
from taxiway.keys import work_cell
from taxiway.wire import HEADER, Envelope

FIELDS = ("state", "model", "hardware_class", "variant", "level", "deadline_at", "work", "basis", "moves")
"""Fields of a job's record that are read for it."""

_ALIKE = 1.5  # sizes and times left within this factor are alike


@dataclass(frozen=True, slots=True)
class Waiting:
    """One waiting job: its message, and what its record says. `work` is device seconds where it waits."""

    peeked: Peeked
    model: Model
    needs: Needs
    variant: str
    work: float
    moves: tuple[MoveRecord, ...]


def read_waiting(peeked: Peeked, fields: Mapping[str, str], catalogue: Catalogue, now: float) -> Waiting | None:
    """The job of a message; None where it is not to be moved: another release placed it, or it does not wait."""
    basis = read_basis(fields.get("basis", ""))
    if basis is None or fields.get("state") != JobState.QUEUED or fields.get("hardware_class") != peeked.queue:
        return None
    try:
        model = catalogue.resolve(fields.get("model", ""))
        moves = read_moves(fields.get("moves", ""))
    except (UnknownModelError, msgspec.MsgspecError):
        return None
    deadline_at = float(fields["deadline_at"])
    needs = replace(basis.needs, deadline=deadline_at - now if deadline_at else None, level=int(fields["level"]))
    return Waiting(peeked, model, needs, fields["variant"], float(fields["work"]), moves)


def groups_of(jobs: Sequence[Waiting], outlook: Outlook, max_moves_per_job: int) -> list[Group]:
    """Groups of the jobs, which come as `Yard.peek` gives them: of each queue and level the last served first."""
    behind: dict[tuple[str, int], float] = {}
    alike: dict[tuple[object, ...], list[tuple[Waiting, float]]] = {}
    for job in jobs:
        queue, level = job.peeked.queue, job.peeked.level
        before = sum(outlook.backlog.levels(queue)[: level + 1])
        behind[queue, level] = behind.get((queue, level), 0.0) + job.work
        alike.setdefault(_kind(job), []).append((job, max(before - behind[queue, level], 0.0)))
    groups = (_group(members, outlook, max_moves_per_job) for members in alike.values())
    return [group for group in groups if group is not None]


def steps_of(move: Move, waiting: Mapping[str, Waiting], now: float, rules: Rules) -> list[Step]:
    """How each job of a move is moved: its message under a new order, and its record's new fields.

    A message that no router of ours ordered is left where it is: a worker refuses it there.
    """
    steps = (_step(move, waiting[job], now, rules) for job in move.jobs)
    return [step for step in steps if step is not None]


def _kind(job: Waiting) -> tuple[object, ...]:
    needs = job.needs
    return (
        job.peeked.queue,
        needs.level,
        job.model.id,
        job.variant,
        needs.constraints,
        needs.rows,
        _magnitude(needs.size),
        _magnitude(needs.deadline),
    )


def _magnitude(value: float | None) -> int | None:
    return None if value is None else round(math.log(max(value, 1e-3), _ALIKE))


def _group(members: Sequence[tuple[Waiting, float]], outlook: Outlook, most: int) -> Group | None:
    """The group of jobs alike, by the needs of the one that is served last; None where none of them may move."""
    last, ahead = members[0]
    board = outlook.board(last.model, last.needs.constraints)
    names = [(c.hardware_class, c.variant_name) for c in board.candidates]
    here = (last.peeked.queue, last.variant)
    free = tuple(job.peeked.job for job, _ in reversed(members) if len(job.moves) < most)
    if here not in names or not free:
        return None
    return Group(board, last.needs, names.index(here), ahead, free)


def _step(move: Move, job: Waiting, now: float, rules: Rules) -> Step | None:
    try:
        envelope = _ordered(move, job.peeked.envelope, rules)
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


def _ordered(move: Move, envelope: Envelope, rules: Rules) -> Envelope:
    """The message under an order that has its new class, too."""
    body = envelope.payload()
    old = read_ticket(envelope.headers.get(HEADER), body, rules.secret)
    price = rules.topology.hardware[move.target].price.usd_per_hour
    unsigned = msgspec.structs.replace(
        old,
        variants={**old.variants, move.target: move.variant},
        prices={**old.prices, move.target: price},
        reason=move.reason,
    )
    headers = {**envelope.headers, HEADER: sign(unsigned, body, rules.secret)}
    return msgspec.structs.replace(envelope, headers=headers)
