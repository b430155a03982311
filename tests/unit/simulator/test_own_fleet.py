"""What is known of a fleet, and what arrived, as a replay takes them."""

import math
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lab.rows import make_trace
from router.decide.snapshot import FleetSnapshot
from simulator.engine import OutcomeColumns, RunSummary, played
from simulator.fleet import SERVICES
from simulator.own_fleet.difference import (
    Comparison,
    FileReplay,
    compared,
    difference,
    difference_tables,
    sample_line,
    sampled,
    windows_of,
)
from simulator.own_fleet.known import ReplayError, StatusError, known_fleet, read_status, replayable, stands_for, under
from simulator.policies.taxiway import POLICIES
from simulator.reports import table
from simulator.traces import arrivals_of, read_arrivals, synthetic_trace
from simulator.workload import Workload
from tasks.history import Arrivals
from tasks.topology import Planning, Service
from tests.unit.simulator.own_fleet import TOPOLOGY, a_folder, seen

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
    with pytest.raises(ReplayError, match="no class runs a model of echo for its service"):
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


DOLLARS = st.floats(0, 1e6)
ASKED = ("echo", "live")


@st.composite
def replays(draw: st.DrawFn) -> FileReplay:
    summary = RunSummary(
        policy="taxiway",
        requests=1,
        attainment={name: draw(st.one_of(st.none(), st.floats(0, 1))) for name in SERVICES},
        cost_usd=draw(DOLLARS),
        score=draw(DOLLARS),
        starts_usd=draw(DOLLARS),
        idle_usd=draw(DOLLARS),
        usd_by_class=draw(st.dictionaries(st.sampled_from(["cpu", "gpu", "tpu"]), DOLLARS)),
    )
    timely = draw(st.integers(0, 9))
    return FileReplay(summary, {ASKED: 9}, {ASKED: timely}, np.array([9, 0, 0]))


def shown(found: Comparison) -> list[str]:
    text = StringIO()
    Console(file=text, width=120).print(*difference_tables(found), sep="\n")
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def play(workload: Workload, label: str) -> tuple[RunSummary, OutcomeColumns]:
    assert label.startswith(("old", "new"))
    return played("taxiway", workload, POLICIES["per-request"](workload, 0), seed=0)


def echoes(rate: float = 4.0, duration: float = 60.0) -> Arrivals:
    spec = f"poisson:rate={rate},duration={duration},size=1,output=0,seed=1"
    return arrivals_of(synthetic_trace(spec, model="echo"), "live")


def test_what_no_class_of_a_file_runs_is_not_in_time_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    known = known_fleet(TOPOLOGY, a_folder(tmp_path_factory), seen(1))
    rows = [{"arrival": n, "model": model, "size": 1} for n, model in enumerate(["echo", "gone", "echo"])]
    found = difference(arrivals_of(make_trace(rows), "standard"), known, known, 0.0, play)
    assert [(one.model, one.requests, one.new) for one in found.attained] == [("echo", 2, 1.0), ("gone", 1, 0.0)]


@given(old=replays(), new=replays())
def test_a_difference_is_new_minus_old_and_survives_json(old: FileReplay, new: FileReplay) -> None:
    found = compared((old, new))
    before, after = old.summary, new.summary
    assert found.difference.cost_usd == after.cost_usd - before.cost_usd
    assert sum(found.difference.usd_by_class.values()) == pytest.approx(
        sum(after.usd_by_class.values()) - sum(before.usd_by_class.values()), abs=1e-6
    )
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
    assert not any("-$0.00 " in line or "-0.0 " in line for line in shown(found))


def part(live: float, cost: float, requests: int = 10, name: str = "cpu") -> FileReplay:
    shares = {**dict.fromkeys(SERVICES), "live": live}
    summary = RunSummary(
        policy="a", requests=requests, attainment=shares, cost_usd=cost, score=cost, usd_by_class={name: cost}
    )
    timely = round(live * requests)
    return FileReplay(summary, {ASKED: requests}, {ASKED: timely}, np.array([requests, 0, 0]))


def test_the_table_has_signs_and_a_dash_for_what_is_absent() -> None:
    lines = shown(compared((part(0.9, 2.0), part(1.0, 1.0, name="gpu"))))
    assert "echo live 10 90.0 % 100.0 % +10.0 points" in lines
    assert "cost $2.00 $1.00 -$1.00" in lines
    assert "cost of cpu $2.00 – -$2.00" in lines
    assert "cost of gpu – $1.00 +$1.00" in lines
    assert "cost $0.0123 $0.0122 -$0.0001" in shown(compared((part(1.0, 0.0123), part(1.0, 0.0122))))


@pytest.mark.parametrize("columns", [30, 60, 160])
def test_no_figure_is_cut_where_the_terminal_is_narrow(columns: int) -> None:
    shown = table("model", right=("cost", "p95"), first="policy")
    shown.add_row("taxiway", "sentiment:1", "$1234.56", "0.0236 s")
    console = Console(width=columns, record=True, file=StringIO())
    console.print(shown)
    text = console.export_text()
    assert "…" not in text
    assert sorted("".join(text.split())) == sorted("policymodelcostp95taxiwaysentiment:1$1234.560.0236s")


@given(count=st.integers(2, 9), each=st.floats(1, 6))
def test_windows_lie_apart_within_the_history(count: int, each: float) -> None:
    arrivals = echoes(rate=20.0)
    windows = windows_of(arrivals, count=count, each=each)
    assert len(windows) <= count
    assert all(np.ptp(window.jobs["arrival"]) <= each for window in windows)
    assert sum(map(len, windows)) == pytest.approx(len(arrivals) * count * each / 60, rel=0.5)


def test_windows_are_scaled_to_the_whole_and_shares_weigh_by_requests_and_what_does_not_differ_has_no_error() -> None:
    pairs = [(part(1.0, 2.0, 30), part(1.0, 1.0, 30)), (part(0.0, 2.0, 10), part(1.0, 1.0, 10))]
    found = sampled(pairs, count=4, each=10, of=400)  # two windows were empty
    assert (found.old.attainment["live"], found.new.attainment["live"]) == (0.75, 1.0)
    (share,) = found.attained
    assert (share.requests, share.old, share.new) == (400, 0.75, 1.0)
    assert (found.old.cost_usd, found.new.usd_by_class["cpu"]) == (40.0, 20.0)
    assert found.difference.cost_usd == -20.0
    assert found.sample is not None
    deviation = np.std([-1, -1, 0, 0], ddof=1)
    assert found.sample.error.cost_usd == pytest.approx(2 * np.sqrt(0.9) * 10 * np.sqrt(4) * deviation)
    assert "±" in shown(found)[1]
    assert sample_line(found.sample).startswith("4 windows of 10 s of 0.1 h were replayed")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
    alike = sampled([(part(1.0, 2.0), part(1.0, 3.0))] * 3, count=3, each=10, of=300)
    assert alike.sample is not None and alike.sample.error.cost_usd == pytest.approx(0)
    assert alike.difference.cost_usd == pytest.approx(30) and alike.attained[0].error == 0
