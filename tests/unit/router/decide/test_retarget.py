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
from tests.builders import a_device, recorded
from tests.unit.strategies import topologies

TOPOLOGY = parse_topology(recorded("fleets/lending.yaml"))
TIMEOUT = 2.0


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
    conditions.observe(fleet, topology, TIMEOUT)
    return retarget(fleet, topology, conditions, TIMEOUT)


def starved(*live: DeviceFacts, **more: Any) -> FleetSnapshot:
    return FleetSnapshot(live, work=waiting(**({"night": 9.0} | more)))


ECHO = device("a", runtimes=("echo",))
OWN, OWN_ECHO = device("n", "cpu.night"), device("n", "cpu.night", runtimes=("echo",))
LENT = {
    "as many as serve its backlog within its horizon": (starved(*map(device, "abcde"), OWN, night=25.0), "ab"),
    "none within its horizon": (starved(device("a"), OWN), ""),
    "for what is held as well": (FleetSnapshot((device("a"),), held=waiting(night=1.0)), "a"),
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
    unlent = msgspec.structs.replace(TOPOLOGY, rebalance=msgspec.structs.replace(TOPOLOGY.rebalance, retarget=None))
    assert not after(fleet, unlent)


def test_a_lent_device_returns_at_once_when_its_own_class_has_work() -> None:
    fleet = starved(device("a", serves=("cpu.day", "cpu.night")), day=0.1)
    expected = Retarget("a", "cpu.night", Action.RETURN, "cpu.day has work of its own")
    assert retarget(fleet, TOPOLOGY, RetargetConditions(), 0.0) == [expected]


def test_a_lent_device_returns_once_nothing_has_waited_for_a_while() -> None:
    lent, conditions = device("a", serves=("cpu.day", "cpu.night")), RetargetConditions()
    for now, work in ((0.0, 0.0), (1.0, 0.1), (2.0, 0.0), (3.9, 0.0)):
        fleet = FleetSnapshot((lent,), work=waiting(night=work))
        conditions.observe(fleet, TOPOLOGY, now)
        assert not retarget(fleet, TOPOLOGY, conditions, now)
    conditions.observe(fleet, TOPOLOGY, 4.0)
    assert [one.action for one in retarget(fleet, TOPOLOGY, conditions, 4.0)] == [Action.RETURN]


def test_a_retargeted_worker_is_not_commanded_again_until_its_heartbeat_can_show_it() -> None:
    fleet, conditions = FleetSnapshot((device("a"), device("b")), work=waiting(night=9.0)), RetargetConditions()
    conditions.note(after(fleet, conditions=conditions), TIMEOUT)
    conditions.observe(fleet, TOPOLOGY, TIMEOUT + SETTLED / 2)
    assert not retarget(fleet, TOPOLOGY, conditions, TIMEOUT + SETTLED / 2)
    conditions.observe(fleet, TOPOLOGY, TIMEOUT + SETTLED)
    assert retarget(fleet, TOPOLOGY, conditions, TIMEOUT + SETTLED)


@pytest.mark.cases("own, other, facts, reason")
def test_a_device_serves_what_it_is_fit_for(own: str, other: str, facts: dict[str, Any], reason: str | None) -> None:
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
                assert now - at >= TIMEOUT
            last[one.worker, one.hardware_class] = one.action, now
            serves[one.worker] = (own, one.hardware_class) if one.action is Action.LEND else (own,)
