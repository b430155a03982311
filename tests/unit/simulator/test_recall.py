"""Which recorded arrivals are played: the latest, unless an earlier time was more like now."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lab.fleet_file import parse_fleet, prepare
from lab.rows import joined, synthetic_trace
from simulator.tuning.recall import BLOCK, COUNTS_KEPT, NOW, SOON, Counts, Traffic, alike, followed, recalled
from simulator.tuning.twin import Window
from simulator.workload import Workload
from tasks.history import JOB, Arrivals
from tests.builders import recorded

LENGTH = 8
DAY, NIGHT = (60, 200), (120, 90)
LATER, LATELY, UNLIKE = (SOON, DAY), (NOW, DAY), (NOW, (300, 400))
NAMES = {"model": ("a", "b"), "locality": ("", "lab"), "tenant": ("",), "service": ("",), "hardware_class": ("",)}


def counts(*spans: tuple[int, tuple[int, ...]], seed: int = 1) -> Counts:
    """Requests of each model in spans of blocks with these rates."""
    random = np.random.default_rng(seed)
    drawn = [random.poisson(np.array(rates)[:, None], (len(rates), blocks)) for blocks, rates in spans]
    return np.hstack(drawn).astype(np.float64)


@pytest.mark.cases("spans, played, begin")
def test_after_a_change_the_time_is_recalled_that_had_todays_rates(
    spans: tuple[tuple[int, tuple[int, ...]], ...], played: int | None, begin: tuple[int, int] | None
) -> None:
    found = recalled(counts(*spans), LENGTH, **({} if played is None else {"played": played}))
    assert (found is None) == (begin is None)
    if found and begin:
        assert begin[0] <= found[0] <= begin[1]
        assert found[1] == SOON


def arrivals(begin: float, end: float, every: Callable[[float], float], state: int = 0) -> Arrivals:
    """Requests of model a until the end, one `every` so many seconds."""
    times, now = list[float](), begin
    while now < end:
        times.append(now)
        now += every(now)
    jobs = np.zeros(len(times), JOB)
    jobs["arrival"], jobs["state"] = times, state
    return Arrivals(NAMES, jobs)


def every(at: float) -> float:
    return 3.0 if 20 * BLOCK <= at < 40 * BLOCK else 1.0


def test_a_tuner_recalls_from_the_counts_of_what_it_read() -> None:
    day, night = 20 * BLOCK, 40 * BLOCK
    until, span = night + SOON * BLOCK + 7, LENGTH * BLOCK
    traffic = Traffic()
    assert not traffic
    traffic.add(arrivals(0, day, every), 0, day)
    assert traffic.alike(day, span) is None
    traffic.add(arrivals(day - span, until, every), day - span, until)
    found = traffic.alike(until, span)
    assert found is not None
    assert 0 <= found.begin <= day - span
    assert found.recent == SOON * BLOCK
    assert traffic.alike(until, span, found.begin) is None


def test_times_that_were_not_observed_or_are_too_old_are_not_recalled() -> None:
    day, night = 20 * BLOCK, 40 * BLOCK
    until, span = night + SOON * BLOCK, LENGTH * BLOCK
    whole = arrivals(0, until, every)
    gap = Traffic()
    gap.add(Arrivals(NAMES, whole.jobs, unseen=((day, day + BLOCK),)), 0, until)
    assert gap.alike(until, span) is None
    old = Traffic()
    old.add(whole, 0, until)
    old.add(arrivals(until, until + COUNTS_KEPT, every), until, until + COUNTS_KEPT)
    assert old.alike(until, span) is None


def test_recalled_arrivals_come_just_before_the_last_minutes() -> None:
    earlier, latest = arrivals(100, 400, lambda _: 1.0), arrivals(5000, 5450, lambda _: 2.0)
    both = followed(earlier, 400, latest, 5390)
    assert both.jobs["arrival"].min() == 5390 - 300
    assert len(both) == 300 + 60 / 2
    assert earlier.jobs["arrival"].min() == 100


FLEET = recorded("fleets/recall.yaml")


def of_rates(spans: Sequence[tuple[float, float, float]]) -> Workload:
    """Seconds with these rates of both models, one after the other."""
    parts, begin = [], 0.0
    for seconds, *rates in spans:
        for seed, (model, rate) in enumerate(zip("ab", rates, strict=True)):
            given = f"poisson:rate={rate},duration={seconds},size=1,output=0,seed={seed}"
            part = synthetic_trace(given, model=model)
            part.arrival[:] += begin
            parts.append(part)
        begin += seconds
    return prepare(joined(parts), parse_fleet(FLEET), seed=1)


def test_a_window_is_of_the_time_that_was_like_now_and_of_the_last_minutes() -> None:
    workload = of_rates([(600, 2, 7), (600, 4, 3), (SOON * BLOCK, 2, 7)])
    now, span = 1200 + SOON * BLOCK, 240.0
    window = Window.likely(workload, now, span, alike(workload.trace, now, span))
    assert window.span == span + SOON * BLOCK
    assert len(window.jobs) == pytest.approx(9 * window.span, rel=0.1)
    assert (np.diff(window.workload.trace.arrival) >= 0).all()
    before = Window.likely(workload, 1190.0, span, alike(workload.trace, 1190.0, span))
    assert before.span == span
    assert len(before.jobs) == len(Window.latest(workload, 1190.0, span).jobs)
