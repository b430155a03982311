from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.scaling import MAX_WINDOW, Sample, Scaler, deadlines, replicas, with_recent
from router.decide.snapshot import FleetSnapshot
from tasks.topology import HardwareClass, Price, Scaling, Service, Topology, TopologyError, parse_topology
from taxiway.contract.keys import LEVELS
from tests.builders import a_device

HARDWARE = HardwareClass(
    device="cpu",
    runtimes=("echo",),
    max_batch=1,
    max_wait=0,
    horizon=1,
    target=0.5,
    price=Price(usd_per_hour=1.0),
    scaling=Scaling(start=10.0),
)
DUE = (0.25, 5.0, 3600.0, math.inf)
IDLE = (0.0,) * LEVELS


def steadily(busy: float, *, seconds: int = 60, work: tuple[float, ...] = IDLE) -> list[Sample]:
    return [Sample(float(second), 4, busy, work) for second in range(seconds)]


def scaled(**changes: object) -> HardwareClass:
    return msgspec.structs.replace(HARDWARE, scaling=msgspec.structs.replace(HARDWARE.scaling, **changes))


def test_a_steady_load_gets_devices_for_its_target_utilisation() -> None:
    target = replicas(HARDWARE, DUE, steadily(2.0))
    assert target.replicas == 4
    assert target.reason == "2 device seconds/s at 50% utilisation"


def test_no_load_and_nothing_waiting_means_none() -> None:
    assert replicas(HARDWARE, DUE, steadily(0.0)).replicas == 0


def test_spare_devices_stand_beside_a_load_and_not_alone() -> None:
    assert replicas(scaled(spare=2), DUE, steadily(2.0)).replicas == 6
    assert replicas(scaled(spare=2), DUE, steadily(0.0)).replicas == 0


def test_work_that_waits_for_a_class_without_devices_wakes_it() -> None:
    target = replicas(HARDWARE, DUE, [Sample(0.0, 0, 0.0, (0.0, 0.0, 7200.0, 0.0))])
    assert target.replicas == math.ceil(7200 / 3590)
    assert "due in 3590 s" in target.reason


def test_a_growing_queue_counts_as_load_that_comes() -> None:
    samples = [Sample(float(second), 1, 1.0, (0.0, 0.0, 0.0, 2.0 * second)) for second in range(60)]
    assert replicas(HARDWARE, DUE, samples).replicas == 6


def test_bounds_hold_and_say_so() -> None:
    assert replicas(scaled(minimum=3), DUE, steadily(0.0)).replicas == 3
    target = replicas(scaled(maximum=2), DUE, steadily(2.0))
    assert (target.replicas, target.reason) == (2, "2, the maximum; 4 would be in time")


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


def test_what_was_wanted_lately_stays_for_as_long_as_a_start_takes() -> None:
    target = replicas(HARDWARE, DUE, steadily(0.0))
    assert with_recent(target, [3, 1, 0], HARDWARE).replicas == 3
    assert with_recent(target, [0, 0], HARDWARE) == target


@given(busy=st.floats(0, 100), more=st.floats(0, 100), work=st.lists(st.floats(0, 1e4), min_size=4, max_size=4))
def test_more_load_or_work_never_asks_for_fewer(busy: float, more: float, work: list[float]) -> None:
    least = replicas(HARDWARE, DUE, steadily(busy, seconds=3)).replicas
    assert replicas(HARDWARE, DUE, steadily(busy + more, seconds=3)).replicas >= least
    assert replicas(HARDWARE, DUE, steadily(busy, seconds=3, work=tuple(work))).replicas >= least


def test_a_scaler_follows_a_fleet_up_and_down_again() -> None:
    topology = Topology(
        hardware={"cpu": HARDWARE},
        service={"live": Service(deadline=0.25, priority="high"), "bulk": Service(priority="low")},
        default_service="live",
    )
    assert deadlines(topology) == (0.25, math.inf, math.inf, math.inf)
    scaler = Scaler(topology)
    assert scaler.targets() == {}
    fleet = FleetSnapshot(devices=(a_device("cpu", utilisation=0.9),), work={"cpu": (0.5, 0.0, 0.0, 0.0)})
    scaler.observe(fleet, 0.0)
    assert scaler.targets()["cpu"].replicas == 2
    for second in range(1, 9):
        scaler.observe(FleetSnapshot(), float(second))
    assert scaler.targets()["cpu"].replicas == 2
    for second in range(9, int(MAX_WINDOW) + 20):
        scaler.observe(FleetSnapshot(), float(second))
    assert scaler.targets()["cpu"].replicas == 0


def test_a_class_lacks_devices_once_they_have_been_missing_for_longer_than_one_takes_to_start() -> None:
    scaler = Scaler(Topology(hardware={"cpu": HARDWARE}, service={"bulk": Service()}, default_service="bulk"))
    busy = FleetSnapshot(devices=(a_device("cpu", utilisation=0.9),), work={"cpu": (0.0, 9.0, 0.0, 0.0)})
    lacks = []
    for second in range(12):
        scaler.observe(busy, float(second))
        lacks.append(scaler.targets()["cpu"].lacks)
    wanted = scaler.targets()["cpu"].replicas
    assert lacks == [0] * 10 + [wanted - 1] * 2
    scaler.observe(FleetSnapshot(devices=(a_device("cpu"),) * wanted), 12.0)
    assert scaler.targets()["cpu"].lacks == 0


def test_the_time_of_a_lent_device_counts_for_the_class_that_it_helps() -> None:
    hardware = {"home": scaled(start=0.0), "away": scaled(start=0.0)}
    scaler = Scaler(Topology(hardware=hardware, service={"bulk": Service(priority="low")}, default_service="bulk"))
    lent = a_device("home", utilisation=0.9, serves=("home", "away"))
    scaler.observe(FleetSnapshot((lent,)), 0.0)
    wants = scaler.targets()
    assert (wants["home"].replicas, wants["home"].devices) == (0, 1)
    assert (wants["away"].replicas, wants["away"].devices) == (2, 0)


def test_the_load_is_judged_by_two_starts_or_three_looks() -> None:
    hardware = {"soon": scaled(start=0.5), "late": scaled(start=30.0)}
    scaler = Scaler(Topology(hardware=hardware, service={"bulk": Service(priority="low")}, default_service="bulk"))
    for second in range(10):
        work = dict.fromkeys(hardware, (0.0, 0.0, 0.0, 1.0 if second < 5 else 0.0))
        scaler.observe(FleetSnapshot(work=work), float(second))
    assert [scaler.targets()[name].replicas for name in hardware] == [0, 1]


def test_however_little_waits_a_class_is_not_scaled_to_zero() -> None:
    assert replicas(HARDWARE, DUE, [Sample(0.0, 0, 0.0, (0.0, 0.0, 0.0, 3e-5))]).replicas == 1
    assert replicas(HARDWARE, DUE, [Sample(0.0, 0, 0.0, (0.0, 0.0, 0.0, 1e-17))]).replicas == 0
