from typing import Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.decide.faults import FAILURES, PROBES, STARTING_PROBE, Breaker, State
from workers.endpoints.places import EndpointUse, Seat

Step = tuple[Literal["answered", "failed", "unreached", "starting", "probed"], float]
_EVENTS = ["answered", "failed", "unreached", "starting", "probed"]
steps = st.lists(st.tuples(st.sampled_from(_EVENTS), st.floats(0, 100)))


def after(*events: str, at: float = 0.0) -> Breaker:
    """A breaker that let work through, and what happened since."""
    breaker = Breaker().probed()
    for event in events:
        breaker = stepped(breaker, event, at)
    return breaker


def stepped(breaker: Breaker, event: str, now: float) -> Breaker:
    if event == "failed":
        return breaker.failed("it failed", now)
    if event == "unreached":
        return breaker.unreached("nobody there", now)
    if event == "starting":
        return breaker.starting("loading", now)
    return breaker.answered() if event == "answered" else breaker.probed()


FAILED = ["failed"] * (FAILURES - 1)
PASSING: list[tuple[list[str], int]] = [
    (FAILED, 8),
    ([*FAILED, "failed"], 0),
    ([*FAILED, "answered", "failed"], 8),
    (["unreached", "probed"], 1),
    (["unreached", "probed", "answered"], 8),
    (["unreached", "probed", "failed"], 0),
]


@pytest.mark.parametrize(("events", "slots"), PASSING)
def test_failures_in_a_row_open_it_and_an_answer_after_a_probe_closes_it(events: list[str], slots: int) -> None:
    assert after(*events).slots(8) == slots


def test_an_endpoint_that_cannot_be_reached_opens_it_at_once_and_late_answers_and_failures_change_nothing() -> None:
    opened = after("unreached")
    assert (opened.state, opened.reason, opened.probe_at) == (State.OPEN, "nobody there", PROBES.first)
    assert opened.answered() == opened.failed("too", 0.1) == opened.unreached("too", 0.1) == opened


def test_each_opening_waits_twice_as_long_up_to_a_bound() -> None:
    breaker, now, pauses = after(), 0.0, []
    for _ in range(12):
        breaker = breaker.unreached("still", now)
        pauses.append(breaker.probe_at - now)
        now = breaker.probe_at
    assert pauses[:3] == [PROBES.first, 2 * PROBES.first, 4 * PROBES.first]
    assert max(pauses) == pauses[-1] == PROBES.longest


def test_an_endpoint_that_starts_is_probed_each_second_however_long_it_takes() -> None:
    breaker, now = after(), 0.0
    for _ in range(100):
        breaker = breaker.starting("loading", now)
        assert (breaker.slots(8), breaker.probe_at) == (0, now + STARTING_PROBE)
        now = breaker.probe_at
        breaker = breaker.probed()  # llama.cpp lists its models before it has loaded them
        assert breaker.slots(8) == 1


def test_an_outage_after_a_long_calm_without_requests_begins_with_a_short_pause() -> None:
    breaker = after()
    for now in range(0, 100, 10):
        breaker = breaker.unreached("gone", now)
    for _ in range(10):
        breaker = breaker.probed()
    assert breaker.unreached("gone", 200.0).probe_at <= 200 + 2 * PROBES.first


@given(taken=steps)
def test_whatever_happens_a_probe_and_an_answer_bring_it_back(taken: list[Step]) -> None:
    breaker, now = Breaker(), 0.0
    assert breaker.slots(8) == 0, "before the first probe"
    for event, later in taken:
        now += later
        breaker = stepped(breaker, event, now)
        assert bool(breaker.reason) == (breaker.state is State.OPEN)
        assert breaker.probe_at <= now + PROBES.longest
    assert breaker.probed().answered().slots(8) == 8


NO_HEALTH = cast(Any, None)


@given(gaps=st.lists(st.floats(0.001, 10), min_size=2, max_size=20), data=st.data())
def test_the_shares_of_rows_that_ran_together_add_up_to_the_busy_time(gaps: list[float], data: st.DataObject) -> None:
    usage, now, shares, busy, slots = EndpointUse(4, NO_HEALTH), 0.0, 0.0, 0.0, 0.0
    seats: list[Seat] = []
    for gap in gaps:
        busy += gap if seats else 0.0
        slots += gap * len(seats)
        now += gap
        leaves: bool = data.draw(st.booleans())
        if seats and leaves:
            seconds, share = usage.leave(seats.pop(data.draw(st.integers(0, len(seats) - 1))), now)
            assert 0 <= share <= seconds + 1e-9
            shares += share
        else:
            seats.append(usage.enter(now))
    for seat in seats:
        shares += usage.leave(seat, now)[1]
    assert shares == pytest.approx(busy)
    assert usage.computed(now) == pytest.approx(slots / 4)
