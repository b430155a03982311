"""Forwards arrivals to class queues or into holding, in one step at the store.

Jobs that no class can start soon wait in holding, bound to no class, beside their records: one queue, ordered by
deadline, for all jobs of a tenant that have the same candidates.
Forwarding adds jobs, and removes them when they are placed. The leader draws jobs for a few seconds; what it has not
placed by then returns, so a leader's crash loses none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from broker.port import ForwardOutcome, Lead, Outgoing, StoredSnapshot
from broker.valkey import Call
from tasks.models.signature import FIRST, SHOWN, KeyUse
from taxiway.contract.keys import (
    ACCEPTED,
    ARRIVALS,
    DEADLINES,
    HELD,
    HOLDING,
    LEAD,
    LEVELS,
    RELEASED,
    UNACKED,
    WEBHOOKS_DUE,
    WORK,
    holding_key,
    job_key,
    jobs_cell,
    led_key,
    priority_list,
    priority_lists,
    redis_priority,
    reply_channel,
    result_key,
    room_key,
    snapshot_key,
    webhook_dead_key,
    webhook_outbox_key,
)
from taxiway.contract.wire import Envelope, encode_envelope

_KEYS = (WORK, HELD, RELEASED, HOLDING, DEADLINES, ACCEPTED)
_PREFIXES = (job_key(""), result_key(""), reply_channel(""), holding_key(""))
_pack = msgspec.msgpack.Encoder().encode

HANDOVER = 0.2
"""Seconds after which a message that was led to a worker and not taken may return to its class queue.

It was led because the worker was waiting for messages, so that only a worker that died or hangs does not take it."""


@dataclass(frozen=True, slots=True)
class Taking:
    """The arrivals to take while others are forwarded: up to `most`, about `most_bytes`, in a session.

    They go into the in-flight list `into`; the lists `answered` are deleted first.
    """

    session_key: str
    into: str
    answered: Sequence[str] = ()
    most: int = 0
    most_bytes: int = 0


class Forwarded(msgspec.Struct, frozen=True):
    """The server's time, whether the session lives, what became of each job, and what was taken."""

    now: float
    lives: bool
    done: list[ForwardOutcome]
    taken: list[bytes]


def addressed(envelope: Envelope, queue: str, level: int) -> Envelope:
    """The envelope with kombu's address of a class queue; the delivery tag and the body stay."""
    envelope.properties["priority"] = redis_priority(level)
    envelope.properties["delivery_info"] = {"exchange": queue, "routing_key": queue}
    return envelope


def _stored(message: Outgoing) -> tuple[str, bytes]:
    """The list that a message is published to, empty for one that is held, and its bytes."""
    if message.held:
        return "", encode_envelope(message.envelope)
    queue, level = message.queue, message.level
    return priority_list(queue, level), encode_envelope(addressed(message.envelope, queue, level))


def forward_call(
    messages: Sequence[Outgoing],
    taking: Taking | None = None,
    *,
    keep: int,
    snapshots: Sequence[StoredSnapshot] = (),
    held: bool = False,
) -> Call:
    """Forwards jobs, stores the snapshots that their records refer to, and takes the next arrivals.

    Args:
        messages: the jobs.
        taking: the arrivals to take.
        keep: seconds for which records are kept.
        snapshots: the snapshots to keep.
        held: whether the jobs were held, so that they have records: a server whose memory is full forwards them too.
    """
    keys, args = [*_KEYS], list[Any]([0, 0, 0, 0, *_PREFIXES, len(snapshots)])
    if taking is not None:
        keys += (taking.session_key, taking.into, *priority_lists(ARRIVALS), *taking.answered)
        args[:4] = LEVELS, len(taking.answered), taking.most, taking.most_bytes
    keys += (snapshot_key(one.name) for one in snapshots)
    args += (part for one in snapshots for part in (one.packed, one.keep))
    parts = [(*_stored(message), message) for message in messages]
    for (queue_list, *_), group in groupby(parts, key=_alike):
        jobs = list(group)
        fields = jobs[0][-1].fields
        flat = [text for pair in fields.items() for text in pair]
        blobs = fields.get("blobs", "").split()
        published: str | bytes = "1" if queue_list else ""
        if queue_list:
            keys.append(queue_list)
        if queue_list and (lead := jobs[0][-1].lead) is not None:
            keys += (*UNACKED, *priority_lists(jobs[0][-1].queue))
            published = _lead(lead, jobs[0][-1].queue)
        args += (published, keep, fields.get("holding", ""), len(blobs), _ends_at(fields, keep))
        args += (0 if held else fields.get("accepted", 0), fields.get("cell", ""))
        args += (_pack(flat), _pack(_charges(fields)))
        if "spent" in fields:
            keys.append(fields["spent"])
        args += (fields["tenant"], fields["cost"]) if "spent" in fields else ("", 0)
        if "open" in fields:
            keys.append(fields["open"])
        args.append(fields.get("max_depth", ""))
        keys += blobs
        keys += [job_key(job.job) for *_, job in jobs]
        args.append(len(jobs))
        for _, raw, job in jobs:
            args += (job.reply, raw, b"" if job.use is None else _use(job.use))
    return Call("routing/release_held" if held else "routing/forward", keys, args)


def forward_answer(answer: Sequence[Any]) -> Forwarded:
    """The server's answer to `forward_call`."""
    now, lives, done, taken = answer
    return Forwarded(float(now), bool(lives), [ForwardOutcome(one) for one in done], taken)


@dataclass(frozen=True, slots=True)
class RefusedJob:
    """A job that ended before placement: when it was accepted, its record's fields, and its result for webhooks."""

    accepted: str
    fields: Mapping[str, str]
    meta: bytes = b""


def forget_call(since: str, keep_record: float, most: int) -> Call:
    """Removes up to `most` groups of jobs whose records are gone from the index of jobs."""
    return Call("jobs/forget_listed", [ACCEPTED], [since, keep_record, most])


def list_refused_call(jobs: Mapping[str, RefusedJob], keep_record: float) -> Call:
    """Lists jobs that ended before placement, records what they were, and announces their end."""
    args: list[Any] = [int(keep_record), webhook_outbox_key(""), webhook_dead_key("")]
    for one in jobs.values():
        args += (one.meta, one.accepted, 2 * len(one.fields), *(text for pair in one.fields.items() for text in pair))
    return Call("jobs/list_refused", [ACCEPTED, WEBHOOKS_DUE, *map(job_key, jobs)], args)


def _use(use: KeyUse) -> bytes:
    return _pack((*msgspec.structs.astuple(use), FIRST, SHOWN))


def _ends_at(fields: Mapping[str, str], keep: int) -> float:
    """The time by which a job is ended; 0 for one that is held without a deadline.

    A job placed without a deadline ends with its ticket: no worker runs it after that, and its waiter must be notified.
    """
    placed = float(fields.get("placed", 0))
    return float(fields.get("deadline_at", 0)) or (placed and placed + keep)


def _lead(lead: Lead, queue: str) -> bytes:
    workers = [(worker, room_key(worker), led_key(worker)) for worker in lead.workers]
    return _pack((job_key(lead.after), workers, lead.most, queue, f', "{queue}", "{queue}"]', lead.lease, HANDOVER))


def _alike(part: tuple[str, bytes, Outgoing]) -> tuple[str, int, bool, int]:
    """What jobs of a group have in common. A job with a key's use has its own digest; a led message is alone."""
    _, _, message = part
    return part[0], id(message.fields), message.use is not None, 0 if message.lead is None else id(message)


def _charges(fields: Mapping[str, str]) -> list[str | int]:
    """Each job's increments of the work hash."""
    charges: list[str | int] = []
    if "cell" in fields:
        charges += (fields["cell"], fields["work"], jobs_cell(fields["cell"]), 1)
    if "arrived" in fields:
        charges += (fields["arrived"], fields["rows"])
    return charges


@dataclass(frozen=True, slots=True)
class HoldingQueue:
    """A holding queue: its name, the deadline and level of its first job, and its number of jobs.

    The deadline is by the store's clock; above 1e10 for a job without one.
    """

    name: str
    due: float
    level: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The server's time, the cells of `keys.WORK`, and the holding queues."""

    now: float
    work: Mapping[str, float]
    queues: Sequence[HoldingQueue]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A job taken out of holding to be placed; times by the store's clock, `deadline_at` 0 if it has none."""

    message: bytes
    accepted: float
    deadline_at: float
    reply: str


def survey_call() -> Call:
    """Reads what is held."""
    return Call("routing/survey", [HOLDING, RELEASED, HELD, WORK], [holding_key("")])


def survey_answer(answer: Sequence[Any]) -> Survey:
    """The answer's content."""
    cells = zip(answer[1][::2], answer[1][1::2], strict=True)
    queues = zip(answer[2::4], answer[3::4], answer[4::4], answer[5::4], strict=True)
    return Survey(
        now=float(answer[0]),
        work={cell.decode(): float(figure) for cell, figure in cells},
        queues=[HoldingQueue(name.decode(), float(due), int(level), int(jobs)) for name, due, level, jobs in queues],
    )


def draw_call(token: str, queue: str, most: int, lease: float) -> Call:
    """Draws a queue's first jobs for the leader; jobs not placed within `lease` seconds are held again."""
    return Call("routing/draw", [LEAD, holding_key(queue), RELEASED, HELD], [token, most, lease])


def draw_answer(answer: Sequence[bytes]) -> tuple[float, list[Drawn]]:
    """The server's time, and the jobs drawn, first due first."""
    jobs = zip(answer[1::4], answer[2::4], answer[3::4], answer[4::4], strict=True)
    return float(answer[0]), [Drawn(message, float(at), float(due), reply.decode()) for message, at, due, reply in jobs]
