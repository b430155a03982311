"""The lower bound with whole devices: worked out by hand where that is possible, and never above a run's score."""

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.baselines import EVERY_POLICY, run
from lab.bounds.linear import Pace, least_work, lower_bound
from lab.bounds.whole_devices import kinds, whole_bound
from lab.changes import ChangingFleet, HardwareChange
from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from router.decide.plan import Density
from simulator.policies.policy import Assignment, Fixed, Policy, able_classes
from simulator.workload import Figures, Workload
from tests.lab.test_bound import MIXED, one, requests

DEAR = (3_600_000.0,) * 3
"""Penalties at which nothing is left out."""


def dear(rows: list[dict[str, Any]], **terms: Any) -> Workload:
    """As `one`, with penalties."""
    return fined(one(rows, **terms), DEAR)


def fined(workload: Workload, penalties: tuple[float, ...]) -> Workload:
    return replace(workload, fleet=replace(workload.fleet, penalties=penalties))


def changed(workload: Workload, *events: HardwareChange, **fields: Any) -> Workload:
    """The workload on a fleet whose only class has other fields."""
    ((name, device),) = workload.fleet.classes.items()
    classes = {name: msgspec.structs.replace(device, **fields)}
    assert isinstance(workload.fleet, ChangingFleet)
    return replace(workload, fleet=replace(workload.fleet, classes=classes, events=events))


def at(*arrivals: float, deadline: float = 10) -> list[dict[str, Any]]:
    return [{"arrival": arrival, "deadline": deadline} for arrival in arrivals]


def test_a_device_pays_for_its_start_and_stays_on_when_that_is_cheaper_than_another_start() -> None:
    first = at(0, deadline=140)  # a trace begins with its first request, and no device has started by then
    near = dear([*first, *at(130, 230)], curve="{base: 2, slope: 0}", start=100)
    far = dear([*first, *at(130, 430)], curve="{base: 2, slope: 0}", start=100)
    assert whole_bound(near).score == pytest.approx(100 + 4 + 57.5 + 2, rel=2e-3)  # 57.5 s: the slot between the two
    assert whole_bound(far).score == pytest.approx(100 + 4 + 100 + 2, rel=2e-3)


def test_initial_devices_need_no_start_and_minimal_ones_are_paid_until_the_last_arrival() -> None:
    workload = dear(at(0, 90), curve="{base: 2, slope: 0}", start=60)
    assert whole_bound(changed(workload, initial=1)).score == pytest.approx(2 + 60 + 2, rel=2e-3)
    assert whole_bound(changed(workload, initial=1, minimum=1)).score == pytest.approx(90 + 2, rel=2e-3)


def test_what_costs_more_than_its_fine_is_left_out() -> None:
    workload = one(at(0, 36), curve="{base: 2, slope: 0}", start=20)
    bound = whole_bound(fined(workload, (0.0, 200.0, 0.0)))
    assert bound.score == pytest.approx(200 * 36 / 3600, rel=2e-3)
    assert bound.missed == {"live": None, "standard": 1.0, "bulk": None}
    assert bound.cost == pytest.approx(0, abs=1e-6)


def test_what_may_not_run_on_spot_devices_is_missed_there() -> None:
    workload = fined(one(at(0, 36), curve="{base: 2, slope: 0}"), (0.0, 9000.0, 0.0))
    assert whole_bound(workload).score == pytest.approx(4, rel=2e-3)
    assert whole_bound(changed(workload, spot=True)).score == pytest.approx(90)


def test_slower_hardware_takes_longer_and_answers_less_in_time() -> None:
    def slowed(deadline: float) -> Workload:
        workload = fined(one(at(0, 100, deadline=deadline), curve="{base: 2, slope: 0}"), (0.0, 9000.0, 0.0))
        return changed(workload, HardwareChange(at=50, hardware_class="one", slower=3))

    assert whole_bound(slowed(10)).score == pytest.approx(2 + 6, rel=2e-3)
    assert whole_bound(slowed(5)).score == pytest.approx(2 + 125, rel=2e-3)


def test_what_runs_on_when_hardware_slows_down_is_a_batch_of_its_models_own_sizes() -> None:
    rows = [{"arrival": 0, "model": "embed", "size": 1}, {"arrival": 1, "model": "rank", "size": 1000}]
    fleet = replace(parse_fleet(MIXED), events=(HardwareChange(at=50, hardware_class="cores", slower=2),))
    cores = Pace.of(prepare(make_trace(rows), fleet, seed=0), 2)
    assert cores.carried == pytest.approx(2 * (0.5 + 0.02 + 0.0001 * 4 * 1000))


def test_the_bound_counts_devices_that_the_linear_one_does_not() -> None:
    rows = [{"arrival": 7.0 * n, "model": "embed", "size": 100, "deadline": 3} for n in range(60)]
    workload = fined(prepare(make_trace(rows), parse_fleet(MIXED), seed=0), DEAR)
    assert whole_bound(workload).score > 1.5 * lower_bound(workload).score


@given(rows=st.lists(requests, min_size=1, max_size=60), most=st.integers(1, 12))
def test_no_request_costs_less_than_its_kind_says(rows: list[dict[str, Any]], most: int) -> None:
    workload = prepare(make_trace(rows), parse_fleet(MIXED), seed=0)
    work, price = worked(workload)
    found = kinds(workload, work, price, most=most)
    counted = np.concatenate([kind.rows for kind in found]) if found else np.array([], int)
    assert sorted(counted.tolist()) == np.flatnonzero(np.isfinite(work).any(axis=1)).tolist()
    for kind in found:
        own = work[np.ix_(kind.rows, kind.columns)]
        assert (kind.size[:, None] * kind.rate <= own * (1 + 1e-9) + 1e-8).all()


def worked(workload: Workload) -> tuple[Figures, Figures]:
    classes = workload.fleet.classes.values()
    paces = [Pace.of(workload, column) for column in range(len(classes))]
    return least_work(workload, paces), np.array([device.usd_per_second for device in classes])


events = st.lists(
    st.builds(
        lambda at, name, change: HardwareChange(at=at, hardware_class=name, **change),
        st.floats(0, 150),
        st.sampled_from(["big", "small", "cores"]),
        st.sampled_from([{"slower": 0.5}, {"slower": 3.0}, {"available": 1}, {"reclaimed": True}]),
    ),
    max_size=2,
)


def eager(workload: Workload, seed: int) -> Policy:
    """Every job on its cell's first class or last, of which few devices are on, none for longer than it is needed."""
    able = able_classes(workload.fleet, workload.trace.models)
    rules = (Density(target=5.0, keep=0.001),) * len(workload.fleet.classes)
    return Fixed(Assignment({cell: places[-(seed % 2)] for cell, places in able.items()}, rules))


@pytest.mark.parametrize("name", ["eager", "taxiway", "static", "always-cheapest", "clairvoyant-edf"])
@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(requests, min_size=1, max_size=25),
    seed=st.integers(0, 3),
    surge=st.sampled_from([1, 10]),
    changes=events,
    dollars=st.sampled_from([1.0, 50.0, 5000.0]),
)
def test_no_run_scores_less(
    name: str, rows: list[dict[str, Any]], seed: int, surge: int, changes: list[HardwareChange], dollars: float
) -> None:
    fleet = replace(parse_fleet(MIXED), events=tuple(sorted(changes, key=lambda event: event.at)))
    fleet = replace(fleet, penalties=(dollars, dollars / 2, dollars / 4))
    workload = prepare(make_trace(rows * surge), fleet, seed=seed)
    found = run(name, eager if name == "eager" else EVERY_POLICY[name], workload, seed)
    assert found.score >= whole_bound(workload, seconds=5).score * (1 - 1e-9)
    assert found.score >= lower_bound(workload).score * (1 - 1e-9)
