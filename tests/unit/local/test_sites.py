"""The sites of folders, and what is said to the lines between them."""

from pathlib import Path

import pytest

from local.plan import plan_fleet
from local.sites import ScriptedLine, ScriptError, options_of, parse_command, parse_script, plan_sites
from tasks.settings import TREE
from tasks.topology import parse_topology
from taxiway.cli import CommandError
from tests.unit.local.test_plan import LAPTOP

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


def test_a_folder_without_a_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="expected a folder with a queues"):
        plan_sites([tmp_path])


@pytest.mark.parametrize(
    "text",
    ["", "cut", "cut moon", "cut cloud lab edge", "delay cloud", "delay cloud -1", "rate cloud 0", "pause cloud"],
)
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
