"""Holds a history against docs/guarantees.md: what was promised, counted, and each violation in words. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from taxiway.contract.job import FINAL, JobState
from tests.chaos.history import (
    Accepted,
    AnyEvent,
    Cancelling,
    Observed,
    Parted,
    Ran,
    Refused,
    Stored,
    Submitted,
    Unanswered,
)

CLOCKS = 0.25
"""Seconds by which the times of one host's processes, taken one after the other on a busy machine, may differ."""

HEARD = 30.0
"""Seconds after its end within which a job's waiter has heard of it, whatever broke meanwhile."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept for a job."""

    promise: str
    job: str
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """How often what happened, and each violation. `lost_age`: the oldest acceptance that a failover lost, seconds."""

    counts: dict[str, int]
    violations: Sequence[Violation]
    lost_age: float


@dataclass(slots=True)
class _Job:
    """One accepted job, and all that was seen of it."""

    job: str
    accepted: list[Accepted] = field(default_factory=list)
    cancelling: list[float] = field(default_factory=list)
    ends: list[Observed | Stored] = field(default_factory=list)
    unanswered: list[Unanswered] = field(default_factory=list)

    @property
    def stored(self) -> Stored | None:
        return next((end for end in reversed(self.ends) if isinstance(end, Stored)), None)

    @property
    def ended(self) -> bool:
        return self.stored is not None and self.stored.state in FINAL


def check(history: Iterable[AnyEvent]) -> Report:
    """Hold the whole history of a run against the promises."""
    events = list(history)
    jobs, partings = _jobs(events), [event for event in events if isinstance(event, Parted)]
    excused = {job.job: age for job in jobs if (age := _lost_by_failover(job, partings)) is not None}
    violations = [*_two_jobs_of_a_key(events)]
    for job in jobs:
        violations += (v for v in _violations(job, partings) if job.job not in excused or v.promise != "lost")
    return Report(_counts(events, jobs, violations, len(excused)), violations, max(excused.values(), default=0.0))


def _jobs(events: Sequence[AnyEvent]) -> list[_Job]:
    """What is known of each job that was accepted."""
    jobs: dict[str, _Job] = {}
    for event in events:
        if isinstance(event, Accepted):
            jobs.setdefault(event.job, _Job(event.job)).accepted.append(event)
    for event in events:
        if isinstance(event, Cancelling | Observed | Stored | Unanswered) and event.job in jobs:
            _add(jobs[event.job], event)
    return list(jobs.values())


def _add(job: _Job, event: Cancelling | Observed | Stored | Unanswered) -> None:
    if isinstance(event, Cancelling):
        job.cancelling.append(event.at)
    elif isinstance(event, Unanswered):
        job.unanswered.append(event)
    else:
        job.ends.append(event)


def _violations(job: _Job, partings: Sequence[Parted]) -> Iterator[Violation]:
    yield from _lost(job)
    yield from _changed(job, partings)
    yield from _wrong(job)
    yield from _early_or_late(job)
    yield from _unasked(job)
    yield from _unanswered(job)


def _lost(job: _Job) -> Iterator[Violation]:
    if not job.ended:
        seen = job.stored.state if job.stored is not None else "nothing"
        yield Violation("lost", job.job, f"accepted at {job.accepted[0].at:.3f}, and the store has {seen}")


def _changed(job: _Job, partings: Sequence[Parted]) -> Iterator[Violation]:
    """What was read once reads the same ever after, but for what a failover took back."""
    final = [end for end in job.ends if end.state in FINAL]
    for before, after in pairwise(final):
        same = (before.state, before.digest) == (after.state, after.digest)
        taken_back = (parting.at <= after.at and _heard_in_window(job, before, parting) for parting in partings)
        if not same and not any(taken_back):
            yield Violation("changed", job.job, f"{before.state} {before.digest}, then {after.state} {after.digest}")


def _wrong(job: _Job) -> Iterator[Violation]:
    numbers = {accepted.number for accepted in job.accepted}
    for answer in {end.answer for end in job.ends} - {None}:
        if answer not in numbers:
            yield Violation("wrong", job.job, f"asked for {sorted(numbers)}, answered {answer}")


def _early_or_late(job: _Job) -> Iterator[Violation]:
    """A job expires after its deadline only, and is not started behind it."""
    stored = job.stored
    if stored is None:
        return
    due = stored.deadline_at
    if stored.state == JobState.EXPIRED and not due:
        yield Violation("early", job.job, "expired without a deadline")
    if stored.state == JobState.EXPIRED and stored.finished < due - CLOCKS:
        yield Violation("early", job.job, f"expired {due - stored.finished:.3f} s before its deadline")
    if due and stored.state == JobState.SUCCEEDED and stored.started > due + CLOCKS:
        yield Violation("late", job.job, f"started {stored.started - due:.3f} s after its deadline")


def _unasked(job: _Job) -> Iterator[Violation]:
    if any(end.state == JobState.CANCELLED for end in job.ends) and not job.cancelling:
        yield Violation("unasked", job.job, "cancelled without a request")


def _unanswered(job: _Job) -> Iterator[Violation]:
    for waiter in job.unanswered:
        if job.stored is not None and job.ended and job.stored.finished < waiter.at - HEARD:
            late = f"ended {waiter.at - job.stored.finished:.1f} s before its waiter at {waiter.door} gave up"
            yield Violation("unanswered", job.job, f"{late}: {waiter.told or 'told nothing'}")


def _two_jobs_of_a_key(events: Iterable[AnyEvent]) -> Iterator[Violation]:
    asked = {event.number: event.key for event in events if isinstance(event, Submitted)}
    of_key: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if isinstance(event, Accepted) and asked[event.number]:
            of_key[asked[event.number]].add(event.job)
    for key, jobs in of_key.items():
        if len(jobs) > 1:
            yield Violation("two jobs", sorted(jobs)[0], f"key {key!r} gave {len(jobs)} jobs")


def _lost_by_failover(job: _Job, partings: Iterable[Parted]) -> float | None:
    """How old the acceptance of a lost job was when a failover took it back; None where none may have."""
    if job.ended or any(accepted.replicated for accepted in job.accepted):
        return None
    ages = [
        parting.at - accepted.at
        for parting in partings
        for accepted in job.accepted
        if accepted.began - CLOCKS <= parting.at <= accepted.at + parting.window
    ]
    return max(0.0, min(ages)) if ages else None


def _heard_in_window(job: _Job, end: Observed | Stored, parting: Parted) -> bool:
    """Whether what was read at an end may have come in a failover's window.

    A client may be notified of the end before its submit returns, which is retried through a failover: what it has when
    the submit returns came at any time since the call.
    """
    for accepted in job.accepted:
        if 0 <= end.at - accepted.at <= CLOCKS:
            return accepted.began - CLOCKS <= parting.at <= end.at + parting.window
    return _in_window(parting, end.at)


def _in_window(parting: Parted, at: float) -> bool:
    return -CLOCKS <= parting.at - at <= parting.window


def _counts(
    events: Sequence[AnyEvent], jobs: Sequence[_Job], violations: Sequence[Violation], excused: int
) -> dict[str, int]:
    broken = Counter(violation.promise for violation in violations)
    ran = Counter(event.number for event in events if isinstance(event, Ran))
    states = Counter(job.stored.state for job in jobs if job.stored is not None)
    return {
        "submitted": sum(isinstance(event, Submitted) for event in events),
        "accepted": len(jobs),
        "refused": sum(isinstance(event, Refused) for event in events),
        "finished once": sum(job.ended for job in jobs),
        **{str(state): states[str(state)] for state in sorted(FINAL)},
        "results read": sum(len(job.ends) for job in jobs),
        "duplicates run": sum(times - 1 for times in ran.values()),
        "lost in a failover's window": excused,
        "lost": broken["lost"],
        "results changed": broken["changed"],
        "wrong answers": broken["wrong"],
        "expired early": broken["early"],
        "started late": broken["late"],
        "cancelled unasked": broken["unasked"],
        "two jobs of a key": broken["two jobs"],
        "waiters not told": broken["unanswered"],
    }
