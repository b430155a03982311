from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from router.decide.candidates import build_table
from router.decide.classify import Constraints, Needs
from router.decide.explain import (
    Considered,
    Explanation,
    basis_text,
    explain,
    explain_record,
    pack_snapshot,
    read_basis,
    unpack_snapshot,
)
from router.decide.placement import choose, seed_of
from router.decide.snapshot import Backlog, FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import DeviceFacts
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import HardwareClass, Price, Service, Topology
from taxiway.errors import TaxiwayError
from tests.builders import a_device, a_text_model
from tests.unit.router.decide.choosing import place
from tests.unit.strategies import situations

Situation = tuple[Model, Needs, Topology, FleetSnapshot]
BOOK = ProfileBook()


def explained(situation: Situation, seed: int = 0) -> Explanation:
    model, needs, topology, fleet = situation
    table = build_table(model, needs.constraints, topology, fleet, BOOK)
    return explain(table, needs, Backlog(table.classes, {} if fleet.stale else fleet.work).seconds, seed=seed)


@given(situation=situations(), more=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.floats(0.001, 9))))
def test_what_is_kept_gives_the_same_decision_again(situation: Situation, more: list[tuple[int, int, float]]) -> None:
    model, needs, topology, fleet = situation
    table = build_table(model, needs.constraints, topology, fleet, BOOK)
    backlog = Backlog(table.classes, fleet.work)
    for row, level, work in more:
        backlog.add(table.classes[row % len(table.classes)], level, work)
    try:
        placement = choose(table, needs, backlog.seconds, seed=seed_of("j1"))
    except TaxiwayError:
        assume(False)
        raise
    basis = read_basis(basis_text(placement.needs, "r1", table.classes, backlog.seconds))
    kept = unpack_snapshot(pack_snapshot(fleet))
    assert basis is not None
    assert kept is not None

    again = explain_record(model, basis, topology, kept, BOOK, seed=seed_of("j1"))

    chosen = placement.candidate
    bound = (None, None) if placement.held else (chosen.hardware_class, chosen.variant_name)
    assert (again.hardware_class, again.variant, again.held) == (*bound, placement.held)
    assert (again.level, again.reason) == (placement.level, placement.reason)


@given(situation=situations(), stale=st.booleans())
def test_every_class_and_variant_is_considered_or_refused_with_a_reason(situation: Situation, stale: bool) -> None:
    model, needs, topology, fleet = situation
    table = explained((model, needs, topology, replace(fleet, stale=stale)))

    considered = [(c.hardware_class, c.variant) for c in table.considered]
    refused = [(r.hardware_class, r.variant) for r in table.refused]
    assert sorted(considered + refused) == sorted((h, v) for h in topology.hardware for v in model.variants)
    assert all(r.reason for r in table.refused)
    assert all(c.chosen != bool(c.why_not) for c in table.considered)


@given(situation=situations())
def test_a_table_has_the_choice_or_the_error_of_placing(situation: Situation) -> None:
    table = explained(situation)
    chosen = [(c.hardware_class, c.variant) for c in table.considered if c.chosen]
    try:
        placement = place(*situation)
    except TaxiwayError as error:
        assert (table.error, table.reason, chosen) == (error.code, error.message, [])
    else:
        candidate = placement.candidate
        assert chosen == ([] if placement.held else [(candidate.hardware_class, candidate.variant_name)])
        assert (table.error, table.reason) == (None, placement.reason)


@given(situation=situations())
def test_a_finish_is_the_sum_of_its_parts(situation: Situation) -> None:
    for row in explained(situation).considered:
        assert abs(row.finish - (row.transfer + row.wait + row.load + row.run)) < 1e-5
        assert row.at_most >= 0


def test_a_basis_of_another_release_is_none() -> None:
    assert read_basis("") is None
    assert read_basis("[1]") is None
    assert read_basis("{") is None
    assert unpack_snapshot(b"nothing") is None


HARDWARE: dict[str, Any] = {"runtimes": ("onnx",), "max_batch": 8, "max_wait": 0.0, "horizon": 10.0}
TOPOLOGY = Topology(
    hardware={
        "cpu.batch": HardwareClass(device="cpu", price=Price(usd_per_hour=0.05), **HARDWARE),
        "gpu.realtime": HardwareClass(device="cuda", price=Price(usd_per_hour=0.7), reserve_for="live", **HARDWARE),
        "tpu.bulk": HardwareClass(device="tpu", price=Price(usd_per_hour=1.2), **HARDWARE),
    },
    service={"standard": Service(deadline=5.0), "live": Service(deadline=0.25)},
    default_service="standard",
)
ONNX = Variant(
    runtime="onnx",
    memory=Size(2**20),
    profiles={
        "cpu": Profile(base=0.1, slope=0.0, load=1.0),
        "cuda": Profile(base=0.01, slope=0.0, load=1.0),
        "tpu": Profile(base=0.02, slope=0.0, load=1.0),
    },
)
MODEL = a_text_model(onnx=ONNX)


def device(hardware_class: str) -> DeviceFacts:
    kind = TOPOLOGY.hardware[hardware_class].device
    return a_device(hardware_class, kind=kind, runtimes=("onnx",), warm=("sentiment:1/onnx",))


FLEET = FleetSnapshot(devices=(device("cpu.batch"), device("gpu.realtime")))


def rows_of(fleet: FleetSnapshot = FLEET, **terms: Any) -> dict[str, Considered]:
    fields: dict[str, Any] = {"deadline": 5.0, "level": 1, "rows": 1, "size": 1.0, **terms}
    return {row.hardware_class: row for row in explained((MODEL, Needs(**fields), TOPOLOGY, fleet)).considered}


def test_one_that_costs_more_is_explained_as_more_expensive() -> None:
    rows = rows_of()

    assert rows["cpu.batch"].chosen
    assert str(rows["gpu.realtime"].why_not).startswith("more expensive: ")


def test_a_cheaper_one_that_would_be_late_is_explained_as_late() -> None:
    busy = replace(FLEET, work={"cpu.batch": (0.0, 60.0, 0.0, 0.0)})
    rows = rows_of(busy, constraints=Constraints(service="live"))

    assert rows["gpu.realtime"].chosen
    assert str(rows["cpu.batch"].why_not).startswith("would be late: expected in 60.1 s")


def test_one_that_is_in_time_only_if_all_goes_well_is_explained_as_not_sure() -> None:
    rows = rows_of(deadline=0.15, constraints=Constraints(service="live"))

    assert rows["gpu.realtime"].chosen
    assert str(rows["cpu.batch"].why_not).startswith("might be late: at most 0.3 s")


def test_a_reserved_class_that_is_busy_is_explained_as_reserved() -> None:
    busy = replace(FLEET, work={"gpu.realtime": (4.0, 0.0, 0.0, 0.0)})

    assert str(rows_of(busy)["gpu.realtime"].why_not).startswith("reserved for live")


def test_one_past_the_budget_is_explained_as_past_it() -> None:
    cost = rows_of()["cpu.batch"].cost

    assert str(rows_of(budget=cost * 1.01)["gpu.realtime"].why_not).startswith("over budget")


def test_where_none_is_in_time_the_others_are_explained_as_later() -> None:
    rows = rows_of(deadline=0.001, constraints=Constraints(service="live"))

    assert rows["gpu.realtime"].chosen
    assert rows["cpu.batch"].why_not == "later: expected in 0.1 s"


def test_a_class_without_a_device_is_refused() -> None:
    table = explained((MODEL, Needs(deadline=5.0, level=1, rows=1, size=1.0), TOPOLOGY, FLEET))

    refused = [(r.hardware_class, r.reason) for r in table.refused]
    assert refused == [("tpu.bulk", "no device of the class is live")]


def test_a_warning_stands_at_the_candidate_whose_profile_it_is_about() -> None:
    assert "model.yaml's default" in str(rows_of()["cpu.batch"].warning)


def test_a_thousand_devices_take_little_to_keep() -> None:
    one = device("cpu.batch")
    fleet = FleetSnapshot(devices=tuple(msgspec.structs.replace(one, worker=f"cpu.batch.{n}") for n in range(1000)))

    assert len(pack_snapshot(fleet)) < 20_000
