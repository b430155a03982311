"""How long a device is occupied by rows without a waiter."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import ANY
from taxiway.contract.keys import LEVELS
from workers.decide.occupation import (
    BATCHES_COUNT,
    LEAST_REMAINING,
    RARE,
    Occupation,
    begin,
    blocking_by_model,
    observe,
    residuals,
    unfinished,
    unseen,
    wary,
)
from workers.drain import PACKING, Drain

NOW = 1000.0
batches = st.lists(st.tuples(st.floats(NOW - 2 * BATCHES_COUNT, NOW), st.sampled_from("abc"), st.floats(0.001, 30.0)))


def newest_first(seen: list[tuple[float, str, float]]) -> list[tuple[float, str, float]]:
    return sorted(seen, reverse=True)


def test_rare_batches_and_those_of_before_the_last_minute_are_ignored() -> None:
    old, rare = (NOW - BATCHES_COUNT - 1, "a", 30.0), (NOW - 5, "b", RARE * BATCHES_COUNT)
    assert blocking_by_model([rare, old], NOW) == {"b": 0.0, ANY: 0.0}
    assert blocking_by_model([rare], NOW, devices=1)["b"] == 0.0
    assert blocking_by_model([(NOW - 5, "b", 2 * RARE * BATCHES_COUNT)], NOW, devices=2)[ANY] == 0.0


@given(seen=batches, devices=st.integers(1, 5))
def test_a_job_waits_at_most_for_the_longest_other_batch(seen: list[tuple[float, str, float]], devices: int) -> None:
    for model, seconds in blocking_by_model(newest_first(seen), NOW, devices).items():
        others = [taken for _, name, taken in seen if name != model]
        assert 0.0 <= seconds <= max(others, default=0.0) * 1.005  # told to three digits


BATCH = Occupation(began=100.0, predicted=30.0)


@pytest.mark.parametrize(
    ("now", "left"), [(100.0, 30.0), (120.0, 10.0), (129.9, LEAST_REMAINING), (130.0, LEAST_REMAINING), (170.0, 40.0)]
)
def test_a_batch_takes_what_its_profile_says_and_a_late_one_as_long_again(now: float, left: float) -> None:
    assert BATCH.left(now, 1.0) == pytest.approx(left)
    assert BATCH.left(now, 0.25) == pytest.approx(left / 4), "only rows without a waiter count"
    assert BATCH.left(now, 0.0) == 0.0


def test_a_batch_is_long_by_its_profile_or_by_what_it_has_taken_already() -> None:
    batch = Occupation(began=10.0, predicted=2.0)
    assert batch.longer_than(1.0, now=10.0)
    assert not batch.longer_than(3.0, now=12.9)
    assert batch.longer_than(3.0, now=13.1)
    assert (batch.ends_in(10.5), batch.ends_in(15.0)) == (1.5, 3.0)


STINTS = st.lists(st.tuples(st.sets(st.integers(0, 9), min_size=1), st.floats(0.001, 10)), max_size=12)


@pytest.mark.parametrize(
    ("stints", "left", "late"),
    [
        ([({1, 2}, 1.0), ({3}, 1.0), ({4}, 1.0)], 2.5, {4}),
        ([({1}, 1.0), ({2}, 9.0), ({3}, 1.0)], 2.0, {2}),  # a short batch behind one that does not fit is kept
        ([({1}, 1.0), ({1, 2}, 9.0), ({2}, 0.5)], 5.0, {1, 2}),  # a job needs all of its batches
        ([({1}, 9.0), ({1}, 3.0), ({2}, 4.0)], 5.0, {1}),  # a batch whose jobs are all late costs no time
    ],
)
def test_only_what_fits_is_kept(stints: list[tuple[set[int], float]], left: float, late: set[int]) -> None:
    assert unfinished(stints, left) == late


@given(stints=STINTS, left=st.floats(-1, 40))
def test_what_is_kept_runs_in_time_and_with_enough_all_is(stints: list[tuple[set[int], float]], left: float) -> None:
    late = unfinished(stints, left)
    kept = [seconds for jobs, seconds in stints if not jobs & late]
    assert not kept or math.fsum(kept) <= left + 1e-6
    assert unfinished(stints, 0.0) == set().union(*(jobs for jobs, _ in stints))
    assert unfinished(stints, sum(seconds for _, seconds in stints) + 1e-6) == set()


def test_a_drain_is_only_ever_brought_forward_and_a_second_request_to_stop_stops_at_once() -> None:
    drain = Drain()
    assert not drain.begun
    drain.within(30)  # a notice is no request to stop
    drain.stop(60)
    assert drain.begun
    assert drain.left == pytest.approx(30 - PACKING, abs=0.5)
    drain.stop(60)
    assert drain.left <= 0
    assert drain.by <= time.monotonic()


def test_what_took_longer_widens_what_a_job_may_take_and_a_tracks_safe_factor_is_of_its_worst_level() -> None:
    track = begin(1.0)
    for _ in range(60):
        track = observe(track, predicted=1.0, seconds=2.0, levels=(0,))
    assert track.surely == pytest.approx(track.pace * max(track.residuals))
    assert track.surely >= 2.0
    assert observe(track, predicted=1.0, seconds=0.0, levels=(0,)).pace < track.pace
    empty = unseen(1.0)
    assert wary(empty) == pytest.approx([residuals(empty)[0] * 4 / 3] * LEVELS)
    assert residuals(unseen(1e9))[0] == residuals(unseen(256.0))[0] == pytest.approx(256.0)
