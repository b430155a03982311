"""The fleet as it is and was, in the simulator: what was asked of it, played on its own and on other files."""

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from lab.rows import arrivals_of, make_trace
from router.decide.plan import Cell, ClassPlan, Density, Plan
from router.decide.snapshot import FleetSnapshot
from simulator.engine import OutcomeColumns, RunSummary, played
from simulator.fleet import SERVICES, Stepping
from simulator.own_fleet.difference import Comparison, FileReplay, compared, difference, difference_tables
from simulator.own_fleet.known import StatusError, known_fleet, read_status, replayable, stands_for, under
from simulator.policies.policy import able_classes
from simulator.policies.taxiway import POLICIES
from simulator.traces import read_arrivals
from simulator.tuning.real_fleet import (
    NODES,
    KnownFleet,
    Recorded,
    Shortage,
    billed,
    paces,
    recorded,
    shortages,
    spending,
    timely,
)
from simulator.tuning.twin import ClassState
from simulator.workload import Workload
from tasks.document import Size
from tasks.heartbeat import Allowed, EndpointFacts
from tasks.history import JOB, STATES, Arrivals
from tasks.models.catalogue import Catalogue
from tasks.models.model import Parameter, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import Planning, Price, Service, parse_topology
from taxiway.cli import CommandError
from tests import builders
from tests.builders import a_device, a_text_model
from tests.unit.simulator.own_fleet import TOPOLOGY, a_folder, seen
from workers.decide.endpoints import Bucket, EndpointRates

DAY = """arrival,model,size,deadline,priority,tenant,output,service,locality
0,echo,1,0.25,high,,0,live,
1,echo,1,0.1,high,,0,live,
2,echo,1,5,normal,,0,standard,
3,echo,1,,,,0,,lab
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_folder(tmp_path_factory)


def test_a_job_with_its_services_terms_follows_the_service_and_others_keep_their_own(tmp_path: Path) -> None:
    (tmp_path / "day.csv").write_text(DAY)
    day = read_arrivals(tmp_path / "day.csv", model="")
    services = {"live": Service(deadline=1.0, priority="low"), "standard": Service()}
    new = msgspec.structs.replace(TOPOLOGY, service=services)
    same, changed = under(day, TOPOLOGY, TOPOLOGY), under(day, TOPOLOGY, new)
    assert same.jobs["deadline"].tolist() == pytest.approx([0.25, 0.1, 5.0, 5.0])
    assert changed.jobs["deadline"].tolist()[:2] == pytest.approx([1.0, 0.1])
    assert all(map(math.isnan, changed.jobs["deadline"].tolist()[2:]))
    assert changed.jobs["priority"].tolist() == [2, 2, 1, 1]
    assert [same.names["service"][n] for n in same.jobs["service"]] == ["live", "live", "standard", "standard"]


def test_a_class_has_the_devices_that_run_or_as_many_as_an_autoscaler_may_start(models: Path) -> None:
    def counts(snapshot: FleetSnapshot, *new: str) -> tuple[int, int, int]:
        rows = [{"arrival": 0, "model": "echo", "size": 1}]
        arrivals = under(arrivals_of(make_trace(rows)), TOPOLOGY, TOPOLOGY)
        device = replayable(arrivals, known_fleet(TOPOLOGY, models, snapshot, new)).workload.fleet.classes["cpu"]
        return device.minimum, device.initial, device.count

    assert counts(seen(2)) == (2, 2, 2)
    assert counts(seen(2, startable=("cpu",))) == (0, 2, 16)
    assert counts(FleetSnapshot(), "cpu") == (0, 1, 16)
    with pytest.raises(CommandError, match="no class runs a model of echo for its service"):
        counts(FleetSnapshot())


def test_a_file_without_plans_is_replayed_without_them(models: Path) -> None:
    arrivals = under(arrivals_of(make_trace([{"arrival": 0, "model": "echo", "size": 1}])), TOPOLOGY, TOPOLOGY)
    planned = msgspec.structs.replace(TOPOLOGY, plan=Planning())
    assert not any(replayable(arrivals, known_fleet(TOPOLOGY, models, seen(1))).workload.fleet.penalties)
    assert all(replayable(arrivals, known_fleet(planned, models, seen(1))).workload.fleet.penalties)


def test_devices_are_read_from_the_output_of_taxiway_status(tmp_path: Path) -> None:
    devices = msgspec.to_builtins(seen(2, usd_per_hour=0.3).devices)
    status = {"classes": {"cpu": {"starts": True}, "gpu": {}}, "devices": devices, "more": 1}
    (tmp_path / "status.json").write_bytes(msgspec.json.encode(status))
    read = read_status(tmp_path / "status.json")
    assert (read.startable, [one.usd_per_hour for one in read.devices]) == (("cpu",), [0.3, 0.3])
    (tmp_path / "status.json").write_text("hardware: {}")
    with pytest.raises(StatusError, match="expected the output of `taxiway status --json`"):
        read_status(tmp_path / "status.json")


def test_the_services_that_one_of_the_simulators_stands_for_are_named() -> None:
    assert list(stands_for(TOPOLOGY)) == [("live", ["live"]), ("standard", ["standard"])]


ASKED = ("echo", "live")


def shown(found: Comparison) -> list[str]:
    text = StringIO()
    Console(file=text, width=120).print(*difference_tables(found), sep="\n")
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def play(workload: Workload, label: str) -> tuple[RunSummary, OutcomeColumns]:
    assert label.startswith(("old", "new"))
    return played("taxiway", workload, POLICIES["per-request"](workload, 0), seed=0)


def test_what_no_class_of_a_file_runs_is_not_in_time_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    known = known_fleet(TOPOLOGY, a_folder(tmp_path_factory), seen(1))
    rows = [{"arrival": n, "model": model, "size": 1} for n, model in enumerate(["echo", "gone", "echo"])]
    found = difference(arrivals_of(make_trace(rows), "standard"), known, known, play)
    assert [(one.model, one.requests, one.new) for one in found.attained] == [("echo", 2, 1.0), ("gone", 1, 0.0)]


def part(live: float, cost: float, requests: int = 10, name: str = "cpu") -> FileReplay:
    shares = {**dict.fromkeys(SERVICES), "live": live}
    summary = RunSummary(
        policy="a", requests=requests, attainment=shares, cost_usd=cost, score=cost, usd_by_class={name: cost}
    )
    return FileReplay(summary, {ASKED: requests}, {ASKED: round(live * requests)})


def test_the_table_has_signs_and_a_dash_for_what_is_absent() -> None:
    lines = shown(compared(part(0.9, 2.0), part(1.0, 1.0, name="gpu")))
    assert "echo live 10 90.0 % 100.0 % +10.0 points" in lines
    assert "cost $2.00 $1.00 -$1.00" in lines
    assert "cost of cpu $2.00 – -$2.00" in lines
    assert "cost of gpu – $1.00 +$1.00" in lines
    assert "cost $0.0123 $0.0122 -$0.0001" in shown(compared(part(1.0, 0.0123), part(1.0, 0.0122)))


MODEL = a_text_model(onnx=Variant(runtime="onnx", memory=Size(2**20), profiles={"cpu": Profile(0.05, 0.01)}))
REAL = parse_topology(builders.recorded("documents/twin.yaml"))
NAMES = {
    "model": ("sentiment:1", "gone:1"),
    "tenant": ("",),
    "service": ("web", "app", "nightly", "gone"),
    "locality": ("", "lab"),
    "hardware_class": ("",),
}
HERE = {"cloud": 2, "edge": 1, "spot": 1}


def a_known(startable: tuple[str, ...] = ("cloud", "edge", "spot"), **facts: Any) -> KnownFleet:
    devices = tuple(
        a_device(name, worker=f"{name}.{n}", runtimes=("onnx",), **facts) for name, n in HERE.items() for n in range(n)
    )
    return KnownFleet(REAL, Catalogue({MODEL.id: MODEL}), ProfileBook(), FleetSnapshot(devices, startable=startable))


def arrivals(*jobs: tuple[int, int, int, float]) -> Arrivals:
    """One job a second: model, service, locality (by their numbers), and deadline."""
    rows = np.zeros(len(jobs), JOB)
    for n, (model, service, locality, deadline) in enumerate(jobs):
        rows[n]["arrival"] = 1000.0 + n
        rows[n]["model"], rows[n]["service"], rows[n]["locality"] = model, service, locality
        rows[n]["deadline"], rows[n]["rows"], rows[n]["size"] = deadline, 2, 10
        rows[n]["state"] = STATES.index("succeeded")
    return Arrivals(NAMES, rows)


EVERY = arrivals((0, 0, 0, 0.5), (0, 1, 0, 0.25), (0, 1, 1, 0.3), (0, 2, 0, math.nan), (1, 0, 0, 0.5), (0, 3, 0, 1.0))


def found(known: KnownFleet | None = None, what: Arrivals = EVERY) -> Recorded:
    one = recorded(what, known or a_known(), 1010.0)
    assert one is not None
    return one


def test_arrivals_of_models_and_services_that_are_gone_are_left_out() -> None:
    one = found()
    assert one.workload.trace.models == ("sentiment:1", "sentiment:1 lab")
    assert one.workload.trace.service.tolist() == [0, 0, 0, 2]
    assert one.workload.trace.size.tolist() == [20] * 4
    assert one.span == 10.0
    until_the_last = recorded(EVERY, a_known(), 1000.0)
    assert until_the_last is not None and (until_the_last.span, type(until_the_last.span)) == (3.0, float)
    assert recorded(arrivals((1, 0, 0, 1.0)), a_known(), 1010.0) is None
    assert recorded(arrivals(), a_known(), 1010.0) is None


def test_the_twin_cannot_place_private_data_elsewhere_nor_firm_work_on_spot_capacity() -> None:
    one = found()
    able = able_classes(one.workload.fleet, one.workload.trace.models)
    assert able[0, 0] == [0, 1]
    assert able[0, 2] == [0, 1, 2]
    assert able[1, 0] == able[1, 2] == [1]


def test_a_class_costs_the_twin_what_its_devices_were_told_that_their_nodes_cost() -> None:
    listed, stated = (found(known).workload.fleet.classes for known in (None, a_known(usd_per_hour=0.4)))
    assert [3600 * device.usd_per_second for device in listed.values()] == pytest.approx([0.5, 1.0, 0.1])
    assert [3600 * device.usd_per_second for device in stated.values()] == pytest.approx([0.4] * 3)
    assert (spending(a_known()), spending(a_known(usd_per_hour=0.4))) == pytest.approx((2 * 0.5 + 1.0 + 0.1, 4 * 0.4))


def test_what_devices_learned_of_their_pace_is_in_the_timings() -> None:
    usual, slow = found(), found(a_known(pace={"sentiment:1/onnx": 3.0}))
    one = np.ones(1)
    for before, after in zip(*(each.workload.fleet.timings["sentiment:1"] for each in (usual, slow)), strict=True):
        assert before is not None
        assert after is not None
        assert after.answer(one, one, 1) == 3 * before.answer(one, one, 1)
    known = a_known(pace={"sentiment:1/onnx": 3.0})
    assert paces(known.snapshot, known.topology.hardware) == (3.0, 3.0, 3.0), "the mean of a class's devices"


def generating(profile: Profile, memory: int) -> Workload:
    generator = msgspec.structs.replace(
        a_text_model(onnx=Variant(runtime="onnx", memory=Size(memory), profiles={"cpu": profile})),
        pipeline="generation",
        parameters={"max_tokens": Parameter(type="integer")},
    )
    return found(replace(a_known(), catalogue=Catalogue({generator.id: generator}))).workload


def test_a_generation_that_takes_no_memory_here_is_placed() -> None:
    workload = generating(Profile(0.0, slope=1e-5, step=0.01), memory=0)
    assert played("taxiway", workload, POLICIES["taxiway"](workload, 0), seed=0)[0].requests == len(workload)


def test_a_generation_reads_its_prompt_in_one_step_and_steps_for_each_token_of_its_answer() -> None:
    profile = Profile(0.0, slope=1e-5, step=0.01)
    workload = generating(profile, memory=2**20)
    timing = workload.fleet.timings["sentiment:1"][0]
    assert isinstance(timing, Stepping)
    long, short = (float(timing.answer(np.array([prompt]), np.array([100.0]), 1)[0]) for prompt in (1000.0, 100.0))
    assert short == pytest.approx(profile.latency(1, 200), rel=0.05)
    assert long - short == pytest.approx(900 * profile.slope + 100 * 900 * timing.per_cached)
    context = float((workload.trace.size + workload.trace.output / 2).mean())
    assert timing.step(4, 4 * context) == pytest.approx(2 * profile.step + 4 * profile.slope)
    assert timing.cache * context == pytest.approx(2**20 * profile.slope / (2 * profile.step))


def test_answers_count_as_timely_by_their_deadline_and_refusals_do_not() -> None:
    some = arrivals((0, 0, 0, 0.5), (0, 0, 0, 0.5), (0, 2, 0, math.nan), (0, 1, 0, 0.5), (0, 3, 0, 0.5), (0, 0, 0, 0.5))
    some.jobs["seconds"] = 0.4, 0.6, 900.0, 0.1, 0.1, math.nan
    some.jobs["state"][3], some.jobs["state"][5] = STATES.index("refused"), STATES.index("running")
    assert timely(some, REAL) == [((0, 0), True), ((0, 0), False), ((0, 2), True), ((0, 0), False)]


def test_a_refused_request_counts_as_demand() -> None:
    some = arrivals((0, 1, 1, 0.25), (0, 0, 0, 0.5), (0, 0, 0, 0.5))
    some.jobs["state"][1] = STATES.index("refused")
    one = found(what=some)
    assert one.rows.tolist() == [0, 1, 2]
    assert 1 not in one.waiting
    assert ((0, 0), False) in timely(some, REAL)


def test_the_twin_begins_with_what_the_devices_have_loaded_and_what_endpoints_allow() -> None:
    allowed = EndpointFacts(state="closed", allowed=Allowed(requests=2.0, requests_left=30.0))
    cloud, edge, _ = found(a_known(warm=("sentiment:1/onnx", "other:1/onnx"), endpoint=allowed)).conditions
    assert [device.loaded for device in cloud.devices] == [frozenset({0, 1})] * 2
    assert edge.rates == EndpointRates(Bucket(120.0, 2.0, 30.0, 0.0))
    assert cloud.rates == EndpointRates(Bucket(240.0, 4.0, 60.0, 0.0))
    assert found().conditions[0].rates is None


def test_devices_that_a_plan_asked_for_start_yet_and_are_out_of_stock_when_they_do_not_come() -> None:
    plan = Plan(number=1, made=0.0, cells=(), classes={"edge": ClassPlan(rule=Density(), devices=3)})
    short: dict[str, Shortage] = {}

    def seen(now: float, work: float = 1.0) -> ClassState:
        nonlocal short
        known = a_known()
        known = replace(known, snapshot=replace(known.snapshot, now=now, work={"edge": (work,)}))
        short = shortages(short, plan, known)
        return found(replace(known, short=short)).conditions[1]

    start = REAL.hardware["edge"].scaling.start
    assert [device.starts_in for device in seen(1000.0).devices] == [0.0, start, start]
    assert [device.starts_in for device in seen(1002.0).devices] == [0.0, start - 2, start - 2]
    assert seen(1000.0 + start + NODES.stock_out).available == 1
    assert seen(1000.0 + start + NODES.stock_out + NODES.retry - 1, work=0.0).available == 1
    assert seen(1000.0 + start + NODES.stock_out + NODES.retry).available == 3
    assert len(seen(2000.0, work=0.0).devices) == 1, "in a pause nothing is started"


def test_what_endpoints_ask_for_tokens_counts_as_spent() -> None:
    price = Price(usd_per_million_input=1.0, usd_per_million_output=10.0, usd_per_request=0.5)
    cloud = msgspec.structs.replace(REAL.hardware["cloud"], price=price)
    topology = msgspec.structs.replace(REAL, hardware={**REAL.hardware, "cloud": cloud})
    some = arrivals((0, 0, 0, 0.5), (0, 0, 0, 0.5), (0, 0, 0, 0.5))
    some = replace(some, names={**NAMES, "hardware_class": ("edge", "cloud")})
    some.jobs["hardware_class"] = 0, 1, 1
    some.jobs["output"] = 100, 100, -1
    assert billed(some, topology) == pytest.approx(2 * 0.5 + 40e-6 + 200 * 10e-6)


def test_a_plan_for_the_twin_names_the_real_requests_and_is_read_back() -> None:
    one = found()
    twins = Plan(
        number=1,
        made=0.0,
        cells=(
            Cell(model="sentiment:1", service="live", classes=("cloud", "edge")),
            Cell(model="sentiment:1", service="bulk", classes=("spot",)),
            Cell(model="sentiment:1 lab", service="live", classes=("edge",)),
            Cell(model="sentiment:1 lab", service="bulk", classes=("edge",)),
        ),
        classes={name: ClassPlan(rule=Density(target=0.8), devices=1) for name in ("cloud", "edge", "spot")},
    )
    plan = one.translated(twins)
    assert [(cell.service, cell.locality, cell.classes[0], cell.deadline) for cell in plan.cells] == [
        ("web", None, "cloud", 0.5),
        ("app", None, "cloud", 0.25),
        ("nightly", None, "spot", None),
        ("app", "lab", "edge", np.float32(0.3)),
    ]
    again = one.assignment(plan)
    assert again is not None
    assert {cell: again.classes[cell] for cell in one.kinds} == {(0, 0): 0, (0, 2): 2, (1, 0): 1}
    assert again.rules[0] == Density(target=0.8)
    assert one.assignment(None) is None
    assert one.assignment(msgspec.structs.replace(plan, cells=())) is None
