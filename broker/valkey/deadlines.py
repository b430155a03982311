"""Which jobs are past their deadline, by the server's clock, and what is said of them.

`forwarding` makes one group of jobs that go together; it waits in a sorted set by their deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from broker.valkey.lua import Call
from taxiway.contract.job import JobState
from taxiway.contract.keys import ARRIVALS, DEADLINES, job_key
from taxiway.errors import DeadlineExceededError


@dataclass(frozen=True, slots=True)
class Course:
    """Where a job's time went until it was `ended` past its deadline; times by the store's clock, 0 where unknown.

    It waited for its `hardware_class`: in holding where it was `held`, in the arrivals where there is none yet. It ran
    since `started`. One without a deadline (`deadline_at` 0) was not run before its ticket expired.
    """

    ended: float
    deadline_at: float
    accepted: float = 0.0
    hardware_class: str = ""
    held: bool = False
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Overdue:
    """A job past its deadline, its client (empty where it has none), and where its time went."""

    job: str
    reply: str
    course: Course


def exceeded(course: Course) -> DeadlineExceededError:
    """The error of a job past its deadline: how long that was, and where the time went, in seconds."""
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
        spent = f"held {_seconds(queued)}, for no queue had room"
    else:
        spent = f"queued {_seconds(queued)} on {course.hardware_class or ARRIVALS}"
    told = f"{what}: {spent}, ran {_seconds(ran)}" if course.started else f"{what}: {spent}"
    details = {"deadline": deadline if course.deadline_at else None, "queued": queued, "ran": ran}
    rounded = {name: None if figure is None else round(figure, 6) for name, figure in details.items()}
    return DeadlineExceededError(told, **rounded, hardware_class=course.hardware_class)


def overdue_call(most: int, lease: float) -> Call:
    """Takes up to `most` groups of jobs that are due; what of them has not ended comes again after `lease` seconds."""
    return Call("overdue", [DEADLINES], [most, lease])


def overdue_answer(answer: Sequence[Any]) -> tuple[int, list[Overdue], float]:
    """How many groups were due, their jobs, and the next due, 0 for none."""
    now, groups, due, *told = answer
    jobs = [_overdue(float(now), *(field.decode() for field in told[n : n + 7])) for n in range(0, len(told), 7)]
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
    return f"{seconds:.0f} s" if seconds >= 100 else f"{round(seconds, 6):.3g} s"  # clocks tell microseconds
