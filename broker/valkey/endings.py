"""Endings: a job ends once, with its result, which is announced to its waiters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from broker.valkey import Call, as_text, packed
from tasks.models.profiles import bin_of
from taxiway.contract.job import FINAL, JobState
from taxiway.contract.keys import (
    HELD,
    LENGTHS,
    RELEASED,
    UNACKED,
    WEBHOOKS_DUE,
    WORK,
    cancelled_channel,
    holding_key,
    job_key,
    reply_channel,
    result_key,
    webhook_dead_key,
    webhook_outbox_key,
)

REFUSED_TOKEN = "-"
"""The token of a refused job: it ends no job of the same id that has a record."""

_KEYS = (WORK, LENGTHS, HELD, RELEASED, *UNACKED, WEBHOOKS_DUE)

_PREFIXES = (
    *(reply_channel(""), cancelled_channel(""), holding_key("")),
    *(webhook_outbox_key(""), webhook_dead_key("")),
)


class Ending(msgspec.Struct, frozen=True):
    """One job's end."""

    job: str
    state: JobState
    meta: bytes
    token: str = ""
    """Of the claim. Empty: whichever worker holds the job. `REFUSED_TOKEN`: only if the job has no record."""
    reply: str = ""
    """The client's name; empty if the record has it, or there is none."""
    generated: Sequence[int] = ()
    """Tokens of each answer that it generated."""
    started: str = ""
    """When it began to run, unless recorded before; `device` says where."""
    device: str = ""
    tag: str = ""
    """Its message's tag, if the same step acknowledges the message."""

    def __post_init__(self) -> None:
        assert self.state in FINAL


def finish_call(endings: Iterable[Ending], *, keep_result: float, keep_record: float) -> Call:
    """Ends jobs; answers 1 for each whose result was written."""
    keys: list[str] = [*_KEYS]
    args: list[Any] = [int(keep_result), int(keep_record), *_PREFIXES]
    for e in endings:
        keys += (result_key(e.job), job_key(e.job))
        args.append(packed(_map(e)))
    return Call("jobs/finish", keys, args)


def _map(ending: Ending) -> dict[str, Any]:
    """What finish.lua reads of one job."""
    values: dict[str, Any] = {"state": str(ending.state), "meta": as_text(ending.meta), "token": ending.token}
    if ending.reply:
        values["client"] = ending.reply
    if ending.generated:
        values["bins"] = msgspec.json.encode([bin_of(tokens) for tokens in ending.generated]).decode()
    if ending.started:
        values |= {"started": ending.started, "device": ending.device}
    if ending.tag:
        values["tag"] = ending.tag
    return values


def revive_call(job: str) -> Call:
    """Lets a dead-lettered job start again; answers 0 if it did not end that way."""
    return Call("jobs/revive", [job_key(job), result_key(job)])
