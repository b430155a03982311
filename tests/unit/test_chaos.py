"""The fault suite's own decisions: the checker on histories written by hand, the plan and the workload."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos import history
from tests.chaos.checker import Report, check
from tests.chaos.plan import LEADER, Kind, Targets, plan_faults

TARGETS = Targets(
    workers=["worker-0", "worker-1", "worker-2"],
    routers=["router-0", "router-1"],
    servers=["store"],
    cables=["workers to store", "producers to store"],
    clocks=["worker-0"],
    replicated=True,
)


def batch(*, missing: int = 0, **found: int) -> history.BatchRead:
    return history.BatchRead(
        at=20.0, began=10.0, status="completed", lines=9, answered=9 - missing, missing=missing, **found
    )


def submitted(number: int = 1, *, key: str = "") -> history.Submitted:
    return history.Submitted(at=0.0, number=number, model="tally", key=key)


def accepted(
    job: str = "a", *, at: float = 1.0, took: float = 0.0, number: int = 1, replicated: bool = False
) -> history.Accepted:
    return history.Accepted(at=at, number=number, job=job, interface="client", began=at - took, replicated=replicated)


def observed(job: str = "a", *, at: float = 2.0, state: str = "succeeded", digest: str = "x") -> history.Observed:
    return history.Observed(at=at, job=job, interface="client", state=state, digest=digest, answer=1)


def stored(
    state: str = "succeeded", *, at: float = 99.0, digest: str = "x", answer: int | None = 1, **times: float
) -> history.Stored:
    return history.Stored(at=at, job="a", state=state, digest=digest, answer=answer, **times)


def broken(*events: history.AnyEvent) -> list[str]:
    """The guarantees that a history violates."""
    return [violation.guarantee for violation in check(events).violations]


def test_a_job_that_ended_once_with_one_result_violates_nothing() -> None:
    ran = [history.Ran(number=1)] * 3
    report = check([submitted(), accepted(), observed(), *ran, stored(), stored()])
    assert report == Report(report.counts, [], 0.0)
    counts = {"submitted": 1, "accepted": 1, "finished once": 1, "succeeded": 1, "results read": 3, "duplicates run": 2}
    assert {name: count for name, count in report.counts.items() if count} == counts


def expired(finished: float) -> history.Stored:
    return stored("expired", finished=finished, deadline_at=50.0, answer=None)


JOB = (submitted(), accepted())
CANCELLED = stored("cancelled", answer=None)
WAITER = history.Unanswered(at=90.0, job="a", interface="client")
OVER = history.FailedOver(at=10.0, window=1.0)
SLOW, QUICK = (accepted(at=11.5, took=took, replicated=True) for took in (1.7, 0.5))
TWICE = (submitted(key="k"), accepted("a"), accepted("b"), stored(), history.Stored(job="b", state="failed", digest=""))
HISTORIES: list[tuple[Sequence[history.AnyEvent], list[str]]] = [
    (JOB, ["lost"]),
    ((*JOB, stored("queued", digest="", answer=None)), ["lost"]),
    ((*JOB, stored("final without a result")), ["lost"]),
    ((submitted(), history.Refused(number=1, error="broker_unavailable", unclear=True)), []),
    ((*JOB, observed(digest="x"), stored(digest="y")), ["changed"]),
    ((*JOB, observed(state="expired"), stored()), ["changed"]),
    ((*JOB, stored(), stored(digest="y")), ["changed"]),
    ((batch(),), []),
    ((batch(missing=1),), ["lost"]),
    ((batch(missing=1), history.FailedOver(at=15.0, window=1.0)), []),
    ((batch(repeated=1),), ["two answers"]),
    ((batch(wrong=1, resumed=3),), ["wrong"]),
    ((*JOB, stored(answer=2)), ["wrong"]),
    ((*JOB, expired(49.0)), ["early"]),
    ((*JOB, expired(50.1)), []),
    ((*JOB, stored("expired", accepted=1.0, finished=50.0, answer=None)), ["early"]),
    ((*JOB, stored("expired", finished=50.0, answer=None)), []),  # lost before it was accepted
    ((*JOB, stored(deadline_at=50.0, started=51.0)), ["late"]),
    ((*JOB, stored(deadline_at=50.0, started=49.9, finished=51.0)), []),
    ((*JOB, CANCELLED), ["unrequested"]),
    ((*JOB, history.CancelRequested(job="a"), CANCELLED), []),
    ((*JOB, WAITER, stored(finished=20.0)), ["unanswered"]),
    ((*JOB, WAITER, stored(finished=80.0)), []),
    (TWICE, ["two jobs"]),
    ((*JOB, observed(at=9.5), OVER, stored(digest="y")), []),  # a failover may undo what was read in its window
    ((*JOB, observed(at=8.5), OVER, stored(digest="y")), ["changed"]),
    ((*JOB, observed(at=11.0), OVER, stored(digest="y")), ["changed"]),
    ((submitted(), OVER, SLOW, observed(at=11.51), stored(digest="y")), []),  # and what was read as it was submitted
    ((submitted(), OVER, SLOW, observed(at=12.0), stored(digest="y")), ["changed"]),
    ((submitted(), OVER, QUICK, observed(at=11.51), stored(digest="y")), ["changed"]),
]


@pytest.mark.parametrize(("events", "guarantees"), HISTORIES)
def test_a_history_violates_what_it_does_not_keep(events: Sequence[history.AnyEvent], guarantees: list[str]) -> None:
    assert broken(*events) == guarantees


def test_a_failover_may_lose_what_was_written_in_its_window_and_nothing_else() -> None:
    failed_over = history.FailedOver(at=10.0, window=1.0)
    report = check([submitted(), accepted(at=9.6), failed_over])
    assert (report.violations, report.counts["lost in a failover's window"]) == ([], 1)
    assert report.lost_age == pytest.approx(0.4)
    assert broken(submitted(), accepted(at=8.9), failed_over) == ["lost"]
    assert broken(submitted(), accepted(at=10.5), failed_over) == ["lost"]
    assert broken(submitted(), accepted(at=10.5, took=0.6), failed_over) == []
    assert broken(submitted(), accepted(at=9.6, replicated=True), failed_over) == ["lost"]


@given(seed=st.integers(0, 2**32), seconds=st.floats(20, 1200), kills=st.integers(1, 200))
def test_a_plan_follows_from_its_seed_and_kills_that_many_workers(seed: int, seconds: float, kills: int) -> None:
    faults = plan_faults(seed, seconds, TARGETS, kills)
    assert faults == plan_faults(seed, seconds, TARGETS, kills)
    assert list(faults) == sorted(faults, key=lambda fault: fault.at)
    assert all(0 <= fault.at <= seconds for fault in faults)
    assert all(0 <= fault.seconds <= 20 for fault in faults)
    assert {fault.kind for fault in faults} == set(Kind)
    killed = Counter(fault.target for fault in faults if fault.kind is Kind.KILL)
    assert sum(killed[worker] for worker in TARGETS.workers) == kills
    assert killed[LEADER] >= 1


@given(seed=st.integers(0, 2**32))
def test_faults_of_a_server_never_overlap(seed: int) -> None:
    of_servers = [fault for fault in plan_faults(seed, 300, TARGETS, 10) if fault.target == "store"]
    assert all(a.at + a.seconds < b.at for a, b in itertools.pairwise(of_servers))
    alone = plan_faults(seed, 300, replace(TARGETS, replicated=False), 10)
    assert Kind.FAIL_OVER not in {fault.kind for fault in alone}, "there is no replica"
