"""How many devices a class gets, and which of them are lent to others."""

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.moves.retarget import SETTLED, Action, Retarget, RetargetConditions, retarget
from router.decide.plan import Cell, ClassPlan, ClassSize, Density, Depth, Handover, Plan, ScalingRule
from router.decide.scaling import Scaler, deadlines
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import DeviceFacts, is_emulated, unfit_for
from tasks.topology import Scaling, Service, Topology, parse_topology
from taxiway.contract.keys import flow
from tests.builders import a_class, a_device, recorded
from tests.unit.strategies import topologies

RULES = st.builds(Density, target=st.floats(0.1, 2), keep=st.none() | st.floats(0, 300)) | st.builds(
    Depth, jobs=st.floats(1, 32), keep=st.floats(0, 300), poll=st.just(0.0)
)
LOADS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), min_size=1, max_size=20)


@given(rule=RULES, floor=st.integers(0, 5), pause=st.floats(0, 600), loads=LOADS, most=st.integers(0, 20))
def test_a_size_stays_within_bounds(
    rule: Density | Depth, floor: int, pause: float, loads: list[tuple[float, int]], most: int
) -> None:
    size, devices = ClassSize(30.0), 0
    size.follow(rule, floor, pause, 0.0)
    for second, (load, jobs) in enumerate(loads):
        now = float(second)
        if jobs:
            size.use(now)
        grown = size.grown(devices, load, jobs, now, most)
        assert devices <= grown <= max(devices, most)
        devices = size.kept(grown, load, jobs, now, most)
        assert min(size.wanted(load, jobs, now), most) <= devices <= max(grown, min(size.floor(now), most))
        assert devices >= min(jobs, 1, most)


def test_a_floor_ends_in_a_long_pause_and_is_back_with_the_next_job() -> None:
    size = ClassSize(start=10.0, minimum=1)
    size.follow(Density(), 3, 100.0, 0.0)
    assert [size.floor(now) for now in (0.0, 99.0, 100.0)] == [3, 3, 1]
    size.follow(Density(), 3, 100.0, 110.0)
    assert size.floor(110.0) == 1, "the same plan again is no job"
    size.use(120.0)
    assert size.floor(120.0) == 3


def a_topology(**scaling: object) -> Topology:
    hardware = msgspec.structs.replace(HARDWARE, scaling=msgspec.structs.replace(HARDWARE.scaling, **scaling))
    services = {"live": Service(deadline=0.25, priority="high"), "bulk": Service(priority="low")}
    return Topology(hardware={"cpu": hardware, "other": hardware}, service=services, default_service="live")


def target_of(fleet: FleetSnapshot, jobs: int, **scaling: object) -> tuple[int, str]:
    scaler = Scaler(a_topology(**scaling))
    assert scaler.targets == {}
    scaler.observe(fleet, 0.0, {"cpu": jobs})
    target = scaler.targets["cpu"]
    return target.replicas, target.reason


def waiting(urgent: float = 0.0, patient: float = 0.0) -> FleetSnapshot:
    return FleetSnapshot(work={"cpu": (urgent, 0.0, 0.0, patient)})


IN_TIME = "work fills {} devices until it is due, at 65% utilisation"


@pytest.mark.parametrize(
    ("fleet", "jobs", "scaling", "count", "why"),
    [
        (waiting(urgent=0.5), 10, {}, math.ceil(2 / 0.65), IN_TIME.format(2)),
        (waiting(patient=7200.0), 10, {}, math.ceil(2 / 0.65), ""),
        (waiting(urgent=60.0), 1, {}, 2, ""),  # a job runs on one device
        (waiting(), 0, {}, 0, ""),
        (waiting(), 0, {"minimum": 3}, 3, IN_TIME.format(0) + "; 3 at least"),
        (waiting(urgent=0.5), 10, {"maximum": 2}, 2, IN_TIME.format(2) + "; 2 is the maximum, 4 would be in time"),
        (waiting(urgent=0.5), 10, {"spare": 2}, 6, ""),
        (waiting(), 0, {"spare": 2}, 0, ""),  # none stand beside no load
        (FleetSnapshot(rates={flow("cpu", "m:1"): 0.2}), 0, {}, 1, ""),  # asked between two looks
        (FleetSnapshot(rates={flow("other", "m:1"): 0.2}), 0, {}, 0, ""),
    ],
)
def test_work_gets_the_devices_that_have_it_in_time_within_bounds(
    fleet: FleetSnapshot, jobs: int, scaling: dict[str, int], count: int, why: str
) -> None:
    replicas, reason = target_of(fleet, jobs, **scaling)
    assert replicas == count
    assert not why or reason == why


def test_the_deadline_of_a_level_is_the_shortest_of_its_services() -> None:
    assert deadlines(a_topology()) == (0.25, math.inf, math.inf, math.inf)


HARDWARE = a_class(max_batch=1, horizon=1, scaling=Scaling(start=10.0, maximum=8))
TOPOLOGY = Topology(
    hardware={"used": HARDWARE, "other": HARDWARE},
    service={"live": Service(deadline=2.0, priority="high"), "bulk": Service(priority="low")},
    default_service="live",
)
PAUSE = 120


def a_plan(rule: ScalingRule, devices: int = 0, begin: int = 0, **fields: Any) -> Plan:
    cell = Cell(**{"model": "m:1", "service": "live", "classes": ("used", "other"), "deadline": 2.0, **fields})
    used = ClassPlan(rule=rule, devices=devices, pause=PAUSE, begin=begin)
    return Plan(number=1, made=0.0, cells=(cell,), classes={"used": used})


def a_fleet(plan: Plan | None, live: int = 0, now: float = 0.0, others: int = 0, **fields: Any) -> FleetSnapshot:
    devices = tuple(a_device("used", worker=f"w{n}") for n in range(live))
    devices += tuple(a_device("other", worker=f"o{n}") for n in range(others))
    return FleetSnapshot(devices, plan=plan, now=now, **fields)


class Clock:
    """A scaler that observes a fleet once a second."""

    def __init__(self) -> None:
        self.scaler, self.now = Scaler(TOPOLOGY), 0.0

    def observe(self, fleet: FleetSnapshot, *, seconds: int = 1, jobs: int = 0) -> int:
        """The target of the class in use after these seconds."""
        for _ in range(seconds):
            self.scaler.observe(fleet, self.now, {"used": jobs})
            self.now += 1.0
        return self.target("used")

    def target(self, name: str) -> int:
        return self.scaler.targets[name].replicas


def test_the_devices_of_a_plan_are_started_at_once_and_further_ones_go_when_they_are_not_needed() -> None:
    clock, plan, work = Clock(), a_plan(Density(keep=20.0), devices=2), {"used": (8.0, 0.0, 0.0, 0.0)}
    assert clock.observe(a_fleet(plan)) == 2
    assert clock.observe(a_fleet(plan, live=2, work=work), seconds=11, jobs=9) == 7
    assert clock.scaler.targets["used"].lacks == 5
    assert clock.observe(a_fleet(plan, live=2)) == 7
    assert clock.scaler.targets["used"].lacks == 0, "no work needs them any more"
    assert clock.observe(a_fleet(plan, live=7), seconds=18) == 7
    assert clock.observe(a_fleet(plan, live=7), seconds=3) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=90) == 2


def test_a_class_keeps_the_devices_of_its_plan_in_a_pause_but_not_once_its_load_has_ended() -> None:
    clock, plan = Clock(), a_plan(Density(keep=20.0), devices=2)
    assert clock.observe(a_fleet(plan, live=2), jobs=1) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=PAUSE - 1) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=2) == 0
    assert clock.observe(a_fleet(plan), jobs=1) == 2, "it has them again with the next job"
    asked = {flow("used", "m:1"): 0.2}
    assert clock.observe(a_fleet(plan, live=2, rates=asked), seconds=2 * PAUSE) == 2, "jobs that are over in no time"


def test_a_density_counts_work_against_the_tightest_planned_deadline_of_its_level() -> None:
    work = {"used": (1.2, 0.0, 0.0, 0.0)}
    assert Clock().observe(a_fleet(a_plan(Density(target=0.5)), work=work), jobs=9) == math.ceil(1.2 / 2 / 0.5)
    tighter = a_plan(Density(target=0.5), deadline=1.0)
    assert Clock().observe(a_fleet(tighter, work=work), jobs=9) == math.ceil(1.2 / 0.5)
    target = Scaler(TOPOLOGY)
    target.observe(a_fleet(a_plan(Density(target=0.5)), work=work), 0.0, {"used": 9})
    assert target.targets["used"].reason == "planned: work fills 0.6 devices until it is due, at 50% utilisation"


def test_a_depth_counts_jobs_and_grows_only_when_it_polls() -> None:
    clock, plan = Clock(), a_plan(Depth(jobs=4, poll=15.0, keep=0.0))
    assert clock.observe(a_fleet(plan), jobs=5) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=14, jobs=20) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=1, jobs=20) == 5


def test_a_class_that_the_plan_does_not_use_is_emptied_after_the_handover() -> None:
    clock, work = Clock(), {"other": (8.0, 0.0, 0.0, 0.0)}
    handover = Handover(former="other", devices=1, latest=100.0)
    clock.observe(a_fleet(None, others=1, work=work))
    assert clock.target("other") == 2
    moving = a_plan(Density(), devices=1, handover=handover)
    clock.observe(a_fleet(moving, others=1))
    assert clock.target("other") == 1, "what starts for what was placed before is not awaited"
    clock.observe(a_fleet(moving, live=1, others=1))
    assert clock.target("other") == 0
    clock.observe(a_fleet(moving, live=1, work=work))
    assert clock.target("other") > 0


def test_a_class_begins_a_plan_that_is_adopted_with_the_devices_that_it_would_have_by_now() -> None:
    clock, work = Clock(), {"used": (8.0, 0.0, 0.0, 0.0)}
    assert clock.observe(a_fleet(None, live=4, work=work), jobs=9) == 7
    plan = a_plan(Density(keep=300.0), devices=2, begin=3)
    assert clock.observe(a_fleet(plan, live=7), jobs=1) == 3
    assert clock.observe(a_fleet(plan, live=7, work=work), jobs=9) == 7, "work that needs more gets more"
    kept = msgspec.structs.replace(plan, number=2, made=60.0)
    assert clock.observe(a_fleet(kept, live=7), jobs=1) == 7, "a plan that is kept ends nothing"
    renewed = msgspec.structs.replace(plan, number=3, made=90.0, adopted=90.0)
    assert clock.observe(a_fleet(renewed, live=7), jobs=1) == 3


def test_a_guess_starts_no_device_and_ends_none() -> None:
    clock, guess = Clock(), msgspec.structs.replace(a_plan(Density(), devices=2), classes={}, guessed=True)
    clock.observe(a_fleet(None, work={"other": (0.0, 0.0, 0.0, 7200.0)}))
    before = clock.target("used"), clock.target("other")
    clock.observe(a_fleet(guess))
    assert (clock.target("used"), clock.target("other")) == before


LENDING = parse_topology(recorded("fleets/lending.yaml"))
TIMEOUT = 2.0


def device(name: str, own: str = "cpu.day", **facts: Any) -> DeviceFacts:
    return a_device(own, worker=name, **{"runtimes": ("echo", "onnx"), **facts})


def waiting_for(**seconds: float) -> dict[str, tuple[float, ...]]:
    """Device seconds that wait, by class; `day=1.0` is the class cpu.day."""
    return {f"cpu.{name}": (0.0, work, 0.0, 0.0) for name, work in seconds.items()}


def after(
    fleet: FleetSnapshot, topology: Topology = LENDING, *, conditions: RetargetConditions | None = None
) -> list[Retarget]:
    """What is decided once the fleet has been like this for as long as it takes."""
    conditions = RetargetConditions() if conditions is None else conditions
    conditions.observe(fleet, topology, 0.0)
    assert not [one for one in retarget(fleet, topology, conditions, 0.0) if one.action is Action.LEND]
    conditions.observe(fleet, topology, TIMEOUT)
    return retarget(fleet, topology, conditions, TIMEOUT)


def starved(*live: DeviceFacts, **more: Any) -> FleetSnapshot:
    return FleetSnapshot(live, work=waiting_for(**({"night": 9.0} | more)))


ECHO = device("a", runtimes=("echo",))
OWN, OWN_ECHO = device("n", "cpu.night"), device("n", "cpu.night", runtimes=("echo",))
LENT = {
    "as many as serve its backlog within its horizon": (starved(*map(device, "abcde"), OWN, night=25.0), "ab"),
    "none within its horizon": (starved(device("a"), OWN), ""),
    "for what is held as well": (FleetSnapshot((device("a"),), held=waiting_for(night=1.0)), "a"),
    "not one in use": (starved(device("a", utilisation=0.5)), ""),
    "not one that runs": (starved(device("a", running=1)), ""),
    "not one that holds": (starved(device("a", held=1)), ""),
    "not the last of a class with work": (starved(device("a"), day=0.1), ""),
    "what the rest of its class can spare": (starved(device("a"), device("b"), night=99.0, day=0.1), "a"),
    "not what its operator took": (starved(device("a", serves=("cpu.night",)), night=0.0, day=9.0), ""),
    "not what serves nothing": (starved(device("a", serves=()), day=9.0), ""),
    "one that runs all that the class has": (starved(ECHO), ""),
    "one that runs what its devices do": (starved(ECHO, OWN_ECHO, night=99.0), "a"),
    "one with the instructions of its devices": (
        *(starved(ECHO, msgspec.structs.replace(OWN_ECHO, instruction_sets=("amx_int8",)), night=99.0), ""),
    ),
}


@pytest.mark.parametrize(("fleet", "workers"), LENT.values(), ids=LENT)
def test_a_class_whose_work_waits_too_long_is_lent(fleet: FleetSnapshot, workers: str) -> None:
    assert "".join(one.worker for one in after(fleet)) == workers
    unlent = msgspec.structs.replace(LENDING, rebalance=msgspec.structs.replace(LENDING.rebalance, retarget=None))
    assert not after(fleet, unlent)


def test_a_lent_device_returns_once_nothing_has_waited_for_a_while() -> None:
    lent, conditions = device("a", serves=("cpu.day", "cpu.night")), RetargetConditions()
    for now, work in ((0.0, 0.0), (1.0, 0.1), (2.0, 0.0), (3.9, 0.0)):
        fleet = FleetSnapshot((lent,), work=waiting_for(night=work))
        conditions.observe(fleet, LENDING, now)
        assert not retarget(fleet, LENDING, conditions, now)
    conditions.observe(fleet, LENDING, 4.0)
    assert [one.action for one in retarget(fleet, LENDING, conditions, 4.0)] == [Action.RETURN]


def test_a_lent_device_returns_once_the_class_has_had_devices_enough_of_its_own_for_a_while() -> None:
    lent, conditions = device("a", serves=("cpu.day", "cpu.night")), RetargetConditions()
    decided = []
    for now, own in ((0.0, 0), (1.0, 1), (2.9, 1), (3.0, 1)):
        devices = (lent, *(device(f"n{number}", "cpu.night") for number in range(own)))
        conditions.observe(fleet := FleetSnapshot(devices, work=waiting_for(night=0.5)), LENDING, now)
        decided.append([one.action for one in retarget(fleet, LENDING, conditions, now)])
    assert decided == [[], [], [], [Action.RETURN]]


def test_a_retargeted_worker_is_not_commanded_again_until_its_heartbeat_can_show_it() -> None:
    fleet, conditions = FleetSnapshot((device("a"), device("b")), work=waiting_for(night=9.0)), RetargetConditions()
    conditions.note(after(fleet, conditions=conditions), TIMEOUT)
    conditions.observe(fleet, LENDING, TIMEOUT + SETTLED / 2)
    assert not retarget(fleet, LENDING, conditions, TIMEOUT + SETTLED / 2)
    conditions.observe(fleet, LENDING, TIMEOUT + SETTLED)
    assert retarget(fleet, LENDING, conditions, TIMEOUT + SETTLED)


@pytest.mark.cases("own, other, facts, reason")
def test_a_device_serves_what_it_is_fit_for(own: str, other: str, facts: dict[str, Any], reason: str | None) -> None:
    unfit = unfit_for(other, device("a", own, **facts), LENDING)
    assert unfit is None if reason is None else unfit is not None and unfit.startswith(reason)


def test_an_emulated_device_that_serves_a_class_of_its_real_kind_is_not_emulated_there() -> None:
    assert is_emulated("cpu", LENDING.hardware["gpu.live"])
    assert not is_emulated("cpu", LENDING.hardware["cpu.day"])


SECONDS = st.sampled_from((0.0, 0.0, 0.0, 0.01, 30.0))


@st.composite
def histories(draw: st.DrawFn, topology: Topology) -> list[FleetSnapshot]:
    """The same workers tick by tick, with other work and other loads; what they serve is what they are ordered to."""
    classes = sorted(topology.hardware)
    owns = draw(st.lists(st.sampled_from(classes), min_size=1, max_size=4))
    workers = [(f"worker-{n}", own, topology.hardware[own].device) for n, own in enumerate(owns)]
    ticks: list[FleetSnapshot] = []
    for _ in range(draw(st.integers(1, 6))):
        work = {name: (0.0, draw(SECONDS), 0.0, 0.0) for name in classes}
        busy = [draw(st.sampled_from((0.0, 0.0, 0.0, 0.9))) for _ in workers]
        pairs = zip(workers, busy, strict=True)
        devices = tuple(device(name, own, kind=kind, utilisation=used) for (name, own, kind), used in pairs)
        ticks += [FleetSnapshot(devices, work=work)] * draw(st.integers(1, 12))
    return ticks


@given(st.data())
def test_lending_keeps_its_promises_whatever_happens(data: st.DataObject) -> None:
    topology = data.draw(st.just(LENDING) | topologies())
    conditions, serves, last = (
        RetargetConditions(),
        dict[str, tuple[str, ...]](),
        dict[tuple[str, str], tuple[Action, float]](),
    )
    for number, drawn in enumerate(data.draw(histories(topology))):
        now = 0.5 * number
        fleet = replace(
            drawn, devices=tuple(msgspec.structs.replace(d, serves=serves.get(d.worker)) for d in drawn.devices)
        )
        conditions.observe(fleet, topology, now)
        decided = retarget(fleet, topology, conditions, now)
        conditions.note(decided, now)
        by_worker = {d.worker: d for d in fleet.devices}
        assert len({one.worker for one in decided}) == len(decided)
        for one in decided:
            lent, own = by_worker[one.worker], by_worker[one.worker].hardware_class
            assert one.hardware_class != own
            before, at = last.get((one.worker, one.hardware_class), (Action.RETURN, -1e6))
            assert before is not one.action
            if one.action is Action.LEND:
                assert unfit_for(one.hardware_class, lent, topology) is None
                assert lent.utilisation == 0.0
                assert lent.classes == (own,)
                at_home = sum(d.classes == (own,) for d in fleet.devices if d.hardware_class == own)
                assert sum(fleet.work[own]) <= max(0.5 * (at_home - 1), 1e-9)
                assert now - at >= TIMEOUT
            last[one.worker, one.hardware_class] = one.action, now
            serves[one.worker] = (own, one.hardware_class) if one.action is Action.LEND else (own,)
