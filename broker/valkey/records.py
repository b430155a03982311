"""What the state store records of jobs and processes: claims, deadlines, endings, heartbeats and catalogues.

A claim is a worker's exclusive right to run a job, for a lease, under a fencing token. Deadlines are judged by the
server's clock: jobs that are forwarded together are one group in a sorted set by their deadline. A job ends once, with
its result, which is announced to its waiters.

The history of arrivals is read from the index of jobs and their records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from broker.port import Holder
from broker.valkey import Call
from tasks.models.folder import Watched
from tasks.models.profiles import bin_of, tokens_of
from taxiway.contract.job import FINAL, JobState
from taxiway.contract.keys import (
    ACCEPTED,
    ARRIVALS,
    CATALOGUES,
    CATALOGUES_SEEN,
    CONTROLS,
    DEADLINES,
    DEVICES,
    HEARTBEATS,
    HELD,
    LENGTHS,
    RELEASED,
    RELOADS,
    UNACKED,
    WEBHOOKS_DUE,
    WORK,
    cancelled_channel,
    holding_key,
    job_key,
    kept_key,
    name_key,
    reply_channel,
    result_key,
    webhook_dead_key,
    webhook_outbox_key,
)
from taxiway.errors import DeadlineExceededError


class Verdict(StrEnum):
    """The outcome of a claim."""

    RUN = "run"
    FINAL = "final"
    LATE = "late"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Claim:
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
    return Call("jobs/claim", _results_and_records(jobs), [worker, lease, *(deadline for _, deadline in jobs)])


def over_call(worker: str, jobs: Sequence[tuple[str, float]]) -> Call:
    """Answers 1 for each of these jobs (as in `claim_call`) whose message may be deleted, once that is on disk."""
    return Call("jobs/over", [kept_key(worker), *_results_and_records(jobs)], [deadline for _, deadline in jobs])


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


def start_call(device: str, jobs: Iterable[tuple[str, str, float]]) -> Call:
    """Records that jobs run, given by id, token and start time by the server's clock."""
    ids, tokens, times = zip(*jobs, strict=True)
    return Call(
        "jobs/start", _records(ids), [device, *(part for pair in zip(tokens, times, strict=True) for part in pair)]
    )


def alone_call(claims: Iterable[tuple[str, str]], *, alone: bool) -> Call:
    """Notes whether a worker handles nothing beside each of these jobs, given by job and token."""
    ids, tokens = zip(*claims, strict=True)
    return Call("jobs/alone", _records(ids), [int(alone), *tokens])


def bill_call(bills: Iterable[tuple[str, str, float]]) -> Call:
    """Charges what jobs used of endpoints, given by job, the bill's id and US dollars; answers 1 for each charged."""
    jobs, ids, dollars = zip(*bills, strict=True)
    return Call("jobs/bill", _records(jobs), [part for pair in zip(ids, dollars, strict=True) for part in pair])


def renew_call(lease: float, claims: Iterable[tuple[str, str]]) -> Call:
    """Renews claims, given by job and token; answers 1 for each that is still valid."""
    ids, tokens = zip(*claims, strict=True)
    return Call("jobs/renew", _records(ids), [lease, *tokens])


def release_call(claims: Iterable[tuple[str, str]], *, counts: bool = False) -> Call:
    """Releases claims, given by job and token; whether a run that began counts as an attempt."""
    ids, tokens = zip(*claims, strict=True)
    return Call("jobs/release", _records(ids), [int(counts), *tokens])


def _results_and_records(jobs: Sequence[tuple[str, float]]) -> list[str]:
    return [key for job, _ in jobs for key in (result_key(job), job_key(job))]


def _records(jobs: Iterable[Any]) -> list[str]:
    return [job_key(job) for job in jobs]


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
        return DeadlineExceededError(f"deadline exceeded: it passed {_seconds(-deadline)} before the job was accepted")
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


REFUSED = "-"
"""The token of a refused job: it ends a job of the same id only if that was recorded and never published."""

_KEYS = (WORK, LENGTHS, HELD, RELEASED, *UNACKED, WEBHOOKS_DUE)
_PREFIXES = (
    *(reply_channel(""), cancelled_channel(""), holding_key("")),
    *(webhook_outbox_key(""), webhook_dead_key("")),
)


@dataclass(frozen=True, slots=True)
class Ending:
    """One job's end. An empty `token` ends it whichever worker holds it, `REFUSED` only if no queue has it.

    `reply` is its client's name; empty if its record has it, or there is none. `generated` is the length of each answer
    that it generated, in tokens. `started` and `device` say when and where it began to run, unless recorded before.
    `tag` is its message's tag, if the same step acknowledges the message.
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
    return Call("jobs/finish", keys, args)


def revive_call(job: str) -> Call:
    """Lets a dead-lettered job start again; answers 0 if it did not end that way."""
    return Call("jobs/revive", [job_key(job), result_key(job)])


def heartbeat_call(worker: str, facts: bytes) -> Call:
    """Publishes a device's facts under the server's time; without facts, removes the device."""
    return Call("fleet/heartbeat", [DEVICES, HEARTBEATS], [worker, facts])


def name_call(worker: str, process: str, seconds: float) -> Call:
    """Holds a worker's name for a process; 0 seconds leave it."""
    return Call("fleet/name", [name_key(worker)], [process, round(seconds * 1000)])


def watch_call(arguments: Sequence[str | bytes]) -> Call:
    """Reports what a process serves, as a `Reporter` has it; `watch_answer` reads the answer."""
    return Call("fleet/watch", [CATALOGUES, CATALOGUES_SEEN, RELOADS, CONTROLS], arguments)


def watch_answer(answer: Sequence[Any]) -> Watched:
    """What operators asked of all processes, and whether the store has this one's report."""
    reloads, known, controls, now = answer
    marks = [part.decode() for part in controls]
    return Watched(int(reloads), bool(known), dict(zip(marks[::2], marks[1::2], strict=True)), float(now))


STATES = (*JobState,)
"""The states that `Observed.outcomes` has by number."""

GROUPS = 256
"""Groups of jobs read per call."""

JOBS = 512
"""Jobs after which a call reads no further group: about 1 ms of the server's time."""


class Group(NamedTuple):
    """Equal jobs that were accepted together; times by the store's clock, `due` is 0 without a deadline.

    `basis` is the text in their records, empty if they were refused.
    """

    accepted: float
    due: float
    jobs: int
    model: str
    tenant: str
    basis: str


@dataclass(frozen=True, slots=True)
class Observed:
    """Groups of jobs and what became of each job.

    `looked` is the number of groups that were read, including those without a record. `outcomes` has ten bytes per job,
    in the order of the groups: the number of its state, of its class (0: none, else that of `classes` plus 1), then as
    little-endian float32 the seconds until it ended and those since it began to run, -1 if it did not. `generated`
    maps the position of a job to the mean length of its answers in tokens.
    """

    looked: int
    classes: tuple[str, ...]
    groups: tuple[Group, ...]
    outcomes: bytes
    generated: dict[int, int]


def observe_call(begin: float, end: float, skip: int) -> Call:
    """Reads what was accepted from `begin` until before `end`, without the first `skip` groups."""
    return Call("jobs/history", [ACCEPTED], [repr(begin), repr(end), skip, GROUPS, JOBS, *STATES])


def observe_answer(answer: Sequence[Any]) -> Observed:
    """The answer's content."""
    looked, classes, flat, outcomes, generated = answer
    groups = zip(*(flat[n::6] for n in range(6)), strict=True)
    return Observed(
        looked=looked,
        classes=tuple(name.decode() for name in classes),
        groups=tuple(
            Group(float(at), float(due), jobs, model.decode(), tenant.decode(), basis.decode())
            for at, due, jobs, model, tenant, basis in groups
        ),
        outcomes=outcomes,
        generated={at: _mean(bins) for at, bins in zip(generated[::2], generated[1::2], strict=True)},
    )


def _mean(bins: bytes) -> int:
    """The mean length of answers in these bins."""
    places = msgspec.json.decode(bins, type=list[int])
    return round(sum(map(tokens_of, places)) / max(len(places), 1))
