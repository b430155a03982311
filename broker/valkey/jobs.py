"""A job between its placement and its end: a worker's claim on it, requests to yield it, and its one end.

A claim is a worker's exclusive right to run a job, for a lease, under a fencing token. A job ends once: with its
result, which is announced to its waiters, or past its deadline. Deadlines are judged by the server's clock: jobs
forwarded together are one group in a sorted set by their deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

import msgspec

from broker.port import Holder
from broker.valkey import Call, as_text, flat, packed
from tasks.models.profiles import bin_of
from taxiway.contract.job import FINAL, JobState
from taxiway.contract.keys import (
    ARRIVALS,
    DEADLINES,
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
from taxiway.errors import DeadlineExceededError, bounded


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
    wanted = {"token": ask.token, "reason": bounded(ask.reason), "held": ask.held}
    if (to := ask.to) is None:
        return wanted
    entry = b'[%b, "%b", "%b"]' % (to.message, to.queue.encode(), to.queue.encode())
    return {**wanted, "tag": to.tag, "moved": as_text(entry), "record": flat(to.fields)}


def renewed(answer: int | bytes) -> YieldRequest | bool:
    """Whether a claim is still valid, as jobs/renew.lua answers; a request to yield says that it is."""
    if isinstance(answer, int):
        return bool(answer)
    seconds, _, reason = answer.decode().partition(" ")
    return YieldRequest(float(seconds), reason)


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


@dataclass(frozen=True, slots=True)
class Course:
    """How a job spent its time until it was `ended` past its deadline. Times are by the store's clock; 0 if unknown.

    It waited for its `hardware_class`: in holding if `held`, in the arrivals if it has no class yet. It ran since
    `started`. A job without a deadline (`deadline_at` 0) did not run before its ticket expired.
    """

    ended: float
    deadline_at: float
    accepted: float = 0.0
    hardware_class: str = ""
    held: bool = False
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Overdue:
    """A job past its deadline, its client (empty if none), and how it spent its time."""

    job: str
    reply: str
    course: Course


def exceeded(course: Course) -> DeadlineExceededError:
    """The error of a job past its deadline: the deadline, and how the time was spent, in seconds."""
    accepted = course.accepted or course.ended
    ran = max(course.ended - course.started, 0.0) if course.started else 0.0
    queued = max(course.ended - accepted - ran, 0.0)
    deadline = course.deadline_at - accepted
    if not course.deadline_at:
        what = "its ticket expired before it ran"
    elif deadline <= 0:
        return DeadlineExceededError(
            f"deadline exceeded: it passed {_seconds(abs(deadline))} before the job was accepted"
        )
    else:
        what = f"deadline of {_seconds(deadline)} exceeded"
    if course.held:
        spent = f"held {_seconds(queued)}, because no queue had capacity"
    else:
        spent = f"queued {_seconds(queued)} on {course.hardware_class or ARRIVALS}"
    text = f"{what}: {spent}, ran {_seconds(ran)}" if course.started else f"{what}: {spent}"
    details = {"deadline": deadline if course.deadline_at else None, "queued": queued, "ran": ran}
    rounded = {name: None if figure is None else round(figure, 6) for name, figure in details.items()}
    return DeadlineExceededError(text, **rounded, hardware_class=course.hardware_class)


def overdue_call(most: int, lease: float) -> Call:
    """Takes up to `most` groups of due jobs. Jobs that have not ended after `lease` seconds are returned again."""
    return Call("jobs/overdue", [DEADLINES], [most, lease])


def forget_ended_call(since: str, most: int) -> Call:
    """Removes up to `most` groups of jobs that have ended from the deadlines."""
    return Call("jobs/forget_ended", [DEADLINES], [since, most])


def overdue_answer(answer: Sequence[Any]) -> tuple[int, list[Overdue], float]:
    """The number of groups that were due, their jobs, and the next due time; 0 for none."""
    now, groups, due, *flat = answer
    jobs = [_overdue(float(now), *(field.decode() for field in flat[n : n + 7])) for n in range(0, len(flat), 7)]
    return groups, jobs, float(due)


def _overdue(
    now: float, key: str, reply: str, state: str, due: str, accepted: str, hardware_class: str, started: str
) -> Overdue:
    course = Course(
        ended=now,
        deadline_at=float(due or 0),
        accepted=float(accepted or 0),
        hardware_class=hardware_class,
        held=state == JobState.HELD,
        started=float(started or 0) if state == JobState.RUNNING else 0.0,
    )
    return Overdue(key.removeprefix(job_key("")), reply, course)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 100 else f"{round(seconds, 6):.3g} s"  # clocks have microseconds
