"""The twin and the search: plays tell what an assignment costs, and the search finds better ones."""

from __future__ import annotations

import pytest

from router.decide.scaling_rule import Density
from simulator.engine import simulate
from simulator.fleet import parse_fleet
from simulator.policies.fixed import Assignment, Fixed
from simulator.traces.synthetic import synthetic_trace
from simulator.traces.trace import joined
from simulator.traces.workload import Workload, prepare
from simulator.tuning.search import Search, fresh
from simulator.tuning.twin import Conditions, Twin, Window

FLEET = """
default_model: quick
classes:
  cheap: {count: 4, initial: 1, price: {usd_per_hour: 0.2}, memory: 8GiB, start: 5, max_batch: 4,
          curves: {quick: {base: 0.05, slope: 0.01, load: 0.1}, heavy: {base: 0.5, slope: 0.5, load: 0.1}}}
  dear: {count: 4, initial: 1, price: {usd_per_hour: 2}, memory: 8GiB, start: 5, max_batch: 16,
         curves: {quick: {base: 0.01, slope: 0.001, load: 0.1}, heavy: {base: 0.05, slope: 0.02, load: 0.1}}}
services:
  live: {share: 0.5, deadline: 1}
  standard: {share: 0.5, deadline: 20}
  bulk: {share: 0}
penalties: {live: 48, standard: 24, bulk: 12}
"""


def workload() -> Workload:
    each = [
        synthetic_trace(f"poisson:rate={rate},duration=120,size=1,output=1,seed={seed}", model=model)
        for seed, (model, rate) in enumerate((("quick", 4), ("heavy", 1)))
    ]
    return prepare(joined(each), parse_fleet(FLEET), seed=1)


def twin(begin: float = 0.0, end: float = 120.0, pace: float = 1.0) -> Twin:
    work = workload()
    count = tuple(device.count for device in work.fleet.classes.values())
    return Twin(work.fleet, Window.of(work, begin, end), Conditions(fresh(work.fleet), count, (1.0, pace)))


def everything_on(place: int) -> Assignment:
    return Assignment({(m, s): place for m in range(2) for s in range(3)}, (Density(), Density()))


def test_a_play_tells_what_the_simulator_tells() -> None:
    work, assignment = workload(), everything_on(1)
    played = twin().play(assignment)
    simulated = simulate("fixed", work, Fixed(assignment), seed=0)
    live = work.trace.service == 0
    assert played.timely[live].mean() == pytest.approx(simulated.attainment["live"], abs=0.02)
    assert played.score == pytest.approx(simulated.score * 30, rel=0.15)


def test_a_search_finds_a_better_assignment_and_the_same_one_again() -> None:
    found = Search(twin(), seed=1).descend(everything_on(1), plays=30)
    assert found.plays <= 30
    assert found.score < 0.9 * found.before
    assert Search(twin(), seed=1).descend(everything_on(1), plays=30).assignment.key == found.assignment.key


def test_live_work_that_would_be_late_leaves_a_class_that_became_slow() -> None:
    start = Search(twin(), seed=1).best_start()
    slow = Search(twin(pace=20.0), seed=1).descend(start, plays=40).assignment
    quick = workload().trace.models.index("quick")
    assert slow.classes[quick, 0] == 0


def test_a_window_begins_at_zero_and_holds_its_arrivals() -> None:
    window = twin(40.0, 80.0).window
    arrivals = [job.arrival for job in window.jobs]
    assert arrivals == sorted(arrivals)
    assert 0 <= arrivals[0] < arrivals[-1] < window.span == 40.0
