"""The size of a class, which the product and the simulator share, and the targets of a fleet without a plan."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.plan import ClassSize, Density, Depth
from router.decide.scaling import Scaler, deadlines
from router.decide.snapshot import FleetSnapshot
from tasks.topology import HardwareClass, Price, Scaling, Service, Topology, TopologyError, parse_topology
from taxiway.contract.keys import flow
from tests.builders import a_device

HARDWARE = HardwareClass(
    device="cpu",
    runtimes=("echo",),
    max_batch=1,
    max_wait=0,
    horizon=1,
    price=Price(usd_per_hour=1.0),
    scaling=Scaling(start=10.0, maximum=8),
)
RULES = st.builds(Density, target=st.floats(0.1, 2), keep=st.none() | st.floats(0, 300)) | st.builds(
    Depth, jobs=st.floats(1, 32), keep=st.floats(0, 300), poll=st.just(0.0)
)
LOADS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), min_size=1, max_size=20)


@given(rule=RULES, floor=st.integers(0, 5), pause=st.floats(0, 600), loads=LOADS, most=st.integers(0, 20))
def test_a_size_is_within_its_bounds_and_shrinks_only_by_what_was_not_needed(
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


@given(load=st.floats(0, 100), more=st.floats(0, 100), jobs=st.integers(0, 50), further=st.integers(0, 50), rule=RULES)
def test_more_load_or_jobs_never_ask_for_fewer(
    load: float, more: float, jobs: int, further: int, rule: Density | Depth
) -> None:
    size = ClassSize(30.0)
    size.follow(rule)
    assert size.wanted(load + more, jobs + further, 0.0) >= size.wanted(load, jobs, 0.0)


def test_a_device_goes_when_it_was_not_needed_for_the_time_of_a_start() -> None:
    size = ClassSize(start=60.0)
    size.need(3, 0.0)
    size.need(1, 30.0)
    assert size.kept(3, 0.0, 0, 59.0, 3) == 3
    assert size.kept(3, 0.0, 0, 60.0, 3) == 1
    assert size.kept(1, 0.0, 0, 90.0, 3) == 0


def test_a_device_that_is_needed_now_is_kept_without_a_keep_alive_too() -> None:
    size = ClassSize(start=60.0)
    size.follow(Density(keep=0.0))
    assert size.kept(3, 1.0, 2, 5.0, 3) == 2
    assert size.kept(2, 0.0, 0, 6.0, 3) == 0


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
    assert scaler.targets() == {}
    scaler.observe(fleet, 0.0, {"cpu": jobs})
    target = scaler.targets()["cpu"]
    return target.replicas, target.reason


def waiting(urgent: float = 0.0, patient: float = 0.0) -> FleetSnapshot:
    return FleetSnapshot(work={"cpu": (urgent, 0.0, 0.0, patient)})


def test_work_gets_the_devices_that_have_it_in_time() -> None:
    assert deadlines(a_topology()) == (0.25, math.inf, math.inf, math.inf)
    assert target_of(waiting(urgent=0.5), jobs=10) == (
        math.ceil(2 / 0.65),
        "work fills 2 devices until it is due, at 65% utilisation",
    )
    assert target_of(waiting(patient=7200.0), jobs=10)[0] == math.ceil(2 / 0.65)
    assert target_of(waiting(urgent=60.0), jobs=1)[0] == 2, "a job runs on one device"
    assert target_of(waiting(), jobs=0)[0] == 0


def test_bounds_hold_and_say_so() -> None:
    assert target_of(waiting(), 0, minimum=3) == (
        3,
        "work fills 0 devices until it is due, at 65% utilisation; 3 at least",
    )
    count, why = target_of(waiting(urgent=0.5), 10, maximum=2)
    assert (count, why.rpartition("; ")[2]) == (2, "2 is the maximum, 4 would be in time")


def test_spare_devices_stand_beside_a_load_and_not_alone() -> None:
    assert target_of(waiting(urgent=0.5), 10, spare=2)[0] == 6
    assert target_of(waiting(), 0, spare=2)[0] == 0


def test_a_class_that_is_asked_between_two_looks_is_not_scaled_to_zero() -> None:
    asked = FleetSnapshot(rates={flow("cpu", "m:1"): 0.2})
    assert target_of(asked, 0)[0] == 1
    assert target_of(FleetSnapshot(rates={flow("other", "m:1"): 0.2}), 0)[0] == 0


def test_a_bound_below_the_least_is_an_error_in_queues_yaml() -> None:
    text = """
hardware:
  cpu: {device: cpu, runtimes: [echo], max_batch: 1, max_wait: 0, price: {usd_per_hour: 1},
        scaling: {minimum: 2, maximum: 1}}
service: {standard: {deadline: 5}}
default_service: standard
"""
    with pytest.raises(TopologyError, match=r"hardware.cpu.scaling.maximum: expected at least minimum \(2\), got 1"):
        parse_topology(text)


def test_a_scaler_follows_a_fleet_up_and_down_again() -> None:
    scaler = Scaler(a_topology())
    scaler.observe(waiting(urgent=0.5), 0.0, {"cpu": 10})
    for second in range(1, 10):
        scaler.observe(FleetSnapshot(), float(second), {})
        assert scaler.targets()["cpu"].replicas == 4
    assert scaler.targets()["cpu"].reason.endswith("; 4 were needed within the last 10 s")
    scaler.observe(FleetSnapshot(), 10.0, {})
    assert scaler.targets()["cpu"].replicas == 0


def test_a_class_lacks_devices_once_they_have_been_missing_for_longer_than_one_takes_to_start() -> None:
    scaler = Scaler(a_topology())
    busy = replace(waiting(urgent=0.5), devices=(a_device("cpu"),))
    lacks = []
    for second in range(12):
        scaler.observe(busy, float(second), {"cpu": 10})
        lacks.append(scaler.targets()["cpu"].lacks)
    assert lacks == [0] * 10 + [3] * 2
    scaler.observe(FleetSnapshot(devices=(a_device("cpu"),) * 4), 12.0, {"cpu": 10})
    assert scaler.targets()["cpu"].lacks == 0
