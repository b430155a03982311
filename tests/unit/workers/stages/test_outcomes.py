import time
from typing import Any

import msgspec
import pytest

from broker.valkey.claims import Claim, Verdict
from tasks.heartbeat import BOUNDS, Use, held_of
from tasks.ticket import Promise
from taxiway.contract.job import Result, Tokens
from taxiway.errors import DeadlineExceededError, ExecutionError, TaxiwayError
from tests.builders import a_report, a_ticket
from tests.unit.workers.parts import a_delivery
from workers.stages.job import Delivery, Ended, Used
from workers.stages.outcomes import WorkerOutcomes


def taken(**changes: Any) -> Delivery:
    return a_delivery(a_ticket("1", accepted=100.0), received=time.time(), **changes)


def answered(delivery: Delivery, run_time: float) -> Ended:
    report = a_report(variant="echo", queue_wait=2.0, run_time=run_time)
    return Ended(delivery, Result(model="echo:1", outputs={}, report=report))


def failed(delivery: Delivery, error: TaxiwayError) -> Ended:
    return Ended(delivery, error=error)


@pytest.mark.parametrize(
    ("ran", "error", "outcome", "seconds"),
    [
        (0.5, None, "succeeded", {"queue": 2.0, "run": 0.25, "total": 2.5}),
        (0.0, DeadlineExceededError("late"), "expired", {}),
        (3.0, ExecutionError("it broke"), "failed", {"queue": 2.0, "run": 3.0, "total": 5.0}),
    ],
)
def test_a_job_counts_with_its_outcome_and_the_time_that_it_had(
    ran: float, error: TaxiwayError | None, outcome: str, seconds: dict[str, float]
) -> None:
    counters, delivery = (
        WorkerOutcomes("cpu:0"),
        taken(**({"began": time.time() - ran, "started": 102.0} if ran else {})),
    )
    counters.count([failed(delivery, error) if error else answered(delivery, run_time=0.25)])
    done = counters.totals()["cpu.batch"]
    assert done.outcomes == {outcome: 1}
    assert {stage: figures[-1] for stage, figures in done.latency.items() if sum(figures)} == pytest.approx(
        seconds, abs=0.2
    )
    assert not ran or done.latency["queue"][BOUNDS.index(2.5)] == 1


def test_what_rows_used_of_an_endpoint_counts_by_model_and_dollars_by_known_tenant() -> None:
    counters = WorkerOutcomes("endpoint:0", ["lab"])
    counters.use(
        [
            Used(taken(tenant="lab"), Tokens(10, 4, 5), 0.5, 0.0, 0.2, 0.03, aborted=False),
            Used(taken(tenant="nobody"), Tokens(1, 0, 0), 0.25, 0.0, None, None, aborted=True),
        ]
    )
    done = counters.totals()["cpu.batch"]
    assert done.used == {"echo:1": Use(rows=2, aborted=1, input=11, cached=4, output=5)}
    assert done.dollars == {"echo:1": {"lab": 0.5, "": 0.25}}
    assert (done.latency["first"][-1], done.latency["token"][-1]) == (0.2, 0.03)


def test_a_jobs_dollars_are_counted_once_where_use_was_counted_before() -> None:
    counters = WorkerOutcomes("endpoint:0", ["lab"])
    ended = answered(taken(began=time.time() - 0.5, started=102.0, tenant="lab"), run_time=0.25)
    assert ended.result is not None
    report = msgspec.structs.replace(ended.result.report, cost=0.75)
    result = msgspec.structs.replace(ended.result, report=report)
    counters.count([Ended(ended.delivery, result, billed=0.5)])
    assert counters.totals()["cpu.batch"].dollars == {"echo:1": {"lab": 0.25}}


def test_a_promise_counts_for_its_class_and_as_broken_if_a_job_expired_after_it() -> None:
    counters, promise = WorkerOutcomes("cpu:0"), Promise("gpu", 100.0, 1.0, 2.0)
    for seconds, expired in [(1.5, False), (2.5, False), (3.0, True), (1.9, True)]:
        counters.judge(promise, seconds, expired=expired)
    assert held_of(counters.totals()["gpu"].latency["bound"]) == (1, 3), "what expired within it tells nothing"


@pytest.mark.parametrize(
    ("message", "record", "due"),
    [(60.0, 30.0, 30.0), (30.0, 60.0, 30.0), (30.0, 0.0, 30.0), (0.0, 30.0, 30.0), (0, 0, 0), (30.0, None, 30.0)],
)
def test_a_job_is_due_at_its_earlier_deadline(message: float, record: float | None, due: float) -> None:
    claim = None if record is None else Claim(Verdict.RUN, "worker#1", deadline_at=record)
    assert a_delivery(a_ticket(deadline_at=message), claim=claim).deadline_at == due
