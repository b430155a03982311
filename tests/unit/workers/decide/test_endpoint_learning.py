"""What a worker learns of its endpoint: how long it takes, and how much may be sent to it."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.model import Profile
from workers.decide.endpoints import ENOUGH, EndpointRates, Learned, after, curve_of, duration, learned, rates_of

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


def test_a_law_weighs_each_answer_by_its_seconds_and_starts_from_the_profile() -> None:
    """A prompt of 10 tokens beside 2 rows takes 0.15 s by the profile, and each token after the first 5 ms."""
    answer = {"read": 10, "written": 3, "rows": 2, "first": 0.3, "seconds": 0.5}
    first = after(Learned(), PRIOR, **answer).first
    each = after(Learned(), PRIOR, **answer).each
    weight = 0.3**-2
    assert first.gram == pytest.approx([weight * a * b for a in (1, 10, 20) for b in (1, 10, 20)])
    assert first.moment == pytest.approx([weight * 0.3 * a for a in (1, 10, 20)])
    assert (first.ratio, first.count) == pytest.approx((2.0, 1))
    assert each.gram == pytest.approx([100 * a * b for a in (1, 2) for b in (1, 2)])
    assert (each.ratio, each.count) == pytest.approx((20.0, 1))
    again = after(after(Learned(), PRIOR, **answer), PRIOR, **answer).first
    assert weight < again.gram[0] < 2 * weight, "the former fades a little"
    slow = after(after(Learned(), PRIOR, **answer), PRIOR, **(answer | {"first": 300.0, "seconds": 301.0})).first
    assert again.ratio == pytest.approx(2.0)
    assert 2.1 < slow.ratio < 10, "one odd answer counts in part"


def test_enough_answers_replace_the_profile_each_law_for_itself() -> None:
    few, enough = (curve_of(taught(Profile(1.0, 0.0, step=1.0), n, 1), PRIOR, SLOTS) for n in (ENOUGH - 1, ENOUGH))
    assert (few.base, few.step, few.slope, few.of_prompt) == (0.1, 0.004, 0.0005, (0.004, 0.0005))
    assert (enough.base, enough.step) != (PRIOR.base, PRIOR.step)
    whole = Learned()
    for size in range(ENOUGH):
        whole = after(whole, PRIOR, read=100 + size, written=1, rows=1, first=3.0, seconds=3.0)
    curve = curve_of(whole, PRIOR, SLOTS)
    assert (curve.step, curve.slope, curve.load) == (PRIOR.step, PRIOR.slope, PRIOR.load)
    assert curve.latency(1, 100, 100) == pytest.approx(3.0, rel=0.1)


amounts = st.floats(1, 5000)
steps = st.lists(st.tuples(st.floats(0, 30), amounts), max_size=40)


@given(requests=st.floats(1, 600), tokens=st.floats(1, 1e5), steps=steps)
def test_who_waits_as_computed_keeps_every_limit(
    requests: float, tokens: float, steps: list[tuple[float, float]]
) -> None:
    """A bucket lets at most its capacity through at once, and as much again in the minute after."""
    rates, now, sent = rates_of(requests, tokens, 0.0), 0.0, []
    for pause, amount in steps:
        now += pause
        now += rates.wait(amount, now)
        assert rates.wait(amount, now) == pytest.approx(0.0, abs=1e-6)
        rates = rates.taken(amount, now)
        sent.append((now, min(amount, tokens)))
    for start, _ in sent:
        within = [amount for at, amount in sent if start <= at < start + 60]
        assert len(within) <= 2 * max(requests, 1.0) + 1
        assert sum(within) <= 2 * tokens + max(within) + 1e-3


@pytest.mark.cases("requests, tokens, amount, room, wait")
def test_there_is_room_within_both_limits(
    requests: float | None, tokens: float, amount: float, room: float, wait: float
) -> None:
    rates = rates_of(requests, tokens, 0.0)
    assert (rates.free(amount, 0.0), rates.wait(amount, 0.0)) == pytest.approx((room, wait))
    spent = rates.taken(2 * tokens, 0.0, requests=0.0)
    assert (spent.free(amount, 0.0), spent.wait(tokens, 0.0)) == pytest.approx((0.0, 120.0))
    assert rates_of(60, None, 0.0, endpoints=3).free(amount, 0.0) == 180
    assert (EndpointRates().wait(1e9, 0.0), EndpointRates().free(1e9, 0.0)) == (0.0, math.inf)


def test_an_answer_states_limits_and_what_is_left() -> None:
    headers = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5999",
    }
    rates = learned(EndpointRates(), headers, 10.0)
    assert rates.free(1.0, 10.0) == 2
    assert rates.taken(1.0, 10.0, requests=2.0).wait(1.0, 10.0) == pytest.approx(1.0)
    assert rates.tokens is not None
    assert (rates.tokens.capacity, rates.tokens.rate) == (6000, 100)


REQUESTS = "x-ratelimit-{}-requests"


@pytest.mark.cases("stated, used, level, wait")
def test_the_stricter_limit_holds(stated: dict[str, str], used: float, level: float, wait: float) -> None:
    known = rates_of(30, None, 0.0).taken(1.0, 0.0, requests=used)
    rates = learned(known, {REQUESTS.format(name): text for name, text in stated.items()}, 0.0)
    assert rates.requests is not None
    assert rates.requests.level == pytest.approx(level)
    assert rates.wait(1, 0.0) == pytest.approx(wait)


@pytest.mark.cases("text, seconds")
def test_durations_are_read_in_the_forms_that_endpoints_have(text: str, seconds: float | None) -> None:
    assert duration(text) == seconds


headers = st.dictionaries(
    st.sampled_from(
        [f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")]
    ),
    st.text(max_size=20)
    | st.integers(-5, 10**15).map(str)
    | st.sampled_from(["1s", "9999999999h", "NaN", "inf", "1e9"]),
)
