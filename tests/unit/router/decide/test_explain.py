"""What is shown of a decision: why it was made, and when its job may be done."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from api.jobs import time_left, time_to_end
from api.operators.view import SILENT, silent_for
from api.routing.explanation import Explanation, explain, explain_record, unpack_snapshot
from router.decide.basis import basis_text, pack_snapshot, read_basis
from router.decide.candidates import build_table
from router.decide.classify import Constraints, Needs
from router.decide.placement import choose, seed_of
from router.decide.snapshot import Backlog, FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import DeviceFacts
from tasks.models.model import Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import DeviceKind, Service, Topology
from taxiway.contract.job import JobRecord, JobState
from taxiway.errors import TaxiwayError
from tests.builders import a_class, a_device, a_text_model
from tests.unit.router.decide.choosing import place
from tests.unit.strategies import Situation, situations

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


@given(situation=situations())
def test_a_table_has_the_choice_of_placing_and_each_finish_is_its_parts(situation: Situation) -> None:
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
    for row in table.considered:
        assert abs(row.finish - (row.transfer + row.wait + row.load + row.run)) < 1e-5
        assert row.at_most >= 0


def test_a_basis_of_another_release_is_none() -> None:
    assert read_basis("") is None
    assert read_basis("[1]") is None
    assert read_basis("{") is None
    assert unpack_snapshot(b"nothing") is None


CLASS: dict[str, Any] = {"runtimes": ("onnx",), "max_batch": 8, "horizon": 10.0}
TOPOLOGY = Topology(
    hardware={
        "cpu.batch": a_class(0.05, **CLASS),
        "gpu.realtime": a_class(0.7, device="cuda", reserve_for="live", **CLASS),
        "tpu.bulk": a_class(1.2, device="tpu", **CLASS),
    },
    service={"standard": Service(deadline=5.0), "live": Service(deadline=0.25)},
    default_service="standard",
)
RUNS: dict[DeviceKind, float] = {"cpu": 0.1, "cuda": 0.01, "tpu": 0.02}
ONNX = Variant(
    runtime="onnx",
    memory=Size(2**20),
    profiles={kind: Profile(base=run, slope=0.0, load=1.0) for kind, run in RUNS.items()},
)
MODEL = a_text_model(onnx=ONNX)


def device(hardware_class: str) -> DeviceFacts:
    kind = TOPOLOGY.hardware[hardware_class].device
    return a_device(hardware_class, kind=kind, runtimes=("onnx",), warm=("sentiment:1/onnx",))


FLEET = FleetSnapshot(devices=(device("cpu.batch"), device("gpu.realtime")))
LIVE = Constraints(service="live")
CPU, GPU = "cpu.batch", "gpu.realtime"


@pytest.mark.parametrize(
    ("work", "terms", "chosen", "passed_over", "why"),
    [
        ({}, {}, CPU, GPU, "more expensive: "),
        ({CPU: (0.0, 60.0, 0.0, 0.0)}, {"constraints": LIVE}, GPU, CPU, "would be late: expected in 60.1 s"),
        ({}, {"deadline": 0.15, "constraints": LIVE}, GPU, CPU, "might be late: at most 0.3 s"),
        ({GPU: (4.0, 0.0, 0.0, 0.0)}, {}, CPU, GPU, "reserved for live"),
        ({}, {"budget": 1.01 * 0.1 * 0.05 / 3600}, CPU, GPU, "over budget"),
        ({}, {"deadline": 0.001, "constraints": LIVE}, GPU, CPU, "later: expected in 0.1 s"),
    ],
)
def test_what_was_passed_over_is_explained(
    work: dict[str, tuple[float, ...]], terms: dict[str, Any], chosen: str, passed_over: str, why: str
) -> None:
    needs = Needs(**({"deadline": 5.0, "level": 1, "rows": 1, "size": 1.0} | terms))
    table = explained((MODEL, needs, TOPOLOGY, replace(FLEET, work=work)))
    rows = {row.hardware_class: row for row in table.considered}
    assert rows[chosen].chosen
    assert str(rows[passed_over].why_not).startswith(why)
    assert "model.yaml's default" in str(rows[CPU].warning)
    assert [(r.hardware_class, r.reason) for r in table.refused] == [("tpu.bulk", "no device of the class is live")]


QUEUED = JobRecord(id="j", state=JobState.QUEUED, hardware_class="cpu.batch", level=1)


def fleet(*ages: float, work: tuple[float, ...] = (0.0, 0.0)) -> FleetSnapshot:
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
        (fleet(0.0, 0.0, work=(4.0, 6.0, 100.0)), 2.0, 5.0),  # the work before it, and its own once
        (fleet(20.0, 40.0), 0.5, 2.5),  # behind runs without end: longer, the longer they run
        (fleet(0.0, 40.0), 0.5, 0.5),
        (fleet(), 2.0, None),  # no running serves the class
    ],
)
def test_a_waiting_job_ends_after_what_is_before_it(now: FleetSnapshot, own: float, seconds: float | None) -> None:
    found = time_to_end(now, QUEUED, own)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_device_without_a_heartbeat_for_long_is_silent() -> None:
    devices = fleet(0.0, 0.0).devices
    received = {devices[0].worker: 100.0, devices[1].worker: 100.0 - SILENT - 0.5}
    assert silent_for(devices, received, now=100.2) == {devices[1].worker: pytest.approx(SILENT + 0.7)}
