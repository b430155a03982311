"""`python -m simulator simulate`, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from router.decide.plan import parse_plan

TREE = Path(__file__).parents[3]
FLEET = TREE / "simulator" / "fleets" / "azure-mixed.yaml"
KEYS = ["policy", "requests", "attainment", "cost_usd", "score", "p50", "p99", "goodput", "moves", "utilisation"]
MORE = ["live_by_model", "p99_by_service", "starts_usd", "idle_usd", "refused", "usd_by_class"]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulator", "simulate", *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=120)


def test_a_comparison_prints_one_object_a_policy_and_draws_a_page_without_network(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    spec = "poisson:rate=4,duration=60,seed=1"
    shown = simulate("--trace", spec, "--fleet", str(FLEET), "--compare", "--json", "--plot", str(page))
    assert (shown.returncode, shown.stderr) == (0, "")
    objects = [json.loads(line) for line in shown.stdout.splitlines()]
    assert all(list(found) == KEYS + MORE for found in objects)
    assert all(list(found["attainment"]) == ["live", "standard", "bulk"] for found in objects)
    assert {"taxiway", "static", "clairvoyant-edf", "lp-bound"} <= {found["policy"] for found in objects}
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "http" not in text
    assert all(found["policy"] in text for found in objects)


def test_one_policy_is_shown_as_a_table() -> None:
    shown = simulate("--trace", "flash:rate=2,duration=60,at=20,length=10", "--fleet", str(FLEET), "--policy", "static")
    assert shown.returncode == 0
    assert "static" in shown.stdout
    assert "taxiway" not in shown.stdout


def test_a_trial_needs_no_files() -> None:
    shown = simulate("--trial", "edge", "--policy", "static", "--load", "0.1", "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    found = json.loads(shown.stdout)
    assert set(found["live_by_model"]) == {"sentiment", "sentiment.p", "image", "image.p"}
    assert found["score"] >= found["cost_usd"]


def test_a_trial_and_a_trace_are_alternatives() -> None:
    for given in (["--trial", "edge", "--fleet", str(FLEET)], ["--fleet", str(FLEET)], []):
        shown = simulate(*given)
        assert shown.returncode == 2
        assert "give either --trial, or --trace and --fleet" in shown.stderr


@pytest.mark.parametrize(
    ("trace", "fleet", "words"),
    [
        ("poisson:rate=x", str(FLEET), "expected rate as a number"),
        ("no-such-file.csv", str(FLEET), "no-such-file.csv: expected a readable CSV"),
        ("poisson:rate=1,duration=9", "no-such-fleet.yaml", "no-such-fleet.yaml: document: expected a readable file"),
    ],
)
def test_wrong_usage_is_an_error_with_a_hint_and_exit_code_2(trace: str, fleet: str, words: str) -> None:
    shown = simulate("--trace", trace, "--fleet", fleet)
    assert shown.returncode == 2
    assert words in shown.stderr
    assert "hint: " in shown.stderr
    assert (shown.stdout, "Traceback" in shown.stderr) == ("", False)


def test_an_unwritable_plot_is_an_error_with_a_hint_and_loses_no_figures() -> None:
    shown = simulate(
        "--trace", "poisson:rate=1,duration=9", "--fleet", str(FLEET), "--plot", "/no/such/folder/out.html"
    )
    assert shown.returncode == 2
    assert "error: /no/such/folder/out.html: no such file or directory\nhint: " in shown.stderr
    assert "taxiway" in shown.stdout


EDGE = TREE / "simulator" / "fleets" / "trial-edge.yaml"
HISTORY = """arrival,model,size,deadline,priority,tenant,output,service
0.000000,image,1,5,,,0,live
0.500000,sentiment,1,30,,,0,standard
9.000000,image.p,2,5,,,0,live
"""


def diff_config(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulator", "diff-config", *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def changed(tmp_path: Path) -> list[str]:
    """An exported history, and the fleet of the trial edge with an edge that costs twice as much."""
    (tmp_path / "day.csv").write_text(HISTORY)
    (tmp_path / "new.yaml").write_text(
        EDGE.read_text(encoding="utf-8").replace("usd_per_hour: 0.1}", "usd_per_hour: 0.2}")
    )
    return [str(tmp_path / "new.yaml"), "--fleet", str(EDGE), "--history", str(tmp_path / "day.csv")]


def test_a_configuration_is_compared_with_another_on_a_history(changed: list[str], tmp_path: Path) -> None:
    told = diff_config(*changed, "--json", "--plot", str(tmp_path / "out.html"))
    assert (told.returncode, told.stderr) == (0, "")
    found = json.loads(told.stdout)
    assert found["old"]["requests"] == found["new"]["requests"] == 3
    dollars = found["difference"]["usd_by_class"]
    assert dollars["edge.cpu"] == pytest.approx(found["old"]["usd_by_class"]["edge.cpu"], rel=1e-6)
    assert found["difference"]["attainment"] == {"live": 0.0, "standard": 0.0, "bulk": None}
    assert ">new</text>" in (tmp_path / "out.html").read_text(encoding="utf-8")

    shown = diff_config(*changed)
    assert shown.returncode == 0
    assert [name in shown.stdout for name in ("live in time", "score", "cost of edge.cpu")] == [True] * 3


def test_a_wrong_comparison_is_an_error_with_a_hint(changed: list[str], tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.yaml"
    lacking.write_text(EDGE.read_text(encoding="utf-8").replace("image.p:", "other.p:"))
    nowhere = ["--history", "2026-11-27", "--url", "redis://127.0.0.1:1/0"]
    for arguments, code, words in (
        ([str(lacking), *changed[1:]], 2, "classes that run every model of the history, got ['image.p']"),
        ([*changed[:3], "--history", "no-such.csv"], 2, "no-such.csv: expected a readable CSV"),
        ([*changed[:3], *nowhere], 4, "`taxiway up` starts a fleet"),
    ):
        told = diff_config(*arguments)
        assert (told.returncode, told.stdout) == (code, "")
        assert words in told.stderr
        assert "hint: " in told.stderr
        assert "Traceback" not in told.stderr


PRICES = """instance,accelerator,accelerator_count,usd_per_hour,usd_per_hour_spot
c3-standard-44,,0,2.217688,0.5434
g2-standard-4,L4,1,0.706832,0.397336
g2-standard-24,L4,2,2.000833,1.124816
g2-standard-48,L4,4,4.001665,2.249632
g2-standard-96,L4,8,8.00333,4.499264
a2-highgpu-1g,A100-40GB,1,3.673385,1.92802
a2-highgpu-2g,A100-40GB,2,7.34677,3.85604
a2-highgpu-4g,A100-40GB,4,14.69354,7.71208
a2-highgpu-8g,A100-40GB,8,29.38708,15.42416
tpu-v5litepod-1,TPU-v5e,1,1.2,0.24493
tpu-v5litepod-4,TPU-v5e,4,4.8,0.9797
tpu-v5litepod-8,TPU-v5e,8,9.6,1.95941
"""
SLO = ("--slo", "live=0.9", "--slo", "bulk=0.9")


def plan(folder: Path, prices: str, *arguments: str, fleet: Path = FLEET) -> subprocess.CompletedProcess[str]:
    file = folder / "prices.csv"
    file.write_text(prices, encoding="utf-8")
    command = [sys.executable, "-m", "simulator", "plan", "--prices", str(file), "--fleet", str(fleet), *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=120)


def test_a_plan_prints_one_object_or_tables_and_says_what_is_wrong_with_exit_code_2(tmp_path: Path) -> None:
    given = ("--rate", "chat=2,duration=120", *SLO)
    output = plan(tmp_path, PRICES, *given, "--json")
    assert (output.returncode, output.stderr) == (0, "")
    answer = json.loads(output.stdout)
    assert answer["slo"] == {"live": 0.9, "bulk": 0.9}
    assert all(answer["plan"]["attainment"][name] >= 0.9 for name in answer["slo"])
    assert [row["load"] for row in answer["loads"]] == [0.5, 1.0, 1.5]
    assert answer["loads"][1]["usd_per_hour"] == answer["plan"]["usd_per_hour"]
    assert answer["fleet_plan"] is None

    shown = plan(tmp_path, PRICES, *given).stdout
    assert all(row["instance"] in shown for row in answer["plan"]["mix"])

    for prices, arguments, words in (
        (PRICES.replace("1.2,", "0,"), given, "line 11: usd_per_hour: expected a price above 0, got '0'"),
        (PRICES.replace("L4", "L5"), given, "classes.gpu.l4.accelerator: expected an accelerator of"),
        (PRICES, ("--rate", "chess=2", *SLO), "expected models that the fleet runs"),
        (PRICES, ("--trace", "poisson:rate=1", *given), "give either --trace or --rate"),
        (PRICES, ("--rate", "chat=2", "--slo", "live=2"), "a share above 0, at most 1, got live=2"),
        (PRICES, ("--rate", "chat=900,duration=60", *SLO), "the fleet has too few devices: gpu.a100 has at most 8"),
    ):
        output = plan(tmp_path, prices, *arguments)
        assert (output.returncode, output.stdout) == (2, "")
        assert words in output.stderr
        assert "Traceback" not in output.stderr


def test_a_plan_with_penalties_has_the_classes_and_rules_that_routers_would_follow(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET.read_text(encoding="utf-8") + "penalties: {live: 48, standard: 24, bulk: 12}\n")
    given = ("--rate", "chat=2,duration=20", *SLO)

    told = plan(tmp_path, PRICES, *given, "--json", fleet=fleet)

    assert (told.returncode, told.stderr) == (0, "")
    answer = json.loads(told.stdout)
    followed = parse_plan(json.dumps(answer["fleet_plan"]).encode())
    assert {(cell.model, cell.service) for cell in followed.cells} >= {("chat", "live"), ("chat", "bulk")}
    assert set(followed.classes) <= {row["hardware_class"] for row in answer["plan"]["mix"]}
    shown = plan(tmp_path, PRICES, *given, fleet=fleet).stdout
    assert "classes, best first" in shown
