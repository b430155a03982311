"""Our own faults are retried within a budget, a request's are not; a worker whose device stays full exits."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.errors import DeviceFaultError, ExecutionError, TaxiwayError
from tests.builders import a_ticket
from tests.celery_double import Admissions, Endings, NoCelery
from tests.unit.workers.parts import a_delivery, a_running_job, no_store, shared
from workers.decide import faults
from workers.executor import as_ours
from workers.stages.device import OUT_OF_MEMORY, Retries
from workers.stages.job import Answered, Delivery, Dropped, Ended, Ending


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


def test_a_worker_stays_whose_model_has_memory_for_its_example() -> None:
    desk = Desk()
    starve(desk, "a", "b", "c", "d", "e", "f")
    assert not desk.drain.begun and desk.tried == 2


def test_one_job_that_is_too_large_ends_no_worker_however_often_it_is_tried() -> None:
    desk, one = Desk(attempts=9, well=False), delivery()
    for _ in range(9):
        desk.retries.put([failed(one, OURS)])
    assert not desk.drain.begun and desk.tried == 0


def test_an_answer_of_the_variant_says_that_there_is_memory() -> None:
    desk = Desk(well=False)
    starve(desk, "a", "b")
    desk.retries.put([Answered(a_running_job(key="m/v"))])
    starve(desk, "c", "d")
    desk.retries.put([Answered(a_running_job(key="m/other"))])
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
