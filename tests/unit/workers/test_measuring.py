import math
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.model import Profile
from tests.unit.tasks.test_profiles import MEASURED, MODEL, seconds
from workers.profiling.fit import FULL_BUDGET, QUICK_BUDGET, Timed, fit, grid, powers, repeats, residuals
from workers.profiling.measure import CALM, MeasuredOutcome, TimedRun, formula, least_disturbed, remarks

GRID = [(rows, size) for rows in (1, 2, 4, 8, 16) for size in (16, 64, 256)]


def test_one_outlier_does_not_bend_a_fit() -> None:
    true = Profile(base=0.01, slope=1e-4, step=0.0, floor=0.0)
    points = [Timed(r, s, (true.latency(r, s) * (3 if (r, s) == (4, 64) else 1),)) for r, s in GRID]
    found = fit(points)
    assert math.isclose(found.latency(16, 256), true.latency(16, 256), rel_tol=0.05)
    assert math.isclose(found.latency(1, 16), true.latency(1, 16), rel_tol=0.05)


points = st.lists(
    st.builds(Timed, st.integers(1, 64), st.floats(1, 1000), st.lists(seconds, min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=8,
)


@given(points)
def test_a_fit_is_never_negative_and_its_residuals_grow(found: list[Timed]) -> None:
    curve = fit(found)
    assert min(curve.base, curve.slope, curve.step, curve.floor) >= 0
    spread = residuals(found, curve)
    assert 0 < spread.p50 <= spread.p90 <= spread.p95 <= spread.p99


@given(st.integers(1, 4096))
def test_the_rows_that_are_measured_go_from_one_to_the_largest(largest: int) -> None:
    found = powers(largest)
    assert found[0] == 1
    assert found[-1] == largest
    assert found == sorted(set(found))
    assert len(found) <= 8


def test_a_grids_corners_come_first_and_no_batch_comes_twice() -> None:
    model = msgspec.structs.replace(MODEL, buckets=(16, 32, 64, 128, 256))
    found = grid(model, 16)
    assert set(found[:4]) == {(1, 16), (1, 256), (16, 16), (16, 256)}
    assert len(found) == len(set(found)) == 20
    assert grid(msgspec.structs.replace(MODEL, buckets=(1,)), 1) == [(1, 1)]


@given(seconds, st.floats(-10, 100), st.integers(0, 30), st.sampled_from([FULL_BUDGET, QUICK_BUDGET]))
def test_a_batch_runs_as_often_as_planned(batch: float, left: float, points_left: int, plan: Any) -> None:
    assert plan.fewest <= repeats(plan, batch, left, points_left) <= plan.most


runs = st.lists(st.builds(TimedRun, seconds=st.floats(0.001, 1), waited=st.floats(0, 1)), min_size=1, max_size=9)


@given(runs, st.integers(1, 4))
def test_disturbed_runs_count_only_where_there_are_too_few_calm_ones(found: list[TimedRun], fewest: int) -> None:
    kept = least_disturbed(found, fewest)
    calm = [run for run in found if run.disturbed <= CALM]
    assert kept == calm if len(calm) >= fewest else len(kept) == min(fewest, len(found))


def test_a_table_says_a_curve_without_its_zeros_and_what_was_amiss() -> None:
    assert formula(MEASURED) == "max(3 ms, 2 ms + 100 µs·b·s)"
    assert formula(msgspec.structs.replace(MEASURED, base=0.0, step=0.5, floor=0.0)) == "500 ms·s + 100 µs·b·s"
    shown = remarks(
        [
            MeasuredOutcome(model="m:1", variant="a", skipped="torch is not installed"),
            MeasuredOutcome(model="m:1", variant="b", error="no weights"),
            MeasuredOutcome(model="m:1", variant="c", measurement=msgspec.structs.replace(MEASURED, disturbed=0.25)),
            MeasuredOutcome(model="m:1", variant="d", measurement=MEASURED),
        ]
    )
    assert list(shown) == [
        "skipped: m:1/a: torch is not installed",
        "failed: m:1/b: no weights",
        "disturbed: m:1/c: other processes used the processor for 25% of its seconds",
    ]
