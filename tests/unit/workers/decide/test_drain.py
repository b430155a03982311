"""Which work a draining worker still finishes, and by when it exits."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.decide.occupation import unfinished
from workers.drain import PACKING, Drain

STINTS = st.lists(st.tuples(st.sets(st.integers(0, 9), min_size=1), st.floats(0.001, 10)), max_size=12)


def test_what_fits_is_kept_and_the_rest_is_not() -> None:
    assert unfinished([({1, 2}, 1.0), ({3}, 1.0), ({4}, 1.0)], 2.5) == {4}


def test_a_short_batch_behind_one_that_does_not_fit_is_kept() -> None:
    assert unfinished([({1}, 1.0), ({2}, 9.0), ({3}, 1.0)], 2.0) == {2}


def test_a_job_one_of_whose_batches_is_late_does_not_end() -> None:
    assert unfinished([({1}, 1.0), ({1, 2}, 9.0), ({2}, 0.5)], 5.0) == {1, 2}


def test_a_batch_whose_jobs_are_all_late_costs_no_time() -> None:
    assert unfinished([({1}, 9.0), ({1}, 3.0), ({2}, 4.0)], 5.0) == {1}


@given(stints=STINTS, left=st.floats(-1, 40))
def test_all_that_is_kept_runs_within_the_time(stints: list[tuple[set[int], float]], left: float) -> None:
    late = unfinished(stints, left)
    kept = [seconds for jobs, seconds in stints if not jobs & late]
    assert not kept or math.fsum(kept) <= left + 1e-6


@given(stints=STINTS, left=st.floats(0, 40), more=st.floats(0, 10))
def test_without_time_nothing_is_kept_and_with_enough_all_is(
    stints: list[tuple[set[int], float]], left: float, more: float
) -> None:
    jobs = set().union(*(jobs for jobs, _ in stints))
    assert unfinished(stints, 0.0) == jobs
    assert unfinished(stints, sum(seconds for _, seconds in stints) + 1e-6 + more) == set()


def test_a_drain_is_only_ever_brought_forward() -> None:
    drain = Drain()
    assert not drain.begun
    drain.within(10)
    drain.within(60)
    assert drain.begun
    assert drain.left == pytest.approx(10 - PACKING, abs=0.5)
    drain.within(5)
    assert drain.left == pytest.approx(5 - PACKING, abs=0.5)


def test_a_second_request_to_stop_stops_at_once() -> None:
    drain = Drain()
    drain.within(30)  # a notice is no request to stop
    drain.stop(60)
    assert drain.left > 20
    drain.stop(60)
    assert drain.left <= 0
    assert drain.by <= time.monotonic()
