"""What is known of a fleet, and what arrived, as a replay takes them."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from router.decide.snapshot import FleetSnapshot
from simulator.own_fleet.known import ReplayError, StatusError, known_fleet, read_status, replayable, stands_for, under
from simulator.traces import arrivals_of, make_trace, read_arrivals
from tasks.topology import Planning, Service
from tests.unit.simulator.own_fleet import ECHO, TOPOLOGY, a_folder, seen

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


def test_what_devices_learned_is_in_the_replay_and_a_class_has_its_warm_models_loaded(models: Path) -> None:
    topology = msgspec.structs.replace(TOPOLOGY, hardware={"cpu": msgspec.structs.replace(ECHO, warm=("echo",))})
    arrivals = under(arrivals_of(make_trace([{"arrival": 0, "model": "echo", "size": 1}])), topology, topology)
    usual = replayable(arrivals, known_fleet(topology, models, seen(1))).workload.fleet
    slow = replayable(arrivals, known_fleet(topology, models, seen(1, pace={"echo:1/echo": 3.0}))).workload.fleet
    (before,), (after,) = usual.timings["echo:1"], slow.timings["echo:1"]
    assert before is not None
    assert after == before.slower(3.0)
    assert usual.classes["cpu"].warm == ("echo:1",)


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
