from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.moves.retarget import SETTLED, Action, Retarget, RetargetConditions, retarget
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import DeviceFacts, is_emulated, unfit_for
from tasks.topology import Topology, parse_topology
from tests.builders import a_device
from tests.unit.strategies import topologies

TOPOLOGY = parse_topology("""
hardware:
  cpu.day: &cpu {device: cpu, runtimes: [echo, onnx], max_batch: 4, max_wait: 0, horizon: 2, price: {usd_per_hour: 1}}
  cpu.night: {<<: *cpu, horizon: 10}
  cpu.spot: {<<: *cpu, capacity: spot}
  cpu.lab: {<<: *cpu, labels: [lab]}
  gpu.live: &gpu {<<: *cpu, device: cuda, memory: 16GiB}
  gpu.large: {<<: *gpu, memory: 80GiB}
service: {standard: {deadline: 5}}
default_service: standard
rebalance: {tick: 0.5, retarget: 2}
""")
PATIENCE = 2.0


def device(name: str, own: str = "cpu.day", **facts: Any) -> DeviceFacts:
    return a_device(own, worker=name, **{"runtimes": ("echo", "onnx"), **facts})


def waiting(**seconds: float) -> dict[str, tuple[float, ...]]:
    """Device seconds that wait, by class; `day=1.0` is the class cpu.day."""
    return {f"cpu.{name}": (0.0, work, 0.0, 0.0) for name, work in seconds.items()}


def after(
    fleet: FleetSnapshot, topology: Topology = TOPOLOGY, *, conditions: RetargetConditions | None = None
) -> list[Retarget]:
    """What is decided once the fleet has been like this for as long as it takes."""
    conditions = RetargetConditions() if conditions is None else conditions
    conditions.observe(fleet, topology, 0.0)
    assert not [one for one in retarget(fleet, topology, conditions, 0.0) if one.action is Action.LEND]
    conditions.observe(fleet, topology, PATIENCE)
    return retarget(fleet, topology, conditions, PATIENCE)


def test_an_idle_device_is_lent_to_a_class_without_a_device() -> None:
    (lent,) = after(FleetSnapshot((device("a"),), work=waiting(night=0.1)))
    assert (lent.worker, lent.hardware_class, lent.action) == ("a", "cpu.night", "add_consumer")
    assert lent.reason == "0.1 device seconds wait for cpu.night (0 devices serve it)"


def test_a_class_gets_as_many_as_serve_its_backlog_within_its_horizon() -> None:
    devices = tuple(device(name) for name in "abcde")
    lent = after(FleetSnapshot((*devices, device("n", "cpu.night")), work=waiting(night=25.0)))
    assert [one.worker for one in lent] == ["a", "b"]


def test_a_class_within_its_horizon_gets_none() -> None:
    assert not after(FleetSnapshot((device("a"), device("n", "cpu.night")), work=waiting(night=9.0)))


def test_what_is_held_for_a_class_starves_it_as_well() -> None:
    assert after(FleetSnapshot((device("a"),), held=waiting(night=1.0)))


@pytest.mark.parametrize("busy", [{"utilisation": 0.5}, {"running": 1}, {"held": 1}])
def test_a_device_that_works_is_not_lent(busy: dict[str, Any]) -> None:
    assert not after(FleetSnapshot((device("a", **busy),), work=waiting(night=1.0)))


def test_a_class_with_work_lends_only_what_the_rest_of_its_devices_can_spare() -> None:
    assert not after(FleetSnapshot((device("a"),), work=waiting(night=9.0, day=0.1)))
    assert len(after(FleetSnapshot((device("a"), device("b")), work=waiting(night=99.0, day=0.1)))) == 1


def test_a_lent_device_returns_at_once_when_its_own_class_has_work() -> None:
    lent = device("a", serves=("cpu.day", "cpu.night"))
    fleet, conditions = FleetSnapshot((lent,), work=waiting(night=9.0, day=0.1)), RetargetConditions()
    conditions.observe(fleet, TOPOLOGY, 0.0)
    assert retarget(fleet, TOPOLOGY, conditions, 0.0) == [
        Retarget("a", "cpu.night", Action.RETURN, "cpu.day has work of its own")
    ]


def test_a_lent_device_returns_once_nothing_has_waited_for_a_while() -> None:
    lent, conditions = device("a", serves=("cpu.day", "cpu.night")), RetargetConditions()
    for now, work in ((0.0, 0.0), (1.0, 0.1), (2.0, 0.0), (3.9, 0.0)):
        fleet = FleetSnapshot((lent,), work=waiting(night=work))
        conditions.observe(fleet, TOPOLOGY, now)
        assert not retarget(fleet, TOPOLOGY, conditions, now)
    conditions.observe(fleet, TOPOLOGY, 4.0)
    assert [one.action for one in retarget(fleet, TOPOLOGY, conditions, 4.0)] == [Action.RETURN]


def test_a_device_that_its_operator_took_from_its_own_class_is_left_where_it_is() -> None:
    assert not after(FleetSnapshot((device("a", serves=("cpu.night",)),), work=waiting(day=9.0)))
    assert not after(FleetSnapshot((device("a", serves=()),), work=waiting(day=9.0, night=9.0)))


def test_a_retargeted_worker_is_not_commanded_again_until_its_heartbeat_can_show_it() -> None:
    fleet, conditions = FleetSnapshot((device("a"), device("b")), work=waiting(night=9.0)), RetargetConditions()
    conditions.note(after(fleet, conditions=conditions), PATIENCE)
    conditions.observe(fleet, TOPOLOGY, PATIENCE + SETTLED / 2)
    assert not retarget(fleet, TOPOLOGY, conditions, PATIENCE + SETTLED / 2)
    conditions.observe(fleet, TOPOLOGY, PATIENCE + SETTLED)
    assert retarget(fleet, TOPOLOGY, conditions, PATIENCE + SETTLED)


def test_a_fleet_with_retargeting_off_retargets_nothing() -> None:
    rules = msgspec.structs.replace(TOPOLOGY.rebalance, retarget=None)
    unlent = msgspec.structs.replace(TOPOLOGY, rebalance=rules)
    fleet = FleetSnapshot((device("a"),), work=waiting(night=9.0))
    conditions = RetargetConditions()
    conditions.observe(fleet, unlent, 0.0)
    assert not retarget(fleet, unlent, conditions, 1e6)


def test_a_helper_runs_all_that_the_class_has_or_what_its_own_devices_do() -> None:
    echo = device("a", runtimes=("echo",))
    assert not after(FleetSnapshot((echo,), work=waiting(night=9.0)))
    assert after(FleetSnapshot((echo, device("n", "cpu.night", runtimes=("echo",))), work=waiting(night=99.0)))
    better = device("n", "cpu.night", runtimes=("echo",), instruction_sets=("amx_int8",))
    assert not after(FleetSnapshot((echo, better), work=waiting(night=99.0)))


@pytest.mark.cases("own, other, facts, reason")
def test_a_device_serves_only_classes_that_it_is_fit_for(
    own: str, other: str, facts: dict[str, Any], reason: str | None
) -> None:
    unfit = unfit_for(other, device("a", own, **facts), TOPOLOGY)
    assert unfit is None if reason is None else unfit is not None and unfit.startswith(reason)


def test_an_emulated_device_that_serves_a_class_of_its_real_kind_is_not_emulated_there() -> None:
    assert is_emulated("cpu", TOPOLOGY.hardware["gpu.live"])
    assert not is_emulated("cpu", TOPOLOGY.hardware["cpu.day"])


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
    topology = data.draw(st.just(TOPOLOGY) | topologies())
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
                assert now - at >= PATIENCE
            last[one.worker, one.hardware_class] = one.action, now
            serves[one.worker] = (own, one.hardware_class) if one.action is Action.LEND else (own,)
