"""Properties of the batcher, and of which variants make room."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tasks.topology import RUN_STRETCH
from workers.decide.batcher import (
    ALONE,
    BatchPolicy,
    Share,
    WaitingRows,
    bucket_of,
    fill,
    form,
    observe_gap,
    ready,
    widen_gap,
)

POLICY = BatchPolicy(max_batch=16, max_wait=0.05)


def takes(rows: int, total: float) -> float:
    """Ten milliseconds, and one for each unit of size."""
    return 0.01 + 0.001 * total


seconds = st.floats(0, 1000, allow_nan=False)
policies = st.builds(BatchPolicy, max_batch=st.integers(1, 256), max_wait=st.floats(0, 1))
shares = st.lists(
    st.builds(
        Share,
        entry=st.integers(0, 10_000),
        rows=st.integers(1, 40),
        deadline=st.one_of(st.just(math.inf), seconds),
        arrived=seconds,
        size=st.integers(1, 200),
    ),
    unique_by=lambda share: share.entry,
    max_size=30,
)


@st.composite
def crowds(draw: st.DrawFn) -> WaitingRows:
    oldest, newest = sorted((draw(seconds), draw(seconds)))
    return WaitingRows(draw(st.integers(1, 300)), oldest, newest)


@given(crowd=crowds(), policy=policies, gap=st.one_of(st.just(ALONE), st.floats(1e-6, 2)), late=st.floats(0, 2))
def test_no_batch_is_held_past_max_wait(crowd: WaitingRows, policy: BatchPolicy, gap: float, late: float) -> None:
    now = max(crowd.newest, crowd.oldest + policy.max_wait) + late
    assert ready(crowd, now, policy, gap) == 0.0


@given(crowd=crowds(), policy=policies, gap=st.floats(1e-6, 2))
def test_the_wait_that_is_named_ends_within_max_wait_of_the_first_row(
    crowd: WaitingRows, policy: BatchPolicy, gap: float
) -> None:
    wait = ready(crowd, crowd.newest, policy, gap)
    assert 0 <= wait <= max(0.0, crowd.oldest + policy.max_wait - crowd.newest)


@given(shares=shares, policy=policies)
def test_no_batch_outgrows_its_policy_and_none_is_empty(shares: list[Share], policy: BatchPolicy) -> None:
    rows = {share.entry: share.rows for share in shares}
    batch = form(shares, policy, takes)
    assert sum(portion.rows for portion in batch) == min(policy.max_batch, sum(rows.values()))
    assert all(1 <= portion.rows <= rows[portion.entry] for portion in batch)


@given(shares=shares, policy=policies, data=st.data())
def test_a_batch_does_not_depend_on_the_order_of_the_shares(
    shares: list[Share], policy: BatchPolicy, data: st.DataObject
) -> None:
    assert form(shares, policy, takes) == form(data.draw(st.permutations(shares)), policy, takes)


@given(shares=shares, policy=policies)
def test_no_row_runs_before_one_whose_deadline_is_sooner(shares: list[Share], policy: BatchPolicy) -> None:
    taken = {portion.entry: portion.rows for portion in form(shares, policy, takes)}
    left = [share.deadline for share in shares if taken.get(share.entry, 0) < share.rows]
    ran = [share.deadline for share in shares if share.entry in taken]
    assert not left or not ran or max(ran) <= min(left)


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    policy=st.builds(BatchPolicy, st.integers(1, 32), st.just(0.0), st.floats(0.001, 1)),
)
def test_a_batch_of_several_rows_is_over_max_run_only_where_its_first_row_is(
    sizes: list[int], policy: BatchPolicy
) -> None:
    rows = fill(sizes, policy, takes)
    first, batch = takes(1, sizes[0]), takes(rows, sum(sizes[:rows]))
    assert 1 <= rows <= min(len(sizes), policy.max_batch)
    assert rows == 1 or batch <= max(policy.max_run, RUN_STRETCH * first)
    if rows < min(len(sizes), policy.max_batch):  # it holds as many as it may
        assert takes(rows + 1, sum(sizes[: rows + 1])) > max(policy.max_run, RUN_STRETCH * first)


def test_rows_that_cost_little_beside_what_all_share_run_together_though_one_alone_takes_long() -> None:
    policy = BatchPolicy(max_batch=16, max_wait=0.0, max_run=0.05)

    assert fill([1] * 40, policy, lambda rows, total: 0.5 + 0.001 * total) == 16
    assert fill([1] * 40, policy, lambda rows, total: 0.5 * total) == 1


def test_a_batch_that_takes_max_run_waits_for_no_more_rows() -> None:
    bounded = replace(POLICY, max_run=0.02)
    assert ready(WaitingRows(3, 0.0, 0.0, run=0.019), 0.0, bounded, gap=0.001) > 0
    assert ready(WaitingRows(3, 0.0, 0.0, run=0.021), 0.0, bounded, gap=0.001) == 0.0


def test_a_full_batch_runs_at_once() -> None:
    assert ready(WaitingRows(16, 0.0, 0.0), 0.0, POLICY, gap=0.001) == 0.0


def test_a_row_runs_at_once_if_none_ever_came_while_another_waited() -> None:
    assert ready(WaitingRows(1, 0.0, 0.0), 0.0, POLICY, ALONE) == 0.0


def test_a_row_waits_while_others_keep_coming() -> None:
    assert ready(WaitingRows(3, 0.0, 0.010), 0.010, POLICY, gap=0.002) > 0


def test_a_batch_stops_waiting_when_none_came_for_three_gaps() -> None:
    assert ready(WaitingRows(3, 0.0, 0.010), 0.017, POLICY, gap=0.002) == 0.0


def test_a_row_runs_at_once_when_the_next_is_expected_after_max_wait() -> None:
    assert ready(WaitingRows(1, 0.0, 0.0), 0.0, POLICY, gap=0.2) == 0.0


def test_waiting_in_vain_a_few_times_ends_the_waiting() -> None:
    gap = observe_gap(ALONE, 0.001)
    for _ in range(6):
        gap = widen_gap(gap)
    assert ready(WaitingRows(1, 0.0, 0.0), 0.0, POLICY, gap) == 0.0


@given(size=st.integers(0, 500), buckets=st.lists(st.integers(1, 300), min_size=1, unique=True).map(sorted))
def test_a_row_waits_in_the_smallest_bucket_that_it_fits_in(size: int, buckets: list[int]) -> None:
    bucket = bucket_of(size, buckets)
    fitting = [b for b in buckets if b >= size]
    assert bucket == (min(fitting) if fitting else max(buckets))


@given(crowd=crowds(), policy=policies, gap=st.floats(1e-6, 2), slack=st.floats(0, 1))
def test_no_batch_is_held_past_the_moment_that_its_most_urgent_deadline_allows(
    crowd: WaitingRows, policy: BatchPolicy, gap: float, slack: float
) -> None:
    urgent = replace(crowd, start_by=crowd.newest + slack)
    assert ready(urgent, crowd.newest, policy, gap) <= urgent.start_by - crowd.newest


def test_a_row_waits_only_while_that_costs_the_others_less_than_it_saves_the_next() -> None:
    few, many = WaitingRows(2, 0.0, 0.0, run=0.007), WaitingRows(12, 0.0, 0.0, run=0.007)
    assert ready(few, 0.0, POLICY, gap=0.001) > 0
    assert ready(many, 0.0, POLICY, gap=0.001) == 0.0
