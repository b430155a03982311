from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.catalogue import Profile
from workers.decide.endpoints import ENOUGH, Learned, after, curve_of

PRIOR = Profile(base=0.1, slope=0.0005, step=0.004)
SLOTS = 16

true_profiles = st.builds(
    Profile,
    base=st.floats(0.005, 0.5),
    slope=st.floats(0, 0.002),
    step=st.floats(0.001, 0.05),
    prompt_step=st.floats(0, 0.001),
    prompt_slope=st.floats(0, 0.0002),
)


def taught(true: Profile, count: int, seed: int, *, noise: float = 0.1, longest: int = 4000) -> Learned:
    """What `count` answers of an engine with the `true` profile teach, of prompts and loads as they come."""
    draw, learned = random.Random(seed), Learned()
    for _ in range(count):
        read, written, rows = draw.randint(1, longest), draw.randint(1, 400), draw.uniform(1, SLOTS)
        step, slope = true.of_prompt
        first = (true.base + (step + slope * rows) * read) * draw.uniform(1 - noise, 1 + noise)
        more = (true.step + true.slope * rows) * (written - 1) * draw.uniform(1 - noise, 1 + noise)
        learned = after(learned, PRIOR, read=read, written=written, rows=rows, first=first, seconds=first + more)
    return learned


@given(true=true_profiles, seed=st.integers(0, 99))
def test_what_an_engine_takes_is_learned_by_prompt_answer_and_load(true: Profile, seed: int) -> None:
    curve = curve_of(taught(true, 150, seed), PRIOR, SLOTS)
    for read, written, rows in ((100, 50, 1), (3000, 10, 4), (500, 300, SLOTS)):
        wanted = true.latency(rows, read + written, read)
        assert curve.latency(rows, read + written, read) == pytest.approx(wanted, rel=0.35)


@given(true=true_profiles, seed=st.integers(0, 99), count=st.integers(0, 60))
def test_no_figure_of_a_learned_curve_is_negative(true: Profile, seed: int, count: int) -> None:
    curve = curve_of(taught(true, count, seed, noise=0.9), PRIOR, SLOTS)
    assert min(curve.base, curve.step, curve.slope, *curve.of_prompt) >= 0


def test_a_few_answers_do_not_replace_the_profile() -> None:
    curve = curve_of(taught(Profile(1.0, 0.0, step=1.0), ENOUGH - 1, 1), PRIOR, SLOTS)
    assert (curve.base, curve.step, curve.slope, curve.of_prompt) == (0.1, 0.004, 0.0005, (0.004, 0.0005))


def test_an_engine_that_is_slower_than_its_profile_is_so_where_nothing_was_seen() -> None:
    true = Profile(base=1.0, slope=0.005, step=0.04)
    curve = curve_of(taught(true, 60, 3, noise=0.0, longest=64), PRIOR, SLOTS)
    assert curve.latency(1, 4000, 4000) > 5 * PRIOR.latency(1, 4000, 4000)


def test_an_engine_that_changes_is_learned_anew() -> None:
    learned = taught(Profile(base=0.1, slope=0.0, step=0.01), 200, 1)
    draw = random.Random(2)
    for _ in range(150):
        read, written = draw.randint(1, 500), draw.randint(2, 100)
        first = 0.5 + 0.0001 * read
        learned = after(
            learned, PRIOR, read=read, written=written, rows=2, first=first, seconds=first + 0.03 * (written - 1)
        )
    curve = curve_of(learned, PRIOR, SLOTS)
    assert curve.latency(2, 300, 200) == pytest.approx(0.52 + 3.0, rel=0.15)


def test_an_answer_that_is_not_streamed_is_all_prompt() -> None:
    learned = Learned()
    for size in range(10, 110, 10):
        learned = after(
            learned, PRIOR, read=size, written=0, rows=1, first=0.05 + 0.001 * size, seconds=0.05 + 0.001 * size
        )
    assert curve_of(learned, PRIOR, SLOTS).latency(1, 60, 60) == pytest.approx(0.11, rel=0.15)
