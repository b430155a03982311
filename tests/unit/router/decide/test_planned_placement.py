"""Placement by a plan: it uses the preferred class, leaves it only where that helps, and is read as it was stored."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given

from api.routing.explanation import Explanation, explain, unpack_snapshot
from router.decide.basis import pack_snapshot
from router.decide.candidates import build_table
from router.decide.classify import Constraints, Needs
from router.decide.placement import Placement, choose, tolerance, weigh
from router.decide.plan import (
    NO_PLAN,
    PLAN_AT_MOST,
    STALE,
    Cell,
    ClassPlan,
    Density,
    Depth,
    Handover,
    Plan,
    follow,
    preferred_class,
)
from router.decide.snapshot import Backlog, FleetSnapshot
from tasks.document import Size
from tasks.models.model import Parameter, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import DeviceKind, Service, Topology
from taxiway.errors import OverloadedError, TaxiwayError
from tests.builders import a_class, a_device, a_text_model
from tests.unit.router.decide.choosing import place
from tests.unit.strategies import Situation, plans, situations

HARDWARE: dict[str, Any] = {"runtimes": ("onnx",), "max_batch": 8, "horizon": 10.0}
TOPOLOGY = Topology(
    hardware={
        "cheap": a_class(0.05, labels=("lab",), **HARDWARE),
        "dear": a_class(2.0, device="cuda", labels=("lab",), **HARDWARE),
        "other": a_class(1.0, device="tpu", **HARDWARE),
    },
    service={"live": Service(deadline=0.25), "standard": Service(deadline=5.0), "bulk": Service()},
    default_service="standard",
)
PROFILES: dict[DeviceKind, Profile] = {
    "cpu": Profile(0.05, 0.001),
    "cuda": Profile(0.01, 0.0001),
    "tpu": Profile(0.02, 0.001),
}
ONNX = Variant(runtime="onnx", memory=Size(2**20), profiles=PROFILES)
MODEL = a_text_model(onnx=ONNX)
HELD: dict[str, Any] = {"runtimes": ("onnx",), "warm": ("sentiment:1/onnx",)}
DEVICES = (
    a_device(worker="c", hardware_class="cheap", kind="cpu", **HELD),
    a_device(worker="d", hardware_class="dear", kind="cuda", **HELD),
    a_device(worker="o", hardware_class="other", kind="tpu", **HELD),
)
LIVE = Needs(deadline=0.25, level=0, rows=1, size=1, constraints=Constraints("live"))
BULK = Needs(deadline=None, level=2, rows=1, size=1, constraints=Constraints("bulk"))
BUSY = {"dear": (3.0, 0.0, 0.0, 0.0)}


def a_cell(*classes: str, service: str = "live", model: str = "sentiment:1", **fields: Any) -> Cell:
    return Cell(model=model, service=service, classes=classes, **fields)


def a_plan(*cells: Cell, used: tuple[str, ...] = ("cheap", "dear")) -> Plan:
    classes = {name: ClassPlan(rule=Density(), devices=1) for name in used}
    return Plan(number=7, made=0.0, cells=cells, classes=classes)


def a_fleet(plan: Plan | None, **fields: Any) -> FleetSnapshot:
    return FleetSnapshot(**({"devices": DEVICES, "plan": plan, "now": 10.0} | fields))


def placed(fleet: FleetSnapshot, needs: Needs = LIVE, topology: Topology = TOPOLOGY) -> Placement:
    return place(MODEL, needs, topology, fleet)


def explained(fleet: FleetSnapshot, needs: Needs = LIVE) -> Explanation:
    table = build_table(MODEL, needs.constraints, TOPOLOGY, fleet, ProfileBook())
    return explain(table, needs, Backlog(table.classes, fleet.work).seconds, seed=0)


def test_a_request_goes_to_its_preferred_class_though_another_is_cheaper() -> None:
    assert placed(a_fleet(None)).candidate.hardware_class == "cheap"
    placement = placed(a_fleet(a_plan(a_cell("dear", "cheap"))))
    assert placement.candidate.hardware_class == "dear"
    assert placement.reason.startswith("planned: cheapest that meets 0.25 s")


def test_each_service_and_locality_has_a_cell_of_its_own() -> None:
    plan = a_plan(a_cell("dear"), a_cell("cheap", service="bulk"), a_cell("cheap", locality="lab"))
    assert placed(a_fleet(plan), BULK).candidate.hardware_class == "cheap"
    private = replace(LIVE, constraints=Constraints("live", "lab"))
    assert placed(a_fleet(plan), private).candidate.hardware_class == "cheap"
    standard = replace(LIVE, deadline=5.0, constraints=Constraints("standard"))
    assert placed(a_fleet(plan), standard).reason.startswith("no plan: plan 7 does not cover these requests; ")


def test_a_request_leaves_the_plan_only_if_it_is_surely_late_there_and_surely_in_time_elsewhere() -> None:
    plan = a_plan(a_cell("dear"), a_cell("cheap", service="standard"))
    left = placed(a_fleet(plan, work=BUSY))
    assert left.candidate.hardware_class == "cheap"
    assert left.reason.startswith("left the plan: dear would take 3.01 s; ")
    both = BUSY | {"cheap": (0.2, 0.0, 0.0, 0.0)}
    unused = a_plan(a_cell("dear"), used=("dear",))
    for never in (a_fleet(plan, work=both), a_fleet(unused, work=BUSY)):
        with pytest.raises(OverloadedError):
            placed(never)


def test_where_the_plan_expects_many_late_what_would_be_late_is_refused_at_once() -> None:
    late = {"dear": (0.5, 0.0, 0.0, 0.0)}
    enough, scarce = (a_plan(a_cell("dear", in_time=share), used=("dear",)) for share in (1.0, 0.4))
    assert placed(a_fleet(enough, work=late)).reason.startswith("planned: earliest")
    with pytest.raises(OverloadedError) as refusal:
        placed(a_fleet(scarce, work=late))
    assert refusal.value.retry_after == pytest.approx(0.26, abs=0.01)
    refused = explained(a_fleet(scarce, work=late)).reason
    assert "expected in 0.51 s at the earliest (dear/onnx)" in refused
    assert refused.endswith("; the plan has 40% of these in time")
    assert placed(a_fleet(scarce)).reason.startswith("planned, 40% in time: cheapest that meets 0.25 s")
    nearly = a_plan(a_cell("dear", in_time=0.97))
    assert placed(a_fleet(nearly)).reason.startswith("planned, 97% in time: cheapest that meets 0.25 s")


def test_a_request_does_not_hold_up_what_is_planned_elsewhere() -> None:
    planned_there = a_cell("cheap", model="other:1", deadline=0.2)
    with pytest.raises(OverloadedError):
        placed(a_fleet(a_plan(a_cell("dear"), planned_there), work=BUSY))
    patient = a_cell("cheap", model="other:1", deadline=0.3)
    assert placed(a_fleet(a_plan(a_cell("dear"), patient), work=BUSY)).candidate.hardware_class == "cheap"


def test_a_request_does_not_leave_the_plan_for_a_class_that_is_full_by_it() -> None:
    for full in (a_cell("cheap", service="standard", in_time=0.6), a_cell("cheap", model="other:1", in_time=0.6)):
        with pytest.raises(OverloadedError):
            placed(a_fleet(a_plan(a_cell("dear"), full), work=BUSY))
        room = msgspec.structs.replace(full, in_time=0.95)
        assert placed(a_fleet(a_plan(a_cell("dear"), room), work=BUSY)).candidate.hardware_class == "cheap"


GENERATING = msgspec.structs.replace(
    MODEL, pipeline="generation", parameters={"max_tokens": Parameter(type="integer", default=8)}, expected_size=1
)


def test_a_generation_waits_for_a_device_of_its_class_rather_than_slow_down_what_is_planned_elsewhere() -> None:
    beside = a_cell("cheap", model="other:1", deadline=100.0)

    def class_of(model: Any, *, ahead: float, used: tuple[str, ...] = ("cheap", "dear")) -> str:
        plan = a_plan(a_cell("dear"), beside, used=used)
        work = {"cheap": (ahead, 0.0, 0.0, 0.0)}
        fleet = a_fleet(plan, devices=DEVICES[:1], startable=("dear",), work=work)
        return place(model, LIVE, TOPOLOGY, fleet).candidate.hardware_class

    assert class_of(GENERATING, ahead=0.0) == "cheap", "surely in time"
    assert class_of(GENERATING, ahead=0.15) == "dear", "likely in time, behind others"
    assert class_of(MODEL, ahead=0.15) == "cheap", "it holds up nothing but for its own run"
    assert class_of(GENERATING, ahead=0.15, used=("dear",)) == "cheap", "nothing is planned there"


def test_an_explanation_names_the_preferred_class() -> None:
    def why_not(fleet: FleetSnapshot) -> list[str | None]:
        return [row.why_not for row in sorted(explained(fleet).considered, key=lambda row: row.hardware_class)]

    prefers, late = "not planned: the plan prefers dear", "not planned: would be late: expected in 3.01 s"
    assert why_not(a_fleet(a_plan(a_cell("dear")))) == [prefers, None, prefers]
    left = a_fleet(a_plan(a_cell("dear"), a_cell("cheap", service="standard")), work=BUSY)
    assert why_not(left) == [None, late, prefers]


def test_a_choice_outside_the_plan_is_not_reused_as_work_grows() -> None:
    plan = a_plan(a_cell("dear"), a_cell("cheap", service="standard"))
    fleet = a_fleet(plan, work=BUSY)
    table = build_table(MODEL, LIVE.constraints, TOPOLOGY, fleet, ProfileBook())
    assert tolerance(weigh(table, LIVE, Backlog(table.classes, fleet.work).seconds)) == 0.0


def test_a_stored_snapshot_has_its_plan() -> None:
    fleet = a_fleet(a_plan(a_cell("dear", handover=Handover(former="cheap", devices=1, latest=1.0))))
    assert unpack_snapshot(pack_snapshot(fleet)) == fleet


@given(situation=situations(), plan=plans())
def test_every_planned_choice_is_explained_alike(situation: Situation, plan: Plan) -> None:
    model, needs, topology, fleet = situation
    table = build_table(model, needs.constraints, topology, replace(fleet, plan=plan), ProfileBook())
    work = Backlog(table.classes, fleet.work).seconds
    found = explain(table, needs, work, seed=1)
    try:
        placement = choose(table, needs, work, seed=1)
    except TaxiwayError as error:
        assert found.reason == error.message
        return
    assert found.reason == placement.reason
    assert all(row.chosen != bool(row.why_not) for row in found.considered)


MOVING = Cell(
    model="m", service="live", classes=("new", "old"), handover=Handover(former="old", devices=2, latest=100.0)
)


def test_a_cell_that_moves_stays_until_its_new_class_serves() -> None:
    assert preferred_class(MOVING, {"old": 3, "new": 1}, 50.0) == "old"
    assert preferred_class(MOVING, {"old": 3, "new": 2}, 50.0) == "new"
    assert preferred_class(MOVING, {"old": 3}, 100.5) == "new"


def test_a_plan_crosses_the_store_unchanged_and_becomes_stale() -> None:
    classes = {"new": ClassPlan(rule=Density(target=0.8), devices=2), "old": ClassPlan(rule=Depth(jobs=4), devices=0)}
    plan = Plan(number=3, made=50.0, cells=(MOVING,), classes=classes, score=1.5)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
    assert plan.cell("m", "live") == MOVING
    assert plan.cell("m", "bulk") is None
    assert not plan.stale(50.0 + STALE)
    assert plan.stale(51.0 + STALE)


NO_RULE = b'{"number":1,"made":0,"cells":[],"classes":{"a":{"devices":1,"rule":{"type":"depth","jobs":0}}}}'
STORED = msgspec.json.encode(Plan(number=3, made=50.0, cells=(MOVING,), classes={}))


def test_a_stored_plan_is_followed_until_it_is_stale() -> None:
    followed = follow(STORED, 60.0)
    assert followed.plan is not None
    assert followed.plan.number == 3
    again = follow(STORED, 51.0 + STALE, followed)
    assert (again.plan, again.stored) == (None, followed.plan)
    assert again.why == "plan 3 is stale (older than 600 s)"
    assert follow(b"", 60.0, followed) == NO_PLAN


@pytest.mark.parametrize(
    "raw", [b"{", b"{}", b"x" * (PLAN_AT_MOST + 1), STORED.replace(b'["new","old"]', b"[]"), NO_RULE]
)
def test_a_plan_that_cannot_be_read_is_not_followed(raw: bytes) -> None:
    followed = follow(raw, 60.0)
    assert followed.plan is None
    assert followed.why.startswith("the stored plan cannot be read: ")
    assert follow(raw, 61.0, followed).why == followed.why
