"""Faults of ours are told from the request's, and retried within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ticket import Ticket
from taxiway.errors import DeviceFaultError, ExecutionError, TaxiwayError
from taxiway.keys import INFER
from workers.executor import as_ours
from workers.faults import DeviceLostError, Fault, fault_of
from workers.retries import FIRST_PAUSE, FLOOR, LONGEST_PAUSE, MOST_SAVED, SHARE, Budget, Retries, pause
from workers.work import Delivery, Dropped, Ended, Ending, Outcome


def delivery(job: str = "j") -> Delivery:
    ticket = Ticket(
        job=job, task=INFER, model="echo:1", variants={}, prices={}, accepted=0, deadline_at=0, level=1, reason=""
    )
    return Delivery(job, ticket, b"", "application/json", 0.0, hardware_class="cpu.batch")


def failed(one: Delivery, error: TaxiwayError) -> Ended:
    return Ended(one, Outcome(error=error))


OURS = DeviceFaultError("out of memory")


class Desk:
    """What `Retries` hands on: what ended, and what runs again."""

    def __init__(self, attempts: int = 3) -> None:
        self.ended: list[Ending] = []
        self.again: list[tuple[Delivery, float]] = []
        self.retries = Retries(self._end, self._later, attempts)

    def _end(self, endings: Sequence[Ending]) -> None:
        self.ended += endings

    def _later(self, one: Delivery, *, pause: float) -> None:
        self.again.append((one, pause))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (MemoryError(), Fault.MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), Fault.MEMORY),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes"), Fault.MEMORY),
        (RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer of size 512"), Fault.MEMORY),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Fault.LOST),
        (RuntimeError("CUDA error: unspecified launch failure"), Fault.LOST),
        (RuntimeError("the size of tensor a (3) must match the size of tensor b (4)"), None),
        (ValueError("a text about being out of memory"), None),
        (ZeroDivisionError("division by zero"), None),
    ],
)
def test_the_devices_faults_are_told_from_the_requests(error: Exception, fault: Fault | None) -> None:
    assert fault_of(error) is fault


def test_what_a_variant_raises_is_a_fault_of_ours_only_where_it_says_so() -> None:
    assert isinstance(as_ours("m/v", MemoryError()), DeviceFaultError)
    assert isinstance(as_ours("m/v", ValueError("no")), ExecutionError)
    with pytest.raises(DeviceLostError):
        as_ours("m/v", RuntimeError("CUDA error: device-side assert triggered"))


def test_a_fault_of_ours_runs_again_after_a_pause_and_at_last_ends_the_job() -> None:
    desk, one = Desk(attempts=3), delivery()
    one.began = 5.0
    for _ in range(3):
        desk.retries.put([failed(one, OURS)])
    assert [taken for taken, _ in desk.again] == [one, one]
    assert desk.ended == [failed(one, OURS)]
    assert one.began == 0.0


def test_the_requests_own_fault_is_never_retried() -> None:
    desk, one = Desk(), delivery()
    endings: list[Ending] = [failed(one, ExecutionError("division by zero")), Dropped(one)]
    desk.retries.put(endings)
    assert (desk.ended, desk.again) == (endings, [])


def test_a_device_that_fails_at_everything_soon_retries_nothing() -> None:
    desk = Desk()
    for n in range(1000):
        desk.retries.put([failed(delivery(str(n)), OURS)])
    assert len(desk.again) == FLOOR


@given(st.lists(st.one_of(st.none(), st.integers(0, 500))))
def test_retries_are_at_most_a_share_of_the_answers_and_a_floor(steps: list[int | None]) -> None:
    """None is a fault of ours, a number so many answers."""
    budget, made, answers = Budget(), 0, 0
    for step in steps:
        if step is not None:
            budget, answers = budget.earned(step), answers + step
        elif budget.allows:
            budget, made = budget.spent(), made + 1
        assert 0 <= budget.tokens <= MOST_SAVED
        assert made <= FLOOR + SHARE * answers + 1e-6


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_pauses_grow_differ_and_are_bounded(retries: int, draw: float) -> None:
    assert FIRST_PAUSE / 2 <= pause(retries, draw) <= LONGEST_PAUSE
    assert pause(retries, draw) <= pause(retries + 1, draw)
    assert pause(retries, 0.0) < pause(retries, 0.9)
