"""What a worker keeps: which variants stay in its memory, and which jobs it has time for."""

import math
import time
from itertools import pairwise

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
from workers.decide.residency import DISPLACING, FADE, InUseError, NoRoomError, Resident, Uses, evict, spared_for
from workers.drain import PACKING, Drain

NOW = 1000.0
batches = st.lists(st.tuples(st.floats(NOW - 2 * BATCHES_COUNT, NOW), st.sampled_from("abc"), st.floats(0.001, 30.0)))


def test_rare_batches_and_those_of_before_the_last_minute_are_ignored() -> None:
    old, rare = (NOW - BATCHES_COUNT - 1, "a", 30.0), (NOW - 5, "b", RARE * BATCHES_COUNT)
    assert blocking_by_model([rare, old], NOW) == {"b": 0.0, ANY: 0.0}
    assert blocking_by_model([rare], NOW, devices=1)["b"] == 0.0
    assert blocking_by_model([(NOW - 5, "b", 2 * RARE * BATCHES_COUNT)], NOW, devices=2)[ANY] == 0.0


@given(seen=batches, devices=st.integers(1, 5))
def test_a_job_waits_at_most_for_the_longest_other_batch(seen: list[tuple[float, str, float]], devices: int) -> None:
    for model, seconds in blocking_by_model(sorted(seen, reverse=True), NOW, devices).items():
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


@pytest.mark.cases("stints, left, late")
def test_only_what_fits_is_kept(stints: list[tuple[list[int], float]], left: float, late: list[int]) -> None:
    assert unfinished([(set(jobs), seconds) for jobs, seconds in stints], left) == set(late)


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


SEEN_AT = 1000.0
uses = st.builds(Uses, rate=st.floats(0, 100), last=st.floats(0, SEEN_AT))
residents = st.lists(
    st.builds(
        Resident,
        variant=st.uuids().map(str),
        memory=st.integers(0, 100),
        uses=uses,
        load=st.floats(0, 100),
        in_use=st.booleans(),
        urgent=st.booleans(),
    ),
    unique_by=lambda resident: resident.variant,
    max_size=10,
)


@given(loaded=residents, need=st.integers(0, 100), budget=st.integers(100, 300), sparing=st.booleans())
def test_what_stays_fits_and_what_is_in_use_stays(
    loaded: list[Resident], need: int, budget: int, sparing: bool
) -> None:
    kept = [resident for resident in loaded if resident.in_use or (sparing and resident.urgent)]
    try:
        gone = evict(loaded, need, budget, SEEN_AT, sparing=sparing)
    except InUseError:
        assert sum(resident.memory for resident in kept) + need > budget
        return
    stays = [resident for resident in loaded if resident not in gone]
    assert sum(resident.memory for resident in stays) + need <= budget
    assert all(resident in stays for resident in kept)


@given(loaded=residents, need=st.integers(0, 100))
def test_no_variant_leaves_before_one_that_is_worth_less(loaded: list[Resident], need: int) -> None:
    try:
        gone = evict(loaded, need, 100, SEEN_AT)
    except InUseError:
        gone = []
    stayed = [resident for resident in loaded if resident not in gone and not resident.in_use]
    values = [resident.value(SEEN_AT) for resident in gone]
    assert all(before <= after for before, after in pairwise(values))
    assert not gone or all(values[-1] <= resident.value(SEEN_AT) for resident in stayed)


def test_nothing_leaves_where_there_is_room_and_a_variant_larger_than_the_device_is_refused() -> None:
    assert evict([Resident("a", 40, Uses(1.0, SEEN_AT), 1.0)], 50, 100, SEEN_AT) == []
    with pytest.raises(NoRoomError, match="needs 200 bytes, the device has 100"):
        evict([], 200, 100, SEEN_AT)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Resident("other", 50, Uses(0.1, SEEN_AT), 4.0), "it is used seldom"),
        (Resident("other", 50, Uses(1.0, SEEN_AT), 0.1), "it is soon loaded again"),
        (Resident("other", 90, Uses(1.0, SEEN_AT), 4.0), "it frees more"),
        (Resident("other", 50, Uses(1.0, SEEN_AT - 9 * FADE), 4.0), "its uses are long ago"),
    ],
)
def test_a_variant_leaves_because(other: Resident, why: str) -> None:
    kept = Resident("kept", 50, Uses(1.0, SEEN_AT - 1), 4.0)
    assert evict([kept, other], 50, 140, SEEN_AT) == [other], why


def test_patient_rows_displace_what_urgent_ones_use_for_a_tenth_of_the_time() -> None:
    urgent, other = (Resident(name, 50, Uses(1.0, SEEN_AT), 4.0, urgent=name == "urgent") for name in ("urgent", "o"))
    assert spared_for(2.0, [urgent, other]) == pytest.approx((2.0 + 4.0) / DISPLACING)
    assert spared_for(2.0, [other]) == 0.0


def test_uses_fade_and_add_up() -> None:
    once = Uses().once_more(SEEN_AT)
    assert once.at(SEEN_AT) == pytest.approx(1 / FADE)
    assert once.once_more(SEEN_AT).at(SEEN_AT) == pytest.approx(2 / FADE)
    assert once.at(SEEN_AT + FADE) == pytest.approx(once.at(SEEN_AT) / 2.718281828)
