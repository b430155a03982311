from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.operators.view import Calibration, calibration
from local.doctor.examine import ClassReport, HeldBounds, calibrations
from tasks.heartbeat import DeviceFacts, Done, count, empty, held_of, median_of
from tests.builders import a_device


def figures(*shares: float) -> list[float]:
    counted = empty()
    for one in shares:
        count(counted, one)
    return counted


def a_worker(*shares: float) -> DeviceFacts:
    """A worker that ended jobs which took these shares of "at most"."""
    return a_device("cpu", done={"cpu": Done(latency={"bound": tuple(figures(*shares))})})


@given(st.lists(st.floats(0.001, 100), min_size=1))
def test_exactly_the_jobs_that_took_no_more_than_at_most_held(shares: list[float]) -> None:
    assert held_of(figures(*shares)) == (sum(share <= 1 for share in shares), len(shares))


@given(st.lists(st.floats(0.001, 100), min_size=1))
def test_the_median_is_in_the_bucket_of_the_median_job(shares: list[float]) -> None:
    middle = sorted(shares)[(len(shares) - 1) // 2]
    assert median_of(figures(middle)) <= 2.5 * median_of(figures(*shares)) + 1e-9
    assert median_of(figures(*shares)) <= 10 * middle


def test_a_class_is_calibrated_by_what_all_its_live_workers_counted() -> None:
    assert calibration("cpu", [a_worker(0.4, 0.4, 2.0), a_worker(0.4)]) == Calibration(4, 0.75, 0.4167)
    assert calibration("cpu", [a_worker(), a_device("cpu")]) is None
    assert calibration("other", [a_worker(0.4)]) is None


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        (HeldBounds(100, 0.97, 0.5), [True]),
        (HeldBounds(100, 0.9, 0.5), [False]),
        (HeldBounds(100, 1.0, 0.2), [False]),
        (HeldBounds(19, 0.5, 0.5), []),
        (None, []),
    ],
)
def test_the_doctor_finds_bounds_that_do_not_hold_and_those_that_say_nothing(
    bounds: HeldBounds | None, found: list[bool]
) -> None:
    assert [one.found for one in calibrations({"cpu": ClassReport(bounds)})] == found
