"""How long a device goes on with what nobody waits for."""

from __future__ import annotations

import pytest

from workers.occupation import FEWEST, Occupation

BATCH = Occupation(began=100.0, predicted=30.0)


@pytest.mark.parametrize(
    ("now", "left"), [(100.0, 30.0), (120.0, 10.0), (129.9, FEWEST), (130.0, FEWEST), (170.0, 40.0)]
)
def test_a_batch_goes_on_for_what_its_profile_says_and_a_late_one_for_as_long_again_as_it_is_late(
    now: float, left: float
) -> None:
    assert BATCH.left(now, 1.0) == pytest.approx(left)


def test_only_the_rows_that_nobody_waits_for_count() -> None:
    assert BATCH.left(110.0, 0.0) == 0.0
    assert BATCH.left(110.0, 0.25) == pytest.approx(5.0)
