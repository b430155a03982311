import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.candidates import expected
from router.decide.snapshot import with_hosts
from tasks.heartbeat import ANY
from taxiway.contract.keys import LEVELS
from tests.builders import a_device
from workers.decide.occupation import DRIFT, Track, begin, observe, residuals, seen, unseen

LEVEL = 1


def after(track: Track, ratios_seen: list[float]) -> Track:
    for ratio in ratios_seen:
        track = observe(track, predicted=2.0, seconds=2.0 * ratio, levels=(LEVEL,))
    return track


def residual(track: Track) -> float:
    return track.residuals[LEVEL]


@pytest.mark.parametrize(
    ("ratios", "pace", "drifted"),
    [
        ([3.0] * 40, 3.0, True),
        ([1.0] * 40, 1.0, False),
        ([3.0] * 50 + [1.0] * 60, 1.0, False),  # recovered
        ([1.0] * 50 + [1000.0], 1.3, False),  # one slow batch counts for little
    ],
)
def test_a_device_that_is_slower_than_its_profile_is_found_out(ratios: list[float], pace: float, drifted: bool) -> None:
    track = after(begin(), ratios)
    assert math.isclose(track.pace, pace, rel_tol=0.02)
    assert track.drifted is drifted


def test_a_residual_is_about_the_pace_and_not_about_the_profile() -> None:
    assert residual(after(begin(), [3.0] * 150)) < 1.2
    assert residual(after(begin(), [1.0] * 180 + [3.0] * 20)) >= 1.5


@given(st.lists(st.floats(0, 1e4), max_size=60), st.floats(0.1, 20))
def test_a_track_stays_in_its_bounds(seen: list[float], start: float) -> None:
    track = after(begin(start), seen)
    assert track.pace > 0
    assert 1.0 <= residual(track) <= 256.1
    assert track.drifted == (track.batches >= 10 and not 1 / DRIFT <= track.pace <= DRIFT)


def test_a_prediction_of_nothing_teaches_nothing() -> None:
    assert observe(begin(), predicted=0.0, seconds=1.0, levels=(LEVEL,)) == begin()


def test_a_level_learns_nothing_from_batches_that_had_none_of_its_jobs() -> None:
    track = after(begin(1.5), [1.0] * 60)
    assert residual(track) < 1.1
    assert {track.residuals[level] for level in range(LEVELS) if level != LEVEL} == {begin(1.5).residuals[0]}


several = st.floats(0.2, 8)
learned = st.dictionaries(st.sampled_from(["x", "y", "z", ANY]), several)


@given(st.lists(learned, min_size=1, max_size=5), st.randoms())
def test_what_was_learned_stays_in_any_order_of_devices(learned: list[dict[str, float]], random: Random) -> None:
    found = dict(enumerate(expected(learned, "x")))
    assert all(found[number] == each.get("x", found[number]) > 0 for number, each in enumerate(learned))
    order = list(range(len(learned)))
    random.shuffle(order)
    again = expected([learned[number] for number in order], "x")
    assert all(math.isclose(again[place], found[number]) for place, number in enumerate(order))


@given(st.lists(several, min_size=2, max_size=5), st.lists(several, min_size=2, max_size=5))
def test_an_unmeasured_pace_is_that_of_elsewhere_by_the_device(
    of_devices: list[float], of_variants: list[float]
) -> None:
    table = [{f"v{n}": slow * own for n, own in enumerate(of_variants)} | {ANY: slow} for slow in of_devices]
    wanted = table[0].pop("v0")
    assert math.isclose(expected(table, "v0")[0], wanted)


def test_one_odd_batch_counts_in_part_for_other_variants() -> None:
    odd, often = (after(begin(), [4.0] * times) for times in (1, 30))
    assert odd.pace == 4.0
    assert math.isclose(odd.hedged, 4 ** (2 / 3))
    assert often.hedged > 3.8
    assert begin().hedged == 1.0


def test_a_miss_raises_what_the_next_job_takes_at_most() -> None:
    histograms = unseen(1.0)
    for ratio in [1.0] * 8:
        histograms = seen(histograms, ratio, {LEVEL})
    assert residuals(histograms)[LEVEL] < 1.1
    assert 9.0 <= residuals(seen(histograms, 9.0, {LEVEL}))[LEVEL] < 9.9


def test_a_new_cpu_is_expected_to_be_like_those_of_its_machine_and_no_other_device_is() -> None:
    slow = a_device("a", worker="a@here", pace={"x": 9.0, ANY: 4.0}, loading={ANY: 3.0}, residual={ANY: (2.0, 5.0)})
    slower = a_device("a", worker="b@here", pace={ANY: 6.0}, residual={ANY: (3.0,)})
    far, gpu = a_device("b", worker="c@far"), a_device("c", worker="d@here", kind="cuda")
    known, new, *others = with_hosts([slow, a_device("b", worker="e@here"), slower, far, gpu])
    assert known == slow
    assert (new.pace, new.loading, new.residual) == ({ANY: 5.0}, {ANY: 3.0}, {ANY: (3.0, 5.0, 5.0, 5.0)})
    assert others[0].pace == {ANY: 6.0} and others[0].loading == {ANY: 3.0}
    assert others[1:] == [far, gpu]
