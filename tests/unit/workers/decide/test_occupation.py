"""How long a device is occupied by rows without a waiter."""

from __future__ import annotations

import pytest

from workers.decide.occupation import LEAST_REMAINING, Occupation

BATCH = Occupation(began=100.0, predicted=30.0)


@pytest.mark.parametrize(
    ("now", "left"), [(100.0, 30.0), (120.0, 10.0), (129.9, LEAST_REMAINING), (130.0, LEAST_REMAINING), (170.0, 40.0)]
)
def test_a_batch_goes_on_for_what_its_profile_says_and_a_late_one_for_as_long_again_as_it_is_late(
    now: float, left: float
) -> None:
    assert BATCH.left(now, 1.0) == pytest.approx(left)


def test_only_rows_without_a_waiter_count() -> None:
    assert BATCH.left(110.0, 0.0) == 0.0
    assert BATCH.left(110.0, 0.25) == pytest.approx(5.0)


def test_a_batch_is_long_by_its_profile_or_by_what_it_has_taken_already() -> None:
    batch = Occupation(began=10.0, predicted=2.0)

    assert batch.longer_than(1.0, now=10.0)
    assert not batch.longer_than(3.0, now=12.9)
    assert batch.longer_than(3.0, now=13.1)
    assert (batch.ends_in(10.5), batch.ends_in(15.0)) == (1.5, 3.0)
