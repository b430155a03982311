"""Faults of models, devices and requests: as what they end a job, which are retried, and how each end is counted."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks.heartbeat import BOUNDS, Use, held_of
from tasks.models.profiles import ProfileBook
from tasks.ticket import Promise
from taxiway.contract.job import Result, Tokens, failure_meta, read_meta, read_result
from taxiway.errors import MAX_ERROR, DeviceFaultError, ExecutionError, InvalidRequestError, TaxiwayError
from tests.builders import a_report, a_ticket
from tests.celery_double import Admissions, Endings, NoCelery
from tests.unit.workers.parts import MODELS, a_delivery, a_running_job, an_executor, no_store, shared
from workers.decide import faults
from workers.decide.faults import text_of
from workers.executor import as_ours
from workers.learned import Loaded
from workers.pipelines.image import decode
from workers.port import Item, Row, Runtime
from workers.runtimes.echo import EchoRuntime
from workers.stages.admit import named_row
from workers.stages.device import OUT_OF_MEMORY, Retries
from workers.stages.job import Delivery, Dropped, Ended, Ending, RunningJob, Used
from workers.stages.outcomes import WorkerOutcomes


def delivery(job: str = "j") -> Delivery:
    return a_delivery(a_ticket(job))


def failed(one: Delivery, error: TaxiwayError) -> Ended:
    return Ended(one, error=error)


OURS = DeviceFaultError("out of memory", variant="m/v")


class Desk:
    """What `Retries` hands on: what ended, and what runs again; `well` says whether the model's example runs."""

    def __init__(self, attempts: int = 3, *, well: bool = True, most: int = 3) -> None:
        self.endings, self.admissions, self.celery = Endings(), Admissions(), NoCelery()
        self.well, self.tried, store = well, 0, no_store()
        store.limits = msgspec.structs.replace(store.limits, attempts=attempts, memory_faults=most)
        parts = replace(shared(self.admissions, store=store, celery=self.celery), endings=self.endings)
        self.drain = parts.drain
        self.retries = Retries(parts, self._runs_example)

    def _runs_example(self, variant: str) -> bool:
        assert variant == "m/v"
        self.tried += 1
        return self.well


@pytest.mark.cases(
    "error, fault",
    [
        (MemoryError(), "MEMORY"),
        (ZeroDivisionError("by zero"), None),
        (ValueError("a text about being out of memory"), None),
    ],
)
def test_the_faults_of_devices_are_told_from_those_of_requests(error: Exception | str, fault: str | None) -> None:
    found = faults.fault_of(RuntimeError(error) if isinstance(error, str) else error)
    assert found is (faults.Fault[fault] if fault else None)


def test_what_a_variant_raises_is_a_fault_of_ours_only_where_it_says_so() -> None:
    assert isinstance(as_ours("m/v", MemoryError()), DeviceFaultError)
    assert isinstance(as_ours("m/v", ValueError("no")), ExecutionError)
    with pytest.raises(faults.DeviceLostError):
        as_ours("m/v", RuntimeError("CUDA error: device-side assert triggered"))


def test_the_requests_own_fault_is_never_retried() -> None:
    desk, one = Desk(), delivery()
    endings: list[Ending] = [failed(one, ExecutionError("division by zero")), Dropped(one)]
    desk.retries.put(endings)
    assert (desk.endings.all, desk.admissions.all) == (endings, [])


def test_a_device_that_fails_at_everything_soon_retries_nothing() -> None:
    desk = Desk()
    for n in range(1000):
        desk.retries.put([failed(delivery(str(n)), OURS)])
    assert len(desk.admissions.all) == faults.FLOOR


def starve(desk: Desk, *jobs: str) -> None:
    for job in jobs:
        desk.retries.put([failed(delivery(job), OURS)])


def test_a_worker_leaves_that_has_no_memory_for_jobs_nor_for_the_models_example() -> None:
    desk = Desk(attempts=1, well=False)
    starve(desk, "a", "b")
    assert not desk.drain.begun and [one.delivery.job for one in desk.endings.all] == ["a", "b"]
    starve(desk, "c", "d")
    assert desk.drain.begun and desk.drain.left <= 0 and desk.celery.exited == OUT_OF_MEMORY
    assert [(one.job, one.retries, pause) for one, pause in desk.admissions.all] == [
        ("c", 1, faults.RETRIES.longest),
        ("d", 1, faults.RETRIES.longest),
    ]
    assert desk.tried == 1


def test_one_job_that_is_too_large_ends_no_worker_however_often_it_is_tried() -> None:
    desk, one = Desk(attempts=9, well=False), delivery()
    for _ in range(9):
        desk.retries.put([failed(one, OURS)])
    assert not desk.drain.begun and desk.tried == 0


def test_an_answer_of_the_variant_says_that_there_is_memory() -> None:
    desk = Desk(well=False)
    starve(desk, "a", "b")
    desk.retries.put([a_running_job(key="m/v")])
    starve(desk, "c", "d")
    desk.retries.put([a_running_job(key="m/other")])
    assert not desk.drain.begun


@given(st.lists(st.one_of(st.none(), st.integers(0, 500))))
def test_retries_are_at_most_a_share_of_the_answers_and_a_floor(steps: list[int | None]) -> None:
    """None is a fault of ours, a number so many answers."""
    budget, made, answers = faults.Budget(), 0, 0
    for step in steps:
        if step is not None:
            budget, answers = budget.earned(step), answers + step
        elif budget.allows:
            budget, made = budget.spent(), made + 1
        assert 0 <= budget.tokens <= faults.MOST_SAVED
        assert made <= faults.FLOOR + faults.SHARE * answers + 1e-6


class Silent(Exception):
    """An error that fails to say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


RAISED = [
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    Silent(),
    ValueError("a\ud800"),
    ValueError("x" * 10_000_000),
    MemoryError(),
    RecursionError("deep"),
]


class Raising:
    """A pipeline that fails for one of its items."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        return Item({"payload": np.array(row["payload"])}, 1, parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        if any(item.arrays["payload"] == 7 for item in items):
            raise self._error
        return [{"payload": item.arrays["payload"]} for item in items]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_a_model_raises_fails_its_row_alone_in_few_words(error: BaseException, tmp_path: Path) -> None:
    executor, model = an_executor(tmp_path), MODELS.resolve("echo")
    known = ProfileBook().lookup(model, "echo", "cpu", "test")
    loaded = Loaded("echo:1/echo", model, model.variants["echo"], Raising(error), EchoRuntime(), known, 0.0)
    answers = executor.run(loaded, [loaded.pipeline.prepare({"payload": n}, {}) for n in (6, 7, 8)])
    failed = answers.pop(1)
    assert isinstance(failed, TaxiwayError)
    assert [isinstance(answer, dict) for answer in answers] == [True, True]
    with pytest.raises(type(failed)):
        read_result(read_meta(failure_meta("job", failed)))
    assert len(failed.message.encode()) <= MAX_ERROR


def test_an_error_is_stored_whatever_its_text_and_its_details_hold() -> None:
    error = ExecutionError("é\ud800" * 10_000, field="f" * 10_000, near=["n" * 9999], odd={1, 2}.__iter__())
    stored = failure_meta("job", error)
    assert len(stored) < 2 * MAX_ERROR
    with pytest.raises(ExecutionError, match=r"é\\ud800"):
        read_result(read_meta(stored))
    plain = InvalidRequestError("x", field="f" * 10_000, near=["n" * 9999])
    assert len(msgspec.json.encode(plain.details)) < 2 * MAX_ERROR + 50


@dataclass
class Rows:
    """As much of a job as names a row."""

    rows: tuple[Any, ...]


def named(error: TaxiwayError, index: int, rows: int) -> str:
    return named_row(error, index, cast(RunningJob, Rows((None,) * rows))).message


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.cases(
    "content, message", [(jpeg()[:-30], "expected a valid JPEG or PNG, got a corrupt one: image file is truncated")]
)
def test_a_bad_photograph_is_named_by_its_input_and_row_and_no_address(content: object, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(content, 8)
    assert "0x" not in caught.value.message
    assert named(caught.value, 0, 1).startswith(f"inputs.image: {message}")
    assert named(caught.value, 3, 4).startswith(f"inputs.image[3]: {message}")


@pytest.mark.cases("text, shown")
def test_what_a_library_says_has_no_addresses_of_objects(text: str, shown: str) -> None:
    assert text_of(RuntimeError(text)) == shown


def taken(**changes: Any) -> Delivery:
    return a_delivery(a_ticket("1", accepted=100.0), received=time.time(), **changes)


def answered(delivery: Delivery, run_time: float) -> Ended:
    report = a_report(variant="echo", queue_wait=2.0, run_time=run_time)
    return Ended(delivery, Result(model="echo:1", outputs={}, report=report))


@pytest.mark.cases("ran, error, outcome, seconds")
def test_a_job_counts_with_its_outcome_and_the_time_that_it_had(
    ran: float, error: type[TaxiwayError] | None, outcome: str, seconds: dict[str, float]
) -> None:
    counters, delivery = (
        WorkerOutcomes("cpu:0"),
        taken(**({"began": time.time() - ran, "started": 102.0} if ran else {})),
    )
    counters.count([Ended(delivery, error=error("late")) if error else answered(delivery, run_time=0.25)])
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
