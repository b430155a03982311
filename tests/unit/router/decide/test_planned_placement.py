"""Placement by a plan, and what is shown of any decision: why it was made, and when its job may be done."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from api.jobs import time_left, time_to_end
from api.operators.view import SILENT, silent_for
from api.routing.explanation import Explanation, explain, explain_record, unpack_snapshot
from router.decide.basis import basis_text, pack_snapshot, read_basis
from router.decide.candidates import build_table
from router.decide.classify import Constraints, Needs
from router.decide.placement import Placement, choose, seed_of, tolerance, weigh
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
from tasks.heartbeat import DeviceFacts
from tasks.models.model import Parameter, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import DeviceKind, Service, Topology
from taxiway.contract.job import JobRecord, JobState
from taxiway.errors import OverloadedError, TaxiwayError
from tests.builders import a_class, a_device, a_text_model
from tests.unit.router.decide.choosing import place, work_in
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
    return explanation_of((MODEL, needs, TOPOLOGY, fleet))


def test_each_service_and_locality_has_a_cell_of_its_own() -> None:
    plan = a_plan(a_cell("dear"), a_cell("cheap", service="bulk"), a_cell("cheap", locality="lab"))
    assert placed(a_fleet(plan), BULK).candidate.hardware_class == "cheap"
    private = replace(LIVE, constraints=Constraints("live", "lab"))
    assert placed(a_fleet(plan), private).candidate.hardware_class == "cheap"
    standard = replace(LIVE, deadline=5.0, constraints=Constraints("standard"))
    assert placed(a_fleet(plan), standard).reason.startswith("no plan: plan 7 does not cover these requests; ")


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


def test_a_guess_binds_only_what_is_in_time_by_it() -> None:
    planned_there = a_cell("cheap", model="other:1", deadline=0.2)
    guess = msgspec.structs.replace(a_plan(a_cell("dear"), planned_there), guessed=True)
    assert placed(a_fleet(guess)).reason.startswith("planned: ")
    late = placed(a_fleet(guess, work=BUSY))
    assert (late.candidate.hardware_class, late.reason.partition(",")[0]) == ("cheap", "no plan: a guess")


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


def test_a_choice_outside_the_plan_is_not_reused_as_work_grows() -> None:
    plan = a_plan(a_cell("dear"), a_cell("cheap", service="standard"))
    fleet = a_fleet(plan, work=BUSY)
    table = build_table(MODEL, LIVE.constraints, TOPOLOGY, fleet, ProfileBook())
    assert tolerance(weigh(table, LIVE, Backlog(table.classes, fleet.work).seconds)) == 0.0


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


BOOK = ProfileBook()


def explanation_of(situation: Situation, seed: int = 0) -> Explanation:
    model, needs, topology, fleet = situation
    table = build_table(model, needs.constraints, topology, fleet, BOOK)
    return explain(table, needs, work_in(fleet, table), seed=seed)


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


@given(situation=situations(), plan=st.none() | plans())
def test_a_table_has_the_choice_of_placing_and_its_figures(situation: Situation, plan: Plan | None) -> None:
    situation = (*situation[:3], replace(situation[3], plan=plan))
    table = explanation_of(situation)
    chosen = [(c.hardware_class, c.variant) for c in table.considered if c.chosen]
    try:
        placement = place(*situation)
    except TaxiwayError as error:
        assert (table.error, table.reason, chosen) == (error.code, error.message, [])
    else:
        candidate = placement.candidate
        assert chosen == ([] if placement.held else [(candidate.hardware_class, candidate.variant_name)])
        assert (table.error, table.reason) == (None, placement.reason)
    for row in table.considered:
        assert abs(row.finish - (row.transfer + row.wait + row.load + row.run)) < 1e-5
        assert row.at_most >= 0
    assert table.error or all(row.chosen != bool(row.why_not) for row in table.considered)


def test_a_basis_of_another_release_is_none() -> None:
    assert read_basis("") is None
    assert read_basis("[1]") is None
    assert read_basis("{") is None
    assert unpack_snapshot(b"nothing") is None


CLASS: dict[str, Any] = {"runtimes": ("onnx",), "max_batch": 8, "horizon": 10.0}
RESERVING = Topology(
    hardware={
        "cpu.batch": a_class(0.05, **CLASS),
        "gpu.realtime": a_class(0.7, device="cuda", reserve_for="live", **CLASS),
        "tpu.bulk": a_class(1.2, device="tpu", **CLASS),
    },
    service={"standard": Service(deadline=5.0), "live": Service(deadline=0.25)},
    default_service="standard",
)
RUNS: dict[DeviceKind, float] = {"cpu": 0.1, "cuda": 0.01, "tpu": 0.02}
SHOWN = Variant(
    runtime="onnx",
    memory=Size(2**20),
    profiles={kind: Profile(base=run, slope=0.0, load=1.0) for kind, run in RUNS.items()},
)
SHOWN_MODEL = a_text_model(onnx=SHOWN)


def device(hardware_class: str) -> DeviceFacts:
    kind = RESERVING.hardware[hardware_class].device
    return a_device(hardware_class, kind=kind, runtimes=("onnx",), warm=("sentiment:1/onnx",))


FLEET = FleetSnapshot(devices=(device("cpu.batch"), device("gpu.realtime")))
OF_LIVE = Constraints(service="live")
CPU, GPU = "cpu.batch", "gpu.realtime"


@pytest.mark.cases("work, terms, chosen, passed_over, why")
def test_what_was_passed_over_is_explained(
    work: dict[str, tuple[float, ...]], terms: dict[str, Any], chosen: str, passed_over: str, why: str
) -> None:
    needs = Needs(**({"deadline": 5.0, "level": 1, "rows": 1, "size": 1.0} | terms))
    table = explanation_of((SHOWN_MODEL, needs, RESERVING, replace(FLEET, work=work)))
    rows = {row.hardware_class: row for row in table.considered}
    assert rows[chosen].chosen
    assert str(rows[passed_over].why_not).startswith(why)
    assert "model.yaml's default" in str(rows[CPU].warning)
    assert [(r["hardware_class"], r["reason"]) for r in table.refused] == [
        ("tpu.bulk", "no device of the class is live")
    ]


QUEUED = JobRecord(id="j", state=JobState.QUEUED, hardware_class="cpu.batch", level=1)


def fleet_of(*ages: float, work: tuple[float, ...] = (0.0, 0.0)) -> FleetSnapshot:
    return FleetSnapshot(devices=tuple(map(running, range(len(ages)), ages)), work={"cpu.batch": work})


def running(number: int, batch_age: float) -> DeviceFacts:
    return a_device(worker=f"cpu.batch.cpu-{number}@h", device=f"cpu:{number}", batch_age=batch_age)


@given(work=st.floats(0, 1e6), ran=st.floats(0, 1e6))
def test_what_runs_is_never_expected_to_be_done_already(work: float, ran: float) -> None:
    assert time_left(work, ran) > 0
    assert time_left(5.0, 2.0) == 3.0
    assert time_left(5.0, 60.0) == pytest.approx(6.0), "longer than expected: a tenth more"


@pytest.mark.parametrize(
    ("now", "own", "seconds"),
    [
        (fleet_of(0.0, 0.0, work=(4.0, 6.0, 100.0)), 2.0, 5.0),  # the work before it, and its own once
        (fleet_of(20.0, 40.0), 0.5, 2.5),  # behind runs without end: longer, the longer they run
        (fleet_of(0.0, 40.0), 0.5, 0.5),
        (fleet_of(), 2.0, None),  # no device serves the class
    ],
)
def test_a_waiting_job_ends_after_what_is_before_it(now: FleetSnapshot, own: float, seconds: float | None) -> None:
    found = time_to_end(now, QUEUED, own)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_device_without_a_heartbeat_for_long_is_silent() -> None:
    devices = fleet_of(0.0, 0.0).devices
    received = {devices[0].worker: 100.0, devices[1].worker: 100.0 - SILENT - 0.5}
    assert silent_for(devices, received, now=100.2) == {devices[1].worker: pytest.approx(SILENT + 0.7)}
