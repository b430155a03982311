"""What a machine starts: its plan, its workers, and fleets at several sites."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from local.artefacts import for_runtimes, runtimes_of
from local.plan import StartPlanError, WorkerPlan, plan_fleet
from local.sites import ScriptedLine, ScriptError, options_of, parse_command, parse_script, plan_sites
from local.supervisor import ended_with, exit_of
from local.torch_choice import brings_cuda
from tasks.machine import Machine
from tasks.settings import TREE
from tasks.topology import TopologyError, load_topology, parse_topology

TOPOLOGY = load_topology(TREE / "queues.yaml")
LAPTOP = Machine(
    cores=4,
    memory=8 * 2**30,
    memory_free=4 * 2**30,
    instruction_sets=("avx2",),
    cuda=(),
    tpu_chips=0,
    runtimes={"onnx": "1.22", "jax": "0.6"},
)
WORKSTATION = replace(LAPTOP, cuda=("L4", "L4"), runtimes={**LAPTOP.runtimes, "torch": "2.7"})


def test_each_cuda_device_gets_a_worker_of_its_own() -> None:
    workers = plan_fleet(TOPOLOGY, WORKSTATION, counts={"cpu.batch": 0, "cpu.llama": 0}).workers
    assert workers == tuple(WorkerPlan("gpu.realtime", f"cuda:{n}", emulated=False) for n in range(2))
    undriven = plan_fleet(TOPOLOGY, replace(WORKSTATION, runtimes=LAPTOP.runtimes))
    assert "torch, which drives it, is not installed" in undriven.left_out["gpu.realtime"]
    with pytest.raises(StartPlanError, match="at most one worker per device"):
        plan_fleet(TOPOLOGY, WORKSTATION, counts={"gpu.realtime": 3})


def test_an_emulated_class_is_marked_so_on_its_command_line() -> None:
    plan = plan_fleet(TOPOLOGY, LAPTOP, emulate=["gpu.realtime", "tpu.bulk"], counts={"cpu.batch": 1, "cpu.llama": 0})
    assert [w.name for w in plan.workers] == ["cpu.batch.cpu-0", "gpu.realtime.cuda-0", "tpu.bulk.tpu-0"]
    assert ["--emulate" in w.command() for w in plan.workers] == [False, True, True]
    assert not plan.left_out


@pytest.mark.cases("asked, expected")
def test_a_plan_that_makes_no_sense_is_refused(asked: dict[str, object], expected: str) -> None:
    with pytest.raises(StartPlanError, match=expected):
        plan_fleet(TOPOLOGY, LAPTOP, **asked)  # type: ignore[arg-type]  # one of two keywords


def test_the_last_line_of_a_log_is_shown_in_words(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(
        '{"time": "…", "event": "loaded"}\n'
        '{"event": "worker thread failed", "error": "Traceback …:\\n  File …\\nValueError: no such key"}\n'
        '{"ready": "worker", "worker": "cpu.batch.cpu-0@host"}\n'
    )
    assert exit_of(70, log).last_line == "worker thread failed: ValueError: no such key"
    log.write_text("Illegal instruction\n\n")
    assert exit_of(-4, log).last_line == "Illegal instruction"


def test_only_runtimes_that_some_started_class_uses_are_fetched_for() -> None:
    assert runtimes_of(TOPOLOGY, ["tpu.bulk"], {"onnx", "jax", "torch"}) == {"jax"}
    assert for_runtimes([], ["onnx"]) == []


@pytest.mark.cases("version, requirements, expected")
def test_torch_is_known_to_bring_cuda_by_its_version_and_requirements(
    version: str, requirements: list[str], expected: bool
) -> None:
    assert brings_cuda(version, requirements) is expected


@pytest.mark.cases("said, status, expected")
def test_why_a_detached_fleet_failed_is_said_with_its_code(
    said: str, status: int, expected: tuple[str, str, int]
) -> None:
    error = ended_with(said, status)
    assert (str(error), error.hint, error.code) == tuple(expected)


EXAMPLE = TREE / "examples" / "sites"
SITES = ("cloud", "edge", "lab")


def test_a_folder_of_sites_stands_for_all_of_them() -> None:
    assert plan_sites([EXAMPLE]) == plan_sites([EXAMPLE / name for name in SITES])
    assert {name: plan.peers for name, plan in plan_sites([EXAMPLE]).items()} == {
        "cloud": (),
        "edge": ("cloud", "lab"),
        "lab": (),
    }


def test_a_site_that_is_not_started_keeps_its_name_in_the_file() -> None:
    plans = plan_sites([EXAMPLE / "edge", EXAMPLE / "cloud"])
    text = plans["edge"].with_lines({"cloud": "http://127.0.0.1:7"})
    assert '"http://lab"' in text
    assert parse_topology(text).hardware["cloud"].endpoint.url == "http://127.0.0.1:7"  # type: ignore[union-attr]


def test_an_error_names_the_site_whose_queues_yaml_is_wrong(tmp_path: Path) -> None:
    for site, text in (("one", (TREE / "queues.yaml").read_text()), ("two", "hardware: {}")):
        (tmp_path / site).mkdir()
        (tmp_path / site / "queues.yaml").write_text(text)
    with pytest.raises(TopologyError, match=re.escape(f"{tmp_path}/two/queues.yaml: ")):
        plan_sites([tmp_path])


@pytest.mark.cases("text")
def test_a_command_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ScriptError, match="expected"):
        parse_command(text, SITES)


def test_a_command_for_one_site_is_for_all_its_lines_and_one_for_two_for_that_between_them() -> None:
    lines = [ScriptedLine("edge", "cloud"), ScriptedLine("edge", "lab"), ScriptedLine("lab", "cloud")]
    parse_command("delay cloud 0.04", SITES).apply(lines)
    parse_command("rate lab edge 1e6", SITES).apply(lines)
    assert [line.delay for line in lines] == [0.04, 0.0, 0.04]
    assert [line.rate < 1e9 for line in lines] == [False, True, False]


def test_a_script_is_in_the_order_of_its_times_and_names_the_line_that_is_wrong() -> None:
    script = "# a cut\n9.5 restore cloud\n0 delay cloud 0.04  # each way\n\n3 cut cloud\n"
    assert [(at, command.verb) for at, command in parse_script(script, SITES)] == [
        (0.0, "delay"),
        (3.0, "cut"),
        (9.5, "restore"),
    ]
    with pytest.raises(ScriptError, match="line 2: expected seconds and a command, got 'soon cut cloud'"):
        parse_script("0 cut lab\nsoon cut cloud", SITES)
    assert parse_script((EXAMPLE / "lines").read_text(), SITES)


def test_each_class_of_a_site_gets_one_worker_and_a_device_that_is_absent_is_emulated() -> None:
    topology = parse_topology((EXAMPLE / "cloud" / "queues.yaml").read_text())
    options = options_of(topology, LAPTOP, (), {}, fetching=True)
    assert options == ["--emulate", "gpu.realtime", "--workers", "gpu.realtime=1"]
    planned = plan_fleet(topology, LAPTOP, emulate=["gpu.realtime"], counts={"gpu.realtime": 1})
    assert {worker.hardware_class for worker in planned.workers} == {"gpu.realtime", "cpu.llama"}
