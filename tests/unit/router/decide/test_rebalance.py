"""Moves of jobs that wait, and of those that run and yield."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.decision_speed import WAITING, WORKERS, scene_of, seconds_of
from router.decide.candidates import build_table
from router.decide.classify import Constraints, Needs
from router.decide.cost import estimate_figures
from router.decide.moves.preempt import SWITCH, Occupant, Waiter, late_rates, penalty, preempt
from router.decide.moves.rebalance import Group, Kind, rebalance
from router.decide.moves.waiting import window_per_level
from router.decide.placement import reserved_and_busy
from router.decide.plan import Cell, ClassPlan, Density, Plan
from router.decide.snapshot import Backlog, FleetSnapshot
from tasks.document import Size
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import HardwareClass, Planning, Price, Rebalance, Service, Topology
from taxiway.contract.keys import LEVELS
from tests.builders import a_class, a_device, a_text_model
from tests.unit.strategies import constraints, fleets, models, needs, topologies

RULES = Rebalance()


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Group], dict[str, list[float]], dict[str, int]]:
    """Groups of one model that wait in a random fleet, the work in it, and its depths."""
    model, topology = draw(models()), draw(topologies())
    fleet = draw(fleets(model, topology))
    groups: list[Group] = []
    for number in range(draw(st.integers(1, 5))):
        table = build_table(model, draw(constraints()), topology, fleet, ProfileBook())
        live = np.flatnonzero(table.live).tolist()
        if live:
            repeats = draw(st.none() | st.floats(0, 5))
            jobs = tuple(f"{number}-{job}" for job in range(draw(st.integers(1, 30)) if repeats is None else 1))
            wants = draw(needs(constraints=Constraints(), rows=1))
            ahead = draw(st.floats(0, 50)) if repeats is None else 0.0
            groups.append(Group(table, wants, draw(st.sampled_from(live)), ahead, jobs, repeats))
    assume(groups)
    work = {name: draw(st.lists(st.floats(0, 50), min_size=LEVELS, max_size=LEVELS)) for name in topology.hardware}
    return groups, work, dict.fromkeys(topology.hardware, 100)


Scene = tuple[list[Group], dict[str, list[float]], dict[str, int]]


@given(scene=scenes())
def test_no_job_is_lost_moved_twice_or_invented_and_a_tick_moves_its_share(scene: Scene) -> None:
    groups, work, depths = scene
    moves = rebalance(*scene, RULES)
    moved, of = [job for move in moves for job in move.jobs], {job: group for group in groups for job in group.jobs}
    assert len(moved) == len(set(moved))
    for place, move in enumerate(moves):
        group = of[move.jobs[0]]
        table = group.table
        index = [(c.hardware_class, c.variant_name) for c in table.candidates].index((move.target, move.variant))
        assert all(of[job].source == move.source != move.target for job in move.jobs)
        busy = 1 + 2 * RULES.tick * table.servers[index] / move.work
        assert len(move.jobs) <= max(depths[move.source] * RULES.max_share_per_tick, busy)
        assert table.live[index]
        assert move.cost <= group.needs.affordable
        assert place or not reserved_and_busy(table, np.array([work[name] for name in table.classes]))[index]


@given(scene=scenes(), data=st.data())
def test_nothing_goes_a_closed_way(scene: Scene, data: st.DataObject) -> None:
    moves = rebalance(*scene, RULES)
    if not moves:
        return
    shut = data.draw(st.sampled_from(moves))
    again = rebalance(*scene, RULES, frozenset({(shut.source, shut.target)}))
    assert (shut.source, shut.target) not in {(move.source, move.target) for move in again}


@given(scene=scenes())
def test_moves_leave_in_time_what_was_surely_in_time(scene: Scene) -> None:
    groups, work, depths = scene
    moves = rebalance(groups, work, depths, RULES)
    for group in (one for one in groups if one.repeats is None):  # nothing comes before what runs
        before = guaranteed(group, work, 0.0)
        limit = math.inf if group.needs.deadline is None else group.needs.deadline
        stayed = set(group.jobs) - {job for move in moves for job in move.jobs}
        if before <= limit and stayed:
            came = sum(
                len(move.jobs) * move.work
                for move in moves
                if move.target == group.source and move.level < group.needs.level
            )
            assert guaranteed(group, work, came) <= limit * (1 + 1e-6)


@given(scene=scenes())
def test_a_job_goes_only_where_it_is_surely_in_time_or_would_be_answered_earlier(scene: Scene) -> None:
    groups, work, depths = scene
    of = {job: group for group in groups for job in group.jobs}
    ledger = {name: list(levels) for name, levels in work.items()}
    for move in rebalance(groups, work, depths, RULES):
        group = of[move.jobs[0]]
        ahead = np.array([sum(ledger[name][: move.level + 1]) for name in group.table.classes])
        ahead[group.table.classes.index(group.source)] = min(group.ahead, sum(ledger[group.source][: move.level + 1]))
        figures = estimate_figures(group.table, group.needs, ahead)
        names = [(c.hardware_class, c.variant_name) for c in group.table.candidates]
        there = names.index((move.target, move.variant))
        behind = (len(move.jobs) - 1) * move.work / group.table.servers[there]
        last = figures.finish[there] + behind
        if move.kind is Kind.BALANCE:
            assert last <= figures.finish[group.here] * (1 + 1e-6)
        else:
            assert last * group.table.residual[move.level, there] <= group.left * (1 + 1e-6)
        ledger[move.target][move.level] += len(move.jobs) * move.work
        ledger[move.source][move.level] -= len(move.jobs) * float(figures.work[group.here])


def guaranteed(group: Group, work: dict[str, list[float]], came: float) -> float:
    """Seconds until the group is surely answered, with so many device seconds more before it."""
    columns = np.array([sum(work[name][: group.needs.level + 1]) for name in group.table.classes])
    home = group.table.classes.index(group.source)
    columns[home] = min(group.ahead, columns[home]) + came
    return float(estimate_figures(group.table, group.needs, columns).at_most[group.here])


@given(scene=scenes(), seed=st.randoms(use_true_random=False))
def test_the_order_of_groups_does_not_matter(scene: Scene, seed: object) -> None:
    groups, work, depths = scene
    assert rebalance(groups[::-1], work, depths, RULES) == rebalance(groups, work, depths, RULES)


def two_classes(*, dear: float = 1.0, speed: float = 1.0) -> tuple[Model, Topology, FleetSnapshot]:
    """`cpu.a` at a dollar an hour, and `cpu.b`, `dear` times as dear; a row takes 10 ms on both, over `speed` on b."""
    model = a_text_model("m", v=Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(0.0, 0.01)}))

    def hardware(price: float) -> HardwareClass:
        return a_class(price, max_batch=1, horizon=1000)

    topology = Topology(
        hardware={"cpu.a": hardware(1.0), "cpu.b": hardware(dear)},
        service={"standard": Service(deadline=5.0)},
        default_service="standard",
    )
    paces = {"cpu.a": 1.0, "cpu.b": 1.0 / speed}
    devices = tuple(
        a_device(name, runtimes=("echo",), warm=("m:1/v",), pace={"m:1/v": pace}, residual={"m:1/v": (1.0,)})
        for name, pace in paces.items()
    )
    return model, topology, FleetSnapshot(devices=devices)


def waiting(
    scene: tuple[Model, Topology, FleetSnapshot], hardware_class: str, jobs: int, deadline: float | None
) -> tuple[list[Group], dict[str, list[float]], dict[str, int]]:
    model, topology, fleet = scene
    table = build_table(model, Constraints(), topology, fleet, ProfileBook())
    here = [c.hardware_class for c in table.candidates].index(hardware_class)
    seconds = 0.01 * jobs
    group = Group(table, Needs(deadline, 1, 1, 1.0), here, seconds, tuple(str(job) for job in range(jobs)))
    return [group], {hardware_class: [0.0, seconds, 0.0, 0.0]}, {hardware_class: jobs}


@pytest.mark.parametrize(
    ("source", "repeats", "kinds"), [("cpu.b", 0.001, [Kind.SAVE]), ("cpu.b", 0.009, []), ("cpu.a", 0.001, [])]
)
def test_a_running_job_goes_where_it_is_cheaper_with_little_redone(
    source: str, repeats: float, kinds: list[Kind]
) -> None:
    (group,), _, _ = waiting(two_classes(dear=3.0), source, 1, deadline=60)
    running = replace(group, ahead=0.0, repeats=repeats)
    moves = rebalance([running], {source: [0.0, 0.01, 0.0, 0.0]}, {source: 1}, RULES)
    assert [move.kind for move in moves] == kinds


@pytest.mark.parametrize(("kind", "moved"), [("", 1), ("cpu", 1), ("cuda", 0)])
def test_a_running_job_moves_only_to_devices_that_can_go_on_from_its_checkpoint(kind: str, moved: int) -> None:
    (group,), work, _ = waiting(two_classes(dear=3.0), "cpu.b", 1, deadline=60)
    running = replace(group, ahead=0.0, repeats=0.001, kind=kind)
    assert len(rebalance([running], work, {"cpu.b": 1}, RULES)) == moved


ALL_AT_ONCE = Rebalance(max_share_per_tick=1.0)


@pytest.mark.cases("dear, source, jobs, deadline, kind, moved")
def test_jobs_move_where_they_are_in_time_or_earlier_or_cheaper(
    dear: float, source: str, jobs: int, deadline: float | None, kind: str | None, moved: int
) -> None:
    moves = rebalance(*waiting(two_classes(dear=dear), source, jobs, deadline), ALL_AT_ONCE)
    assert [move.kind for move in moves] == [kind] * bool(kind)
    assert sum(len(move.jobs) for move in moves) == pytest.approx(moved, abs=2)
    for move in moves:
        assert move.jobs[-1] == str(jobs - 1)
        assert (move.source, move.reason.partition(":")[0]) == (source, move.kind.value)


@pytest.mark.parametrize(("deadline", "kinds"), [(0.015, [Kind.BALANCE]), (0.001, []), (-1.0, [])])
def test_what_may_be_late_goes_only_where_it_may_be_in_time(deadline: float, kinds: list[Kind]) -> None:
    model, topology, fleet = two_classes(dear=3.0)
    unsure = tuple(msgspec.structs.replace(device, residual={"m:1/v": (2.0,)}) for device in fleet.devices)
    scene = waiting((model, topology, replace(fleet, devices=unsure)), "cpu.a", 1000, deadline)
    assert [move.kind for move in rebalance(*scene, ALL_AT_ONCE)] == kinds


@pytest.mark.parametrize("deadline", [None, 60.0])
def test_what_waits_where_no_device_lives_any_more_goes_elsewhere_at_any_price(deadline: float | None) -> None:
    model, topology, fleet = two_classes(dear=3.0)
    left = FleetSnapshot(devices=tuple(d for d in fleet.devices if d.hardware_class == "cpu.b"))
    groups, work, depths = waiting((model, topology, left), "cpu.a", 100, deadline)
    (move,) = rebalance(groups, work, depths, Rebalance(max_share_per_tick=1.0))
    assert (move.kind, move.target, len(move.jobs)) == (Kind.RESCUE, "cpu.b", 100)
    assert move.reason.startswith("rescue: no device of cpu.a is live")


@pytest.mark.parametrize("levels", [1, LEVELS])
def test_a_tick_with_a_thousand_workers_and_a_million_jobs_is_decided_in_a_fraction_of_a_second(levels: int) -> None:
    scene = scene_of(levels)
    assert len(scene.working.fleet.devices) == WORKERS
    assert sum(scene.depths.values()) == WAITING
    assert len(scene.jobs) == RULES.window
    assert len(scene.tick()) > 100
    assert min(seconds_of(scene) for _ in range(5)) < 0.15  # 0.05 on a calm machine: `benchmarks.decision_speed`


def test_a_tick_looks_at_a_window_of_jobs_in_all_however_many_queues_there_are() -> None:
    backlog = Backlog(("a", "b", "c"), {"a": (1.0, 0.0, 2.0, 0.0), "b": (0.0, 5.0, 0.0, 0.0)})
    assert window_per_level(2000, ["a"], backlog) == 1000
    assert window_per_level(2000, ["b"], backlog) == 2000
    assert window_per_level(2000, ["a", "b"], backlog) == 666
    assert window_per_level(1, ["a", "b"], backlog) == 1


def under_a_plan(
    preferred: str, *also: Cell, dear: float = 1.0, used: tuple[str, ...] = ("cpu.a", "cpu.b")
) -> tuple[Model, Topology, FleetSnapshot]:
    model, topology, fleet = two_classes(dear=dear)
    cell = Cell(model="m:1", service="", classes=(preferred,))
    classes = {name: ClassPlan(rule=Density(), devices=1) for name in used}
    return model, topology, replace(fleet, plan=Plan(number=1, made=0.0, cells=(cell, *also), classes=classes))


@pytest.mark.cases("preferred, dear, source, jobs, deadline, moved")
def test_planned_work_is_neither_levelled_nor_saved_but_goes_back_to_its_preferred_class(
    preferred: str, dear: float, source: str, jobs: int, deadline: float | None, moved: list[list[str]]
) -> None:
    moves = rebalance(*waiting(under_a_plan(preferred, dear=dear), source, jobs, deadline), RULES)
    assert [[move.kind, move.target] for move in moves] == moved


MOST = 2
SECONDS = st.floats(0, 100)
DOLLARS = st.floats(0, 1)
WAITERS = st.lists(
    st.builds(Waiter, st.integers().map(str), SECONDS, SECONDS, DOLLARS), max_size=6, unique_by=lambda one: one.job
)
OCCUPANT = st.builds(
    Occupant,
    job=st.integers().map(str),
    token=st.just("w#1"),
    left=SECONDS,
    redo=st.floats(0, 5),
    due=st.one_of(st.floats(-10, 1000), st.just(math.inf)),
    penalty=DOLLARS,
    price=st.floats(0, 0.01),
    cuts=st.integers(0, 3),
)
OCCUPANTS = st.lists(OCCUPANT, max_size=6, unique_by=lambda one: one.job)
LIVE = Waiter("live", left=2.0, run=1.0, penalty=0.01)
BULK = Occupant("bulk", "w#1", left=30.0, redo=0.2, due=3600.0, penalty=0.1, price=1e-5, cuts=0)


@given(WAITERS, OCCUPANTS)
def test_a_job_yields_to_one_that_is_worth_more_and_neither_in_vain_nor_too_often_nor_late_for_one_that_is_not(
    waiters: list[Waiter], occupants: list[Occupant]
) -> None:
    assert preempt(waiters, occupants, most=0) == []
    yields = preempt(waiters, occupants, most=MOST)
    assert len({one.occupant.job for one in yields}) == len({one.waiter.job for one in yields}) == len(yields)
    for one in yields:
        assert one.occupant in occupants
        assert one.waiter in waiters
        assert one.occupant.loss(one.waiter) < one.waiter.loss(math.inf) == one.waiter.penalty
        assert one.waiter.left - one.waiter.run >= SWITCH
        assert one.occupant.left > SWITCH
        assert one.occupant.cuts < MOST
        again = one.occupant.left + one.occupant.redo + SWITCH + one.waiter.run
        assert again < one.occupant.due or one.occupant.penalty < one.waiter.penalty


@given(WAITERS, OCCUPANTS, st.data())
def test_the_order_does_not_matter(waiters: list[Waiter], occupants: list[Occupant], data: st.DataObject) -> None:
    again = preempt(data.draw(st.permutations(waiters)), data.draw(st.permutations(occupants)), most=MOST)
    assert again == preempt(waiters, occupants, most=MOST)


@given(OCCUPANT, st.floats(0, 1000))
def test_a_job_is_worth_more_the_closer_its_deadline(occupant: Occupant, sooner: float) -> None:
    assume(math.isfinite(occupant.due))
    closer = replace(occupant, due=occupant.due - sooner)
    assert closer.loss(LIVE) >= occupant.loss(LIVE)


@given(WAITERS, OCCUPANTS, st.floats(0, 10))
def test_a_job_is_worth_more_the_longer_it_waits(waiters: list[Waiter], occupants: list[Occupant], more: float) -> None:
    for waiter in waiters:
        assert waiter.loss(1.0) <= waiter.loss(1.0 + more) <= waiter.penalty


def test_the_slot_that_is_free_next_is_left_to_one_and_only_one() -> None:
    second = replace(LIVE, job="second")
    decided = preempt([LIVE, second], [replace(BULK, job="soon", left=SWITCH), BULK], most=MOST)
    assert [(one.waiter, one.occupant) for one in decided] == [(second, BULK)]


def test_the_cheapest_yields_and_the_reason_says_what_it_costs() -> None:
    far = replace(BULK, job="far", redo=0.1)
    (one,) = preempt([LIVE], [BULK, far], most=MOST)
    assert one.occupant == far
    assert one.reason == (
        "yields to live, which would wait 30 s, must start within 1 s and costs 0.01 USD if it is late; "
        "this costs 3.9e-05 USD (0.1 s to repeat)"
    )


def test_what_lateness_costs_goes_by_level_unless_the_plan_says_it_of_a_service() -> None:
    services = {"live": Service(deadline=0.25, priority="high"), "bulk": Service(deadline=3600.0, priority="low")}
    hardware = {"c": HardwareClass(device="cpu", runtimes=("echo",), price=Price(usd_per_hour=1.0))}
    topology = Topology(hardware=hardware, service=services, default_service="live")
    assert late_rates(topology) == (48.0, 24.0, 12.0, 12.0)
    planning = Planning(late_usd_per_hour={"live": 90.0})
    assert late_rates(msgspec.structs.replace(topology, plan=planning))[0] == 90.0
    assert penalty(36.0, 100.0) == 1.0
