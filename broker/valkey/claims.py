"""Claims: a worker's exclusive right to run a job, for a lease, under a fencing token; and what jobs used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

import msgspec

from broker.port import Holder
from broker.valkey import Call, as_text, flat, packed
from taxiway.contract.job import JobState
from taxiway.contract.keys import UNACKED, WORK, cancelled_channel, job_key, result_key
from taxiway.errors import bounded


class Verdict(StrEnum):
    """The outcome of a claim."""

    RUN = "run"
    FINAL = "final"
    LATE = "late"
    HELD = "held"


class Claim(msgspec.Struct, frozen=True):
    """One job's claim: its fencing token if it may run, seconds until the next attempt if it is held.

    `attempts` counts the runs that are known to have begun. `blamed` counts the workers that the job may have ended:
    the first that ended while it held the job, and later ones that handled nothing else then. `deadline_at` is the
    record's, 0 if it has none: the message may be a copy with a later one.
    """

    verdict: Verdict
    token: str = ""
    retry_in: float = 0.0
    attempts: int = 0
    blamed: int = 0
    deadline_at: float = 0.0


def claim_call(worker: str, lease: float, jobs: Sequence[tuple[str, float]]) -> Call:
    """Claims jobs, given by id and deadline by the server's clock; 0 for none."""
    keys = [key for job, _ in jobs for key in (result_key(job), job_key(job))]
    return Call("jobs/claim", keys, [worker, lease, *(deadline for _, deadline in jobs)])


def claim_answer(answer: Sequence[bytes]) -> tuple[float, list[Claim]]:
    """The server's time, and each job's claim in order."""
    return float(answer[0]), [claim_from(*pair) for pair in zip(answer[1::2], answer[2::2], strict=True)]


def claim_from(verdict: bytes, value: bytes) -> Claim:
    """One claim, as `includes/claimed.lua` answers it."""
    if verdict == b"run":
        token, attempts, blamed, due = value.decode().rsplit(" ", 3)
        return Claim(Verdict.RUN, token, attempts=int(attempts), blamed=int(blamed), deadline_at=float(due))
    kind = Verdict(verdict.decode())
    return Claim(kind, retry_in=float(value) if kind is Verdict.HELD else 0.0)


def read_history(text: str) -> tuple[Holder, ...]:
    """The holders in a job's record, in order, as `includes/claimed.lua` writes them."""
    lines = (line.rsplit(" ", 2) for line in text.splitlines())
    return tuple(Holder(worker, float(since), state == JobState.RUNNING) for worker, since, state in lines)


@dataclass(frozen=True, slots=True)
class YieldRequest:
    """A running job is to keep what is done and return to its queue, within `seconds`, so that others run."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Relocation:
    """Where a job that yields goes: its message, held under a tag, returns to the queue, and its record is changed."""

    tag: str
    queue: str
    message: bytes
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class YieldAsk:
    """Asks the holder of a job, by its claim's token, to yield it."""

    job: str
    token: str
    reason: str
    waiting: str = ""
    """The job that is to have its place; empty if none does."""
    held: str = ""
    """The token of a claim under which it waits at a worker; empty if it waits in its queue."""
    to: Relocation | None = None
    """Where it goes; None for its own queue."""


class YieldAnswer(IntEnum):
    """What became of an ask, as jobs/yield.lua answers."""

    NOT_WAITING = -1  # the job that was to have the place was taken by a worker, or ended
    NOT_HELD = 0  # the claim is over, or its holder was asked before
    ASKED = 1


def yield_call(seconds: float, asks: Sequence[YieldAsk]) -> Call:
    """Asks holders to yield their jobs within so many seconds; answers a `YieldAnswer` for each."""
    keys = [job_key(job) for ask in asks for job in (ask.job, ask.waiting or ask.job)]
    arguments = [packed(_wanted(ask)) for ask in asks]
    return Call("jobs/yield", [UNACKED[0], WORK, *keys], [seconds, cancelled_channel(""), *arguments])


def _wanted(ask: YieldAsk) -> dict[str, Any]:
    return {"token": ask.token, "reason": bounded(ask.reason), "held": ask.held, **_moved(ask.to)}


def _moved(to: Relocation | None) -> dict[str, Any]:
    if to is None:
        return {}
    entry = b'[%b, "%b", "%b"]' % (to.message, to.queue.encode(), to.queue.encode())
    return {"tag": to.tag, "moved": as_text(entry), "record": flat(to.fields)}


def renewed(answer: int | bytes) -> YieldRequest | bool:
    """Whether a claim is still valid, as jobs/renew.lua answers; a request to yield says that it is."""
    if isinstance(answer, int):
        return bool(answer)
    seconds, _, reason = answer.decode().partition(" ")
    return YieldRequest(float(seconds), reason)
