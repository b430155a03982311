"""The way from arrivals to class queues, at once in the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from broker.port import StoredSnapshot
from broker.valkey.lua import Call
from tasks.fingerprint import FIRST, SHOWN, KeyUse
from taxiway.contract.keys import (
    ACCEPTED,
    ARRIVALS,
    DEADLINES,
    HELD,
    HOLDING,
    LEVELS,
    RELEASED,
    WORK,
    holding_key,
    job_key,
    jobs_cell,
    priority_lists,
    reply_channel,
    result_key,
    snapshot_key,
)

_KEYS = (WORK, HELD, RELEASED, HOLDING, DEADLINES, ACCEPTED)
_PREFIXES = (job_key(""), result_key(""), reply_channel(""), holding_key(""))
_pack = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Taking:
    """What is taken from the arrivals as others are forwarded: up to `most`, about `most_bytes`, in a session.

    They go into the in-flight list `into`; what is in the lists `answered` is forgotten before.
    """

    session_key: str
    into: str
    answered: Sequence[str] = ()
    most: int = 0
    most_bytes: int = 0


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """One job and where it goes.

    Without a `queue_list` it is only recorded: it was published elsewhere, or its `fields` name the `holding` queue
    that keeps its message. `fields` hold the job's record, with its `cell` and `work`, `arrived` and `rows`; `lengths`
    where it is to generate, `spent` and `cost` where its tenant has a budget, `blobs`, the keys of its large inputs,
    which stay with the record until the job ends. Jobs one after the other with the same `fields` object are forwarded
    as one group. `was` is the state that the record is in, empty where there is to be none; `reply` the name of its
    client, `use` its use of an idempotency key.
    """

    queue_list: str = ""
    message: bytes = b""
    job: str
    fields: Mapping[str, str]
    keep: int
    was: str = ""
    reply: str = ""
    use: KeyUse | None = None


class Forwarded(msgspec.Struct, frozen=True):
    """What became of it: the server's time, whether the session lives, which jobs were forwarded, what was taken.

    `refused` says which were not because their keys were first used for something else.
    """

    now: float
    lives: bool
    done: list[bool]
    taken: list[bytes]
    refused: list[bool]


def forward_call(
    forwards: Iterable[Forward],
    taking: Taking | None = None,
    *,
    snapshots: Sequence[StoredSnapshot] = (),
    held: bool = False,
) -> Call:
    """Forwards jobs, with the snapshots that their records refer to, and takes arrivals with it.

    Jobs that were `held` are let go by a full server, too.
    """
    keys, args = [*_KEYS], list[Any]([0, 0, 0, 0, *_PREFIXES, len(snapshots)])
    if taking is not None:
        keys += (taking.session_key, taking.into, *priority_lists(ARRIVALS), *taking.answered)
        args[:4] = LEVELS, len(taking.answered), taking.most, taking.most_bytes
    keys += (snapshot_key(one.name) for one in snapshots)
    args += (part for one in snapshots for part in (one.packed, one.keep))
    for (queue_list, keep, was, *_), group in groupby(forwards, key=_alike):
        jobs = list(group)
        fields = jobs[0].fields
        flat = [text for pair in fields.items() for text in pair]
        charges, blobs = _charges(fields, was), fields.get("blobs", "").split()
        if queue_list:
            keys.append(queue_list)
        args += ("1" if queue_list else "", keep, was, fields.get("holding", ""), len(blobs), _ends_at(fields, keep))
        args += (0 if was else fields.get("accepted", 0), len(flat), *flat, len(charges) // 2, *charges)
        if "spent" in fields:
            keys.append(fields["spent"])
        args += (fields["tenant"], fields["cost"]) if "spent" in fields else ("", 0)
        keys += blobs
        keys += [job_key(job.job) for job in jobs]
        args.append(len(jobs))
        for job in jobs:
            args += (job.reply, job.message, b"" if job.use is None else _use(job.use))
    return Call("routing/release_held" if held else "routing/forward", keys, args)


def forward_answer(answer: Sequence[Any]) -> Forwarded:
    """What the server says of it."""
    now, lives, done, taken = answer
    return Forwarded(float(now), bool(lives), [one == 1 for one in done], taken, [one < 0 for one in done])


def forget_call(since: str, keep_record: float, most: int) -> Call:
    """Takes up to `most` groups of jobs whose records are gone out of the index of jobs."""
    return Call("jobs/forget_listed", [ACCEPTED], [since, keep_record, most])


def _use(use: KeyUse) -> bytes:
    return _pack((*msgspec.structs.astuple(use), FIRST, SHOWN))


def _ends_at(fields: Mapping[str, str], keep: int) -> float:
    """When a job has ended at the latest; 0 for one that is held without a deadline.

    What was placed without a deadline ends with its ticket: no worker runs it after that, and somebody has to say so.
    """
    placed = float(fields.get("placed", 0))
    return float(fields.get("deadline_at", 0)) or (placed and placed + keep)


def _alike(forward: Forward) -> tuple[str, int, str, int, bool]:
    """What jobs of a group have in common; a digest of its own is no part of the record that is copied."""
    return forward.queue_list, forward.keep, forward.was, id(forward.fields), forward.use is not None


def _charges(fields: Mapping[str, str], was: str) -> list[str | int]:
    """What the work hash gains with each job. One that `was` in some state is counted for its tenant already."""
    charges: list[str | int] = []
    if "cell" in fields:
        charges += (fields["cell"], fields["work"], jobs_cell(fields["cell"]), 1)
    if "counted" in fields and not was:
        charges += (fields["counted"], 1)
    if "arrived" in fields:
        charges += (fields["arrived"], fields["rows"])
    return charges
