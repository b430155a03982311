"""Pauses between attempts."""

from hypothesis import given
from hypothesis import strategies as st

from taxiway.backoff import Backoff

SECONDS = st.floats(1e-3, 1e4)
DRAWS = st.floats(0, 1)


def test_a_pause_doubles_with_each_failure_and_is_bounded_however_many_there_are() -> None:
    backoff = Backoff(0.5, 30.0)
    assert [backoff.pause(failures) for failures in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert backoff.pause(1_000_000) == 30.0


@given(first=SECONDS, factor=st.floats(1, 1e4), spread=st.floats(0, 1), failures=st.integers(1, 10_000), draw=DRAWS)
def test_jitter_only_shortens_a_pause_and_never_by_more_than_its_spread(
    first: float, factor: float, spread: float, failures: int, draw: float
) -> None:
    full = Backoff(first, first * factor)
    pause = Backoff(first, first * factor, spread).pause(failures, draw)
    assert full.pause(failures) * (1 - spread) <= pause * 1.001
    assert pause <= full.pause(failures) <= full.pause(failures + 1) <= full.longest
