"""Checks a history against docs/guarantees.md: counts what happened, and describes each violation. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from taxiway.contract.job import FINAL, JobState
from tests.chaos.history import (
    Accepted,
    AnyEvent,
    BatchRead,
    CancelRequested,
    FailedOver,
    Observed,
    Ran,
    Refused,
    Stored,
    Submitted,
    Unanswered,
)

CLOCKS = 0.25
"""Tolerance in seconds between timestamps of two processes on one busy host."""

NOTIFIED_WITHIN = 30.0
"""Seconds after a job's end within which its waiter must be notified, whatever fails meanwhile."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A guarantee that was violated for a job."""

    guarantee: str
    job: str
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """Event counts and violations. `lost_age`: age in seconds of the oldest acceptance that a failover lost."""

    counts: dict[str, int]
    violations: Sequence[Violation]
    lost_age: float


@dataclass(slots=True)
class _Job:
    """One accepted job and its events."""

    job: str
    accepted: list[Accepted] = field(default_factory=list)
    cancel_requests: list[float] = field(default_factory=list)
    ends: list[Observed | Stored] = field(default_factory=list)
    unanswered: list[Unanswered] = field(default_factory=list)

    @property
    def stored(self) -> Stored | None:
        return next((end for end in reversed(self.ends) if isinstance(end, Stored)), None)

    @property
    def ended(self) -> bool:
        return self.stored is not None and self.stored.state in FINAL


def check(history: Iterable[AnyEvent]) -> Report:
    """Check the whole history of a run against the guarantees."""
    events = list(history)
    jobs, failovers = _jobs(events), [event for event in events if isinstance(event, FailedOver)]
    excused = {job.job: age for job in jobs if (age := _lost_by_failover(job, failovers)) is not None}
    violations = [*_duplicate_jobs_of_a_key(events), *_wrong_batches(events, failovers)]
    for job in jobs:
        violations += (v for v in _violations(job, failovers) if job.job not in excused or v.guarantee != "lost")
    return Report(_counts(events, jobs, violations, len(excused)), violations, max(excused.values(), default=0.0))


def _jobs(events: Sequence[AnyEvent]) -> list[_Job]:
    """Each accepted job with its events."""
    jobs: dict[str, _Job] = {}
    for event in events:
        if isinstance(event, Accepted):
            jobs.setdefault(event.job, _Job(event.job)).accepted.append(event)
    for event in events:
        if isinstance(event, CancelRequested | Observed | Stored | Unanswered) and event.job in jobs:
            _add(jobs[event.job], event)
    return list(jobs.values())


def _add(job: _Job, event: CancelRequested | Observed | Stored | Unanswered) -> None:
    if isinstance(event, CancelRequested):
        job.cancel_requests.append(event.at)
    elif isinstance(event, Unanswered):
        job.unanswered.append(event)
    else:
        job.ends.append(event)


def _violations(job: _Job, failovers: Sequence[FailedOver]) -> Iterator[Violation]:
    yield from _lost(job)
    yield from _changed(job, failovers)
    yield from _wrong(job)
    yield from _early_or_late(job)
    yield from _cancelled_unrequested(job)
    yield from _unanswered(job)


def _lost(job: _Job) -> Iterator[Violation]:
    if not job.ended:
        seen = job.stored.state if job.stored is not None else "nothing"
        yield Violation("lost", job.job, f"accepted at {job.accepted[0].at:.3f}, and the store has {seen}")


def _changed(job: _Job, failovers: Sequence[FailedOver]) -> Iterator[Violation]:
    """A final state that was read must not change, except where a failover lost it."""
    final = [end for end in job.ends if end.state in FINAL]
    for before, after in pairwise(final):
        same = (before.state, before.digest) == (after.state, after.digest)
        undone = (failover.at <= after.at and _observed_in_window(job, before, failover) for failover in failovers)
        if not same and not any(undone):
            yield Violation("changed", job.job, f"{before.state} {before.digest}, then {after.state} {after.digest}")


def _wrong(job: _Job) -> Iterator[Violation]:
    numbers = {accepted.number for accepted in job.accepted}
    for answer in {end.answer for end in job.ends} - {None}:
        if answer not in numbers:
            yield Violation("wrong", job.job, f"asked for {sorted(numbers)}, answered {answer}")


def _early_or_late(job: _Job) -> Iterator[Violation]:
    """A job expires only after its deadline, and does not start after it.

    A record that the store lost before its job ended has no times: the worker knew the deadline by its ticket.
    """
    stored = job.stored
    if stored is None:
        return
    due = stored.deadline_at
    if stored.state == JobState.EXPIRED and not due and stored.accepted:
        yield Violation("early", job.job, "expired without a deadline")
    if stored.state == JobState.EXPIRED and stored.finished < due - CLOCKS:
        yield Violation("early", job.job, f"expired {due - stored.finished:.3f} s before its deadline")
    if due and stored.state == JobState.SUCCEEDED and stored.started > due + CLOCKS:
        yield Violation("late", job.job, f"started {stored.started - due:.3f} s after its deadline")


def _cancelled_unrequested(job: _Job) -> Iterator[Violation]:
    if any(end.state == JobState.CANCELLED for end in job.ends) and not job.cancel_requests:
        yield Violation("unrequested", job.job, "cancelled without a request")


def _unanswered(job: _Job) -> Iterator[Violation]:
    for waiter in job.unanswered:
        if job.stored is not None and job.ended and job.stored.finished < waiter.at - NOTIFIED_WITHIN:
            late = f"ended {waiter.at - job.stored.finished:.1f} s before its waiter at {waiter.interface} gave up"
            yield Violation("unanswered", job.job, f"{late}: {waiter.error or 'no error'}")


def _duplicate_jobs_of_a_key(events: Iterable[AnyEvent]) -> Iterator[Violation]:
    key_of = {event.number: event.key for event in events if isinstance(event, Submitted)}
    by_key: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if isinstance(event, Accepted) and key_of[event.number]:
            by_key[key_of[event.number]].add(event.job)
    for key, jobs in by_key.items():
        if len(jobs) > 1:
            yield Violation("two jobs", sorted(jobs)[0], f"key {key!r} gave {len(jobs)} jobs")


def _wrong_batches(events: Iterable[AnyEvent], failovers: Sequence[FailedOver]) -> Iterator[Violation]:
    """Every line of a batch is in one of its files, once. What is known of a batch may be lost in a failover."""
    for event in events:
        if not isinstance(event, BatchRead):
            continue
        excused = any(event.began - CLOCKS <= failover.at <= event.at + failover.window for failover in failovers)
        if event.missing and not excused:
            why = f"{event.missing} of {event.lines} lines of the {event.status} batch are in neither file"
            yield Violation("lost", f"batch of {event.began:.3f}", why)
        if event.repeated:
            yield Violation("two answers", f"batch of {event.began:.3f}", f"{event.repeated} lines are there again")
        if event.wrong:
            yield Violation("wrong", f"batch of {event.began:.3f}", f"{event.wrong} runs have another's answer")


def _lost_by_failover(job: _Job, failovers: Iterable[FailedOver]) -> float | None:
    """Age of a lost job's acceptance at the failover that lost it; None if no failover explains the loss."""
    if job.ended or any(accepted.replicated for accepted in job.accepted):
        return None
    ages = [
        failover.at - accepted.at
        for failover in failovers
        for accepted in job.accepted
        if accepted.began - CLOCKS <= failover.at <= accepted.at + failover.window
    ]
    return max(0.0, min(ages)) if ages else None


def _observed_in_window(job: _Job, end: Observed | Stored, failover: FailedOver) -> bool:
    """Whether an observed end may have been lost by a failover.

    A client may be notified of the end before its submit returns, and a submit is retried through a failover. So what
    it knows when the submit returns may have arrived at any time since the call.
    """
    for accepted in job.accepted:
        if 0 <= end.at - accepted.at <= CLOCKS:
            return accepted.began - CLOCKS <= failover.at <= end.at + failover.window
    return _in_window(failover, end.at)


def _in_window(failover: FailedOver, at: float) -> bool:
    return -CLOCKS <= failover.at - at <= failover.window


def _counts(
    events: Sequence[AnyEvent], jobs: Sequence[_Job], violations: Sequence[Violation], excused: int
) -> dict[str, int]:
    broken = Counter(violation.guarantee for violation in violations)
    ran = Counter(event.number for event in events if isinstance(event, Ran))
    states = Counter(job.stored.state for job in jobs if job.stored is not None)
    batches = [event for event in events if isinstance(event, BatchRead)]
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
        "cancelled without a request": broken["unrequested"],
        "two jobs of a key": broken["two jobs"],
        "waiters not notified": broken["unanswered"],
        "lines of batches": sum(batch.lines for batch in batches),
        "lines answered": sum(batch.answered for batch in batches),
        "lines answered twice": broken["two answers"],
        "runs resumed": sum(batch.resumed for batch in batches),
        "runs that yielded": sum(batch.yielded for batch in batches),
    }
