"""Forwards arrivals to class queues or into holding, in one step at the store.

Jobs that no class can start soon wait in holding, bound to no class, beside their records: one queue, ordered by
deadline, for all jobs of a tenant that have the same candidates.
Forwarding adds jobs, and removes them when they are placed. The leader draws jobs for a few seconds; what it has not
placed by then returns, so a leader's crash loses none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from broker.port import Affinity, ForwardOutcome, Outgoing, StoredReceipts, StoredSnapshot
from broker.valkey import Call, as_text, flat, packed
from tasks.models.signature import FIRST, SHOWN
from taxiway.contract.keys import (
    ACCEPTED,
    ARRIVALS,
    DEADLINES,
    HELD,
    HOLDING,
    LEAD,
    RECEIPTS,
    RELEASED,
    UNACKED,
    WEBHOOKS_DUE,
    WORK,
    affinity_key,
    capacity_key,
    holding_key,
    job_key,
    jobs_cell,
    priority_list,
    priority_lists,
    redis_priority,
    reply_channel,
    result_key,
    snapshot_key,
    webhook_dead_key,
    webhook_outbox_key,
)
from taxiway.contract.wire import Envelope, encode_envelope

_KEYS = (WORK, HELD, RELEASED, HOLDING, DEADLINES, ACCEPTED)
_PREFIXES = (job_key(""), result_key(""), reply_channel(""), holding_key(""))

_COUNTED = ("arrived", "rows", "max_depth")  # fields that are counted as the job is forwarded, and not read later

HANDOVER = 0.2
"""Seconds after which a message that its preferred worker has not taken may return to its class queue.

The worker was preferred because it was waiting for messages: only one that died or hangs does not take it."""


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
    """Whether the session lives, what became of each job, and what was taken."""

    lives: bool
    done: list[ForwardOutcome]
    taken: list[bytes]


def addressed(envelope: Envelope, queue: str, level: int) -> Envelope:
    """The envelope with kombu's address of a class queue; the delivery tag and the body stay."""
    envelope.properties["priority"] = redis_priority(level)
    envelope.properties["delivery_info"] = {"exchange": queue, "routing_key": queue}
    return envelope


class _Keys(list[str]):
    """The keys of a call. A map names one by its number, as Lua counts."""

    def number(self, key: str) -> int:
        """The number of one more key."""
        self.append(key)
        return len(self)

    def numbers(self, keys: Iterable[str]) -> list[int]:
        """The numbers of more keys."""
        return [self.number(key) for key in keys]


def forward_call(
    messages: Sequence[Outgoing],
    taking: Taking | None = None,
    *,
    keep: int,
    snapshots: Sequence[StoredSnapshot] = (),
    receipts: StoredReceipts | None = None,
    held: bool = False,
) -> Call:
    """Forwards jobs, stores the snapshots that their records refer to, and takes the next arrivals.

    Records are kept for `keep` seconds. Jobs that were `held` have records: a server whose memory is full forwards them
    too.
    """
    keys = _Keys(_KEYS)
    args: list[Any] = [*_PREFIXES, packed(_taking(taking, keys)) if taking is not None else b""]
    kept = [(snapshot_key(one.name), as_text(one.packed), one.keep) for one in snapshots]
    args.append(packed([{"key": keys.number(key), "bytes": content, "keep": keep} for key, content, keep in kept]))
    if receipts is None:
        args.append(b"")
    else:
        lines = [as_text(line) for line in receipts.lines]
        args.append(packed({"stream": keys.number(RECEIPTS), "lines": lines, "most": receipts.most}))
    for _, alike in groupby(messages, key=_shared):
        group = _group(list(alike), keys, keep)
        if held:
            group.pop("accepted", None)  # it was listed when it was held
        args.append(packed(group))
    return Call("routing/release_held" if held else "routing/forward", keys, args)


def _taking(taking: Taking, keys: _Keys) -> dict[str, Any]:
    return {
        "session": keys.number(taking.session_key),
        "into": keys.number(taking.into),
        "arrivals": keys.numbers(priority_lists(ARRIVALS)),
        "answered": keys.numbers(taking.answered),
        "most": taking.most,
        "bytes": taking.most_bytes,
    }


def _shared(message: Outgoing) -> tuple[Any, ...]:
    """What jobs of a group have in common. A job with a key's use has its own digest; one with an affinity is alone."""
    alone = message.job if message.affinity is not None else ""
    return message.queue, message.level, message.fields, message.use is not None, alone


def _group(messages: Sequence[Outgoing], keys: _Keys, keep: int) -> dict[str, Any]:
    """The map of jobs that are forwarded alike."""
    first = messages[0]
    fields = first.fields
    record = {name: value for name, value in fields.items() if name not in _COUNTED}
    group: dict[str, Any] = {"record": flat(record), "keep": keep}
    group |= {name: fields[name] for name in ("holding", "cell") if fields.get(name)}
    group |= _times(fields, keep)
    if not first.held:
        group["list"] = keys.number(priority_list(first.queue, first.level))
    if first.affinity is not None and not first.held:
        group["affinity"] = _affinity(first.affinity, first.queue, keys)
    if "cell" in fields or "arrived" in fields:
        group["work"] = _increments(fields)
    if "spent" in fields:
        group |= {"spent": keys.number(fields["spent"]), "tenant": fields["tenant"], "cost": float(fields["cost"])}
    if "open" in fields:
        group |= {"open": keys.number(fields["open"]), "max_depth": int(fields["max_depth"])}
    if "blobs" in fields:
        group["blobs"] = keys.numbers(fields["blobs"].split())
    group["jobs"] = [_job(message, keys) for message in messages]
    return group


def _job(message: Outgoing, keys: _Keys) -> dict[str, Any]:
    """The map of one job."""
    if not message.held:
        addressed(message.envelope, message.queue, message.level)
    stored = as_text(encode_envelope(message.envelope))
    job: dict[str, Any] = {"key": keys.number(job_key(message.job)), "message": stored}
    if message.reply:
        job["client"] = message.reply
    if message.use is not None:
        job["use"] = {**msgspec.structs.asdict(message.use), "placeholder": FIRST, "shown": SHOWN}
    return job


def _times(fields: Mapping[str, str], keep: int) -> dict[str, float]:
    """When the jobs end and when they are listed; absent for a held job without a deadline, and one that is not listed.

    A job placed without a deadline ends with its ticket: no worker runs it after that, and its waiter must be notified.
    """
    placed, accepted = float(fields.get("placed", 0)), float(fields.get("accepted", 0))
    ends_at = float(fields.get("deadline_at", 0)) or (placed and placed + keep)
    return {name: time for name, time in (("deadline", ends_at), ("accepted", accepted)) if time > 0}


def _affinity(affinity: Affinity, queue: str, keys: _Keys) -> dict[str, Any]:
    return {
        "before": keys.number(job_key(affinity.after)),
        "workers": [
            {"name": worker, "capacity": keys.number(capacity_key(worker)), "list": keys.number(affinity_key(worker))}
            for worker in affinity.workers
        ],
        "most": affinity.most,
        "queue": queue,
        "lists": keys.numbers(priority_lists(queue)),
        "ending": f', "{queue}", "{queue}"]',
        "unacked": keys.number(UNACKED[0]),
        "index": keys.number(UNACKED[1]),
        "lease": affinity.lease,
        "handover": HANDOVER,
    }


def _increments(fields: Mapping[str, str]) -> dict[str, float]:
    """Each job's increments of the work hash."""
    increments: dict[str, float] = {}
    if "cell" in fields:
        increments = {fields["cell"]: float(fields["work"]), jobs_cell(fields["cell"]): 1}
    if "arrived" in fields:
        increments[fields["arrived"]] = float(fields["rows"])
    return increments


def forward_answer(answer: Sequence[Any]) -> Forwarded:
    """The server's answer to `forward_call`."""
    lives, done, taken = answer
    return Forwarded(bool(lives), [ForwardOutcome(one) for one in done], taken)


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
        args.append(packed({"meta": as_text(one.meta), "accepted": one.accepted, "record": flat(one.fields)}))
    return Call("jobs/list_refused", [ACCEPTED, WEBHOOKS_DUE, *map(job_key, jobs)], args)


@dataclass(frozen=True, slots=True)
class Survey:
    """The server's time, the cells of `keys.WORK`, and the holding queues.

    Of each, the name, the deadline and level of its first job, and its number of jobs; the deadline is above 1e10 for a
    job without one.
    """

    now: float
    work: Mapping[str, float]
    queues: Sequence[tuple[str, float, int, int]]


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
        queues=[(name.decode(), float(due), int(level), int(jobs)) for name, due, level, jobs in queues],
    )


def draw_call(token: str, queue: str, most: int, lease: float) -> Call:
    """Draws a queue's first jobs for the leader; jobs not placed within `lease` seconds are held again."""
    return Call("routing/draw", [LEAD, holding_key(queue), RELEASED, HELD], [token, most, lease])


def draw_answer(answer: Sequence[bytes]) -> tuple[float, list[Drawn]]:
    """The server's time, and the jobs drawn, first due first."""
    jobs = zip(answer[1::4], answer[2::4], answer[3::4], answer[4::4], strict=True)
    return float(answer[0]), [Drawn(message, float(at), float(due), reply.decode()) for message, at, due, reply in jobs]
