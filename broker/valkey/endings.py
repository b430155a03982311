"""How jobs end in the state store: once, with their result, and what is said of it to whoever waits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from broker.valkey.lua import Call
from tasks.models.lengths import bin_of
from taxiway.contract.job import FINAL, JobState
from taxiway.contract.keys import (
    HELD,
    LENGTHS,
    RELEASED,
    UNACKED,
    WORK,
    holding_key,
    job_key,
    reply_channel,
    result_key,
    withdrawn_channel,
)

REFUSED = "-"
"""Stands for the token of a job that is refused: a second copy of one that was accepted ends nothing."""

_KEYS = (WORK, LENGTHS, HELD, RELEASED, *UNACKED)
_PREFIXES = (reply_channel(""), withdrawn_channel(""), holding_key(""))


@dataclass(frozen=True, slots=True)
class Ending:
    """One job's end. An empty `token` ends it whoever holds it, `REFUSED` only if it was never accepted.

    `reply` is its client's name, empty where its record says it or there is none. `generated` is the length of each
    answer that it generated, in tokens. `started` and `device` say when and where it began to run, unless that was
    recorded before; `tag` is its message's, where that is to be acknowledged by the same step.
    """

    job: str
    state: JobState
    meta: bytes
    token: str = ""
    reply: str = ""
    generated: Sequence[int] = ()
    started: str = ""
    device: str = ""
    tag: str = ""

    def __post_init__(self) -> None:
        assert self.state in FINAL


def finish_call(endings: Iterable[Ending], *, keep_result: float, keep_record: float) -> Call:
    """Ends jobs; answers 1 for each whose result was written."""
    keys: list[str] = [*_KEYS]
    args: list[Any] = [int(keep_result), int(keep_record), *_PREFIXES]
    for e in endings:
        bins = msgspec.json.encode([bin_of(tokens) for tokens in e.generated]) if e.generated else b""
        keys += (result_key(e.job), job_key(e.job))
        args += (e.token, str(e.state), e.meta, e.reply, bins, e.started, e.device, e.tag)
    return Call("finish", keys, args)


def revive_call(job: str) -> Call:
    """Lets a job that ended dead begin anew; answers 0 where it did not."""
    return Call("revive", [job_key(job), result_key(job)])
