"""Scaling by a plan: its rule and its devices, a floor for work that waits, and nothing for classes it does not use."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from router.decide.plan import Cell, ClassPlan, Density, Depth, Handover, Plan, ScalingRule
from router.decide.scaling import Scaler
from router.decide.snapshot import FleetSnapshot
from tasks.topology import HardwareClass, Price, Scaling, Service, Topology
from taxiway.contract.keys import flow
from tests.builders import a_device
from tests.unit.strategies import plans, topologies

HARDWARE = HardwareClass(
    device="cpu",
    runtimes=("echo",),
    max_batch=1,
    max_wait=0,
    horizon=1,
    price=Price(usd_per_hour=1.0),
    scaling=Scaling(start=10.0, maximum=8),
)
TOPOLOGY = Topology(
    hardware={"used": HARDWARE, "other": HARDWARE},
    service={"live": Service(deadline=2.0, priority="high"), "bulk": Service(priority="low")},
    default_service="live",
)

PAUSE = 120


def a_plan(rule: ScalingRule, devices: int = 0, number: int = 1, **fields: Any) -> Plan:
    cell = Cell(**{"model": "m:1", "service": "live", "classes": ("used", "other"), "deadline": 2.0, **fields})
    return Plan(
        number=number, made=0.0, cells=(cell,), classes={"used": ClassPlan(rule=rule, devices=devices, pause=PAUSE)}
    )


def a_fleet(plan: Plan | None, live: int = 0, now: float = 0.0, **fields: Any) -> FleetSnapshot:
    devices = tuple(a_device("used", worker=f"w{n}") for n in range(live))
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
        return self.scaler.targets()[name].replicas


def test_the_devices_of_a_plan_are_started_at_once_and_further_ones_go_when_they_are_not_needed() -> None:
    clock, plan, work = Clock(), a_plan(Density(keep=20.0), devices=2), {"used": (8.0, 0.0, 0.0, 0.0)}
    assert clock.observe(a_fleet(plan)) == 2
    assert clock.observe(a_fleet(plan, live=2, work=work), jobs=9) == 7
    assert clock.observe(a_fleet(plan, live=7), seconds=19) == 7
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
    assert Clock().observe(a_fleet(a_plan(Density(target=0.5), deadline=1.0), work=work), jobs=9) == math.ceil(
        1.2 / 0.5
    )
    target = Scaler(TOPOLOGY)
    target.observe(a_fleet(a_plan(Density(target=0.5)), work=work), 0.0, {"used": 9})
    assert target.targets()["used"].reason == "planned: work fills 0.6 devices until it is due, at 50% utilisation"


def test_a_depth_counts_jobs_and_grows_only_when_it_polls() -> None:
    clock, plan = Clock(), a_plan(Depth(jobs=4, poll=15.0, keep=0.0))
    assert clock.observe(a_fleet(plan), jobs=5) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=14, jobs=20) == 2
    assert clock.observe(a_fleet(plan, live=2), seconds=1, jobs=20) == 5


def test_a_class_that_the_plan_does_not_use_is_emptied_after_the_handover() -> None:
    clock, work = Clock(), {"other": (0.0, 0.0, 0.0, 7200.0)}
    handover = Handover(former="other", devices=1, latest=100.0)
    clock.observe(a_fleet(None, work=work))
    before = clock.target("other")
    assert before > 0
    moving = a_plan(Density(), devices=1, handover=handover)
    clock.observe(a_fleet(moving))
    assert clock.target("other") == before
    clock.observe(a_fleet(moving, live=1))
    assert clock.target("other") == 0
    clock.observe(a_fleet(moving, live=1, work=work))
    assert clock.target("other") > 0


def test_without_a_plan_the_usual_rule_holds_again() -> None:
    clock = Clock()
    clock.observe(a_fleet(a_plan(Density(keep=600.0), devices=5)))
    assert clock.observe(a_fleet(None)) == 5
    assert clock.observe(a_fleet(None), seconds=10) == 0


@given(
    plan=plans(),
    topology=topologies(),
    seconds=st.lists(st.floats(0, 100), min_size=4, max_size=4),
    jobs=st.integers(0),
)
def test_any_plan_gives_a_target_within_the_bounds(
    plan: Plan, topology: Topology, seconds: list[float], jobs: int
) -> None:
    bounded = {
        name: msgspec.structs.replace(one, scaling=Scaling(minimum=1, maximum=3))
        for name, one in topology.hardware.items()
    }
    scaler = Scaler(msgspec.structs.replace(topology, hardware=bounded))
    fleet = FleetSnapshot(plan=plan, now=1.0, work=dict.fromkeys(topology.hardware, tuple(seconds)))
    for now in range(3):
        scaler.observe(fleet, float(now), dict.fromkeys(topology.hardware, float(jobs)))
    assert all(1 <= target.replicas <= 3 for target in scaler.targets().values())
