"""The planner: prices, demand, the integer programme against enumeration, and the replays that check its answer."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from lab.changes import simulate
from lab.fleet_file import parse_fleet, prepare
from lab.rows import synthetic_trace
from simulator.demand import InfeasibleError, Mix, cheapest, check_deadlines, demand, prices
from simulator.engine import RunSummary
from simulator.fleet import Fleet
from simulator.planner import equipped, plan
from simulator.policies.taxiway import Taxiway
from simulator.workload import Figures, Workload
from tasks.topology import Price
from tests.builders import recorded

FLEET = recorded("fleets/plan.yaml")


def fleet(*, old: str = "", new: str = "") -> Fleet:
    return parse_fleet(FLEET.replace(old, new), "fleet.yaml")


def work(rate: float, on: Fleet | None = None, duration: float = 120) -> Workload:
    spec = f"poisson:rate={rate},duration={duration},seed=2,size=1,output=0"
    return prepare(synthetic_trace(spec, model="m"), on or fleet(), seed=1)


def replay(what: str, workload: Workload) -> RunSummary:
    return simulate(what, workload, Taxiway(workload), seed=1)


def carries(load: Figures, devices: Sequence[int]) -> bool:
    """Whether shares of the groups exist that keep each class within its devices: a linear programme of its own."""
    groups, classes = load.shape
    able = np.isfinite(load)
    limits = np.zeros((classes, groups * classes))
    whole = np.zeros((groups, groups * classes))
    for group, column in np.ndindex(groups, classes):
        limits[column, group * classes + column] = load[group, column] if able[group, column] else 0
        whole[group, group * classes + column] = 1
    ceiling = [(0, 1 if possible else 0) for possible in able.ravel()]
    room = np.array(devices) + 1e-6
    return bool(linprog(np.zeros(groups * classes), limits, room, whole, np.ones(groups), ceiling).success)


@st.composite
def programmes(draw: st.DrawFn) -> tuple[dict[str, float], Figures, dict[str, int]]:
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    amount = st.integers(1, 40).map(lambda tenths: tenths / 10)
    offered = {name: draw(amount) for name in names}
    rows = draw(st.lists(st.lists(amount | st.just(math.inf), min_size=len(names), max_size=len(names)), max_size=3))
    load = np.array([row for row in rows if not all(map(math.isinf, row))] or [[0.5] * len(names)])
    return offered, load, dict.fromkeys(names, draw(st.integers(1, 3)))


@given(programme=programmes())
def test_the_mix_is_the_cheapest_that_carries_the_load(
    programme: tuple[dict[str, float], Figures, dict[str, int]],
) -> None:
    offered, load, counts = programme
    names = list(counts)
    ranges = [range(counts[name] + 1) for name in offered]
    every = (Mix(offered, numbers) for numbers in itertools.product(*ranges))
    allowed = [mix for mix in every if all(mix.devices().get(name, 0) <= counts[name] for name in names)]
    carrying = (mix for mix in allowed if carries(load, [mix.devices().get(name, 0) for name in names]))
    cost = min((mix.usd_per_hour for mix in carrying), default=None)
    if cost is None:
        with pytest.raises(InfeasibleError, match="the fleet has too few devices"):
            cheapest(offered, load, counts)
    else:
        assert cheapest(offered, load, counts).usd_per_hour == pytest.approx(cost)


def test_classes_are_on_offer_at_their_own_price_but_not_those_that_cost_nothing_by_the_hour() -> None:
    assert prices(fleet()) == {"fast": 4, "slow": 1, "spot": 1.5}
    paid_by_tokens = msgspec.structs.replace(fleet().classes["slow"], price=Price(0.0))
    assert prices(replace(fleet(), classes={"slow": paid_by_tokens})) == {}


def able(headroom: float) -> set[tuple[bool, ...]]:
    return {tuple(np.isfinite(row)) for row in demand(work(10), np.full(3, headroom))}


def test_a_group_may_only_run_where_it_is_in_time_and_on_spot_if_it_may_be_interrupted() -> None:
    assert able(1) == {(True, False, False), (True, True, False), (True, True, True)}


def test_a_service_that_only_spot_classes_run_is_infeasible() -> None:
    head, rest = FLEET.split("  fast:", 1)
    only = parse_fleet(head + "  spot:" + rest.split("  spot:", 1)[1], "fleet.yaml")
    with pytest.raises(InfeasibleError, match="no class that may run it does"):
        check_deadlines(work(5, only), {"live": 0.9})


def test_a_plan_attains_what_was_asked_and_no_device_more_can_go() -> None:
    workload, slo = work(12, duration=20), {"live": 0.95, "standard": 0.95, "bulk": 0.9}
    found = plan(workload, slo, replay)
    assert all((found.attainment[name] or 0) >= share for name, share in slo.items())
    assert found.saved == pytest.approx(found.rounds[-1].usd_per_hour - found.usd_per_hour)
    assert found.usd_per_hour == pytest.approx(sum(row.usd_per_hour for row in found.mix))
    mix = {row.hardware_class: row.devices for row in found.mix}
    for name, number in mix.items():
        fewer = replay("fewer", equipped(workload, {**mix, name: number - 1}))
        assert any((fewer.attainment[name] or 0) < share for name, share in slo.items())


def test_a_fleet_that_ends_too_early_says_how_many_devices_it_lacks() -> None:
    with pytest.raises(InfeasibleError, match=r"fast has at most 8, \d+ more would do"):
        plan(work(300, duration=20), {"live": 0.9}, replay)


def test_a_share_for_which_the_fleet_ends_says_what_was_attained_and_what_is_lacking() -> None:
    scarce = work(30, fleet(old="fast: {count: 8", new="fast: {count: 2"), duration=20)
    words = r"live asks 1 in time and attains 0\.\d+, and the fleet has too few devices: fast has at most 2, 1 more"
    with pytest.raises(InfeasibleError, match=words):
        plan(scarce, {"live": 1.0}, replay)


def test_a_share_that_no_headroom_reaches_says_what_was_attained_at_what_cost() -> None:
    failing = work(5, fleet(old="fast: {count: 8", new="fast: {count: 500, failures_per_hour: 20000"), duration=8)
    with pytest.raises(InfeasibleError, match=r"live asks 0\.9 in time and attains 0\.\d+ in \d+ replays, at \$\d+"):
        plan(failing, {"live": 0.9}, replay)
