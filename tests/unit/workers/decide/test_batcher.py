"""Properties of the batcher, and of which variants make room."""

import math
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.topology import RUN_STRETCH
from workers.decide import batcher

POLICY = batcher.BatchPolicy(max_batch=16, max_wait=0.05)


def takes(rows: int, total: float) -> float:
    """Ten milliseconds, and one for each unit of size."""
    return 0.01 + 0.001 * total


seconds = st.floats(0, 1000, allow_nan=False)
policies = st.builds(batcher.BatchPolicy, max_batch=st.integers(1, 256), max_wait=st.floats(0, 1))
row = st.builds(
    batcher.Row,
    level=st.integers(0, 3),
    deadline=st.one_of(st.just(math.inf), st.floats(0.001, 3)),
    size=st.integers(1, 200),
)
waiting = st.lists(row, min_size=1, max_size=40).map(sorted)


def together(rows: list[batcher.Row], places: list[int]) -> float:
    """Seconds of a batch of these rows."""
    return takes(len(places), sum(rows[place].size for place in places))


def in_time_alone(rows: list[batcher.Row]) -> list[int]:
    return [place for place, one in enumerate(rows) if takes(1, one.size) <= one.deadline]


@st.composite
def waiting_rows(draw: st.DrawFn) -> batcher.WaitingRows:
    oldest, newest = sorted((draw(seconds), draw(seconds)))
    return batcher.WaitingRows(draw(st.integers(1, 300)), oldest, newest)


@given(
    rows=waiting_rows(),
    policy=policies,
    gap=st.just(batcher.ALONE) | st.floats(1e-6, 2),
    late=st.floats(0, 3),
    slack=st.just(math.inf) | st.floats(0, 1),
)
def test_no_batch_waits_too_long(
    rows: batcher.WaitingRows, policy: batcher.BatchPolicy, gap: float, late: float, slack: float
) -> None:
    now = rows.newest + late
    wait = batcher.ready(replace(rows, start_by=now + slack), now, policy, gap)
    assert 0 <= wait <= min(slack, max(0.0, rows.oldest + policy.max_wait - now)) + 1e-9  # a sum of times is rounded


@given(rows=waiting, policy=policies)
def test_no_row_is_late_for_its_company_and_the_most_urgent_runs(
    rows: list[batcher.Row], policy: batcher.BatchPolicy
) -> None:
    batch, able = batcher.form(rows, policy, takes, 0.0), in_time_alone(rows[: 2 * policy.max_batch])
    assert 1 <= len(batch) <= policy.max_batch
    assert not able or together(rows, batch) <= min(rows[place].deadline for place in batch)
    if able and able[0] not in batch:
        others = [place for place in batch if rows[place].level == rows[able[0]].level]
        assert len(others) / together(rows, batch) > batcher.GIVE_UP / takes(1, rows[able[0]].size)


@given(rows=waiting, policy=policies)
def test_no_row_waits_for_a_batch_of_lower_levels(rows: list[batcher.Row], policy: batcher.BatchPolicy) -> None:
    batch, able = batcher.form(rows, policy, takes, 0.0), in_time_alone(rows[: 2 * policy.max_batch])
    assert not able or rows[batch[0]].level == rows[able[0]].level
    left = [place for place in able if place not in batch and place > batch[0]]
    assert not left or rows[left[0]].level >= max(rows[place].level for place in batch)


def test_late_rows_keep_nobody_waiting_and_a_batch_is_short_for_a_row_before_others() -> None:
    late, in_time = batcher.Row(0, 0.005, 1), batcher.Row(0, 0.02, 1)
    assert batcher.form([late, in_time], POLICY, takes, 0.0) == [1]
    assert batcher.form([late, late], POLICY, takes, 0.0) == [0, 1]  # if predictions are right, nothing is lost
    rows = [batcher.Row(1, 0.016, 1), *[batcher.Row(1, 0.1, 1)] * 15]
    assert batcher.form(rows, POLICY, takes, 0.0) == [0, 1, 2, 3]


def served_after_a_stall(policy: batcher.BatchPolicy, takes: batcher.Takes) -> float:
    """The share in time of a thousand rows a second, due in 50 ms each, a second after a stall of 0.3 s."""
    arrivals, now, timely = deque(0.001 * number for number in range(3000)), 0.3, 0
    rows: list[batcher.Row] = []
    while arrivals or rows:
        while arrivals and arrivals[0] <= now:
            rows.append(batcher.Row(0, arrivals.popleft() + 0.05, 1))
        rows = [one for one in rows if one.deadline >= now]
        batch = batcher.form(rows, policy, takes, now)
        now += takes(len(batch), len(batch)) if batch else 0.001
        timely += sum(now <= rows[place].deadline and rows[place].deadline > 1.3 for place in batch)
        rows = [one for place, one in enumerate(rows) if place not in batch]
    return timely / 1750


def test_a_device_that_was_held_up_catches_up() -> None:
    policy = batcher.BatchPolicy(max_batch=32, max_wait=0.0)
    assert served_after_a_stall(policy, lambda rows, total: 0.01 + 0.0001 * total) > 0.95
    assert served_after_a_stall(policy, lambda rows, total: 0.01 + 0.0005 * total) > 0.95


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    policy=st.builds(batcher.BatchPolicy, st.integers(1, 32), st.just(0.0), st.floats(0.001, 1)),
)
def test_a_batch_is_over_max_run_only_where_its_first_row_is(sizes: list[int], policy: batcher.BatchPolicy) -> None:
    rows = len(batcher.form([batcher.Row(2, math.inf, size) for size in sizes], policy, takes, 0.0))
    first, batch = takes(1, sizes[0]), takes(rows, sum(sizes[:rows]))
    assert 1 <= rows <= min(len(sizes), policy.max_batch)
    assert rows == 1 or batch <= max(policy.max_run, RUN_STRETCH * first)
    if rows < min(len(sizes), policy.max_batch):  # it holds as many as it may
        assert takes(rows + 1, sum(sizes[: rows + 1])) > max(policy.max_run, RUN_STRETCH * first)


BOUNDED = replace(POLICY, max_run=0.02)
WAITS: dict[str, tuple[batcher.WaitingRows, float, batcher.BatchPolicy, float, float]] = {
    "others keep coming": (batcher.WaitingRows(3, 0.0, 0.010), 0.010, POLICY, 0.002, 0.006),
    "none came for three gaps": (batcher.WaitingRows(3, 0.0, 0.010), 0.017, POLICY, 0.002, 0.0),
    "a full batch": (batcher.WaitingRows(16, 0.0, 0.0), 0.0, POLICY, 0.001, 0.0),
    "none ever came while another waited": (batcher.WaitingRows(1, 0.0, 0.0), 0.0, POLICY, batcher.ALONE, 0.0),
    "the next is expected after max_wait": (batcher.WaitingRows(1, 0.0, 0.0), 0.0, POLICY, 0.2, 0.0),
    "within max_run": (batcher.WaitingRows(3, 0.0, 0.0, run=0.019), 0.0, BOUNDED, 0.001, 0.003),
    "it takes max_run": (batcher.WaitingRows(3, 0.0, 0.0, run=0.021), 0.0, BOUNDED, 0.001, 0.0),
    "it costs less than it saves the next": (batcher.WaitingRows(2, 0.0, 0.0, run=0.007), 0.0, POLICY, 0.001, 0.003),
    "it costs the others more": (batcher.WaitingRows(12, 0.0, 0.0, run=0.007), 0.0, POLICY, 0.001, 0.0),
    "it costs as much as it saves": (batcher.WaitingRows(4, 0.0, 0.0, run=0.008), 0.0, POLICY, 0.002, 0.0),
}


@pytest.mark.parametrize(("rows", "now", "policy", "gap", "wait"), WAITS.values(), ids=WAITS)
def test_a_batch_waits_while_that_is_worth_it(
    rows: batcher.WaitingRows, now: float, policy: batcher.BatchPolicy, gap: float, wait: float
) -> None:
    assert batcher.ready(rows, now, policy, gap) == pytest.approx(wait)


def test_waiting_in_vain_a_few_times_ends_the_waiting() -> None:
    gap = batcher.observe_gap(batcher.ALONE, 0.001)
    for _ in range(6):
        gap = batcher.widen_gap(gap)
    assert batcher.ready(batcher.WaitingRows(1, 0.0, 0.0), 0.0, POLICY, gap) == 0.0


@given(size=st.integers(0, 500), buckets=st.lists(st.integers(1, 300), min_size=1, unique=True).map(sorted))
def test_a_row_waits_in_the_smallest_bucket_that_it_fits_in(size: int, buckets: list[int]) -> None:
    bucket = batcher.bucket_of(size, buckets)
    fitting = [b for b in buckets if b >= size]
    assert bucket == (min(fitting) if fitting else max(buckets))
