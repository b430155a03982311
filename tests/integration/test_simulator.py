"""`python -m simulator simulate`, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
FLEET = TREE / "simulator" / "fleets" / "azure-mixed.yaml"
KEYS = ["policy", "requests", "attainment", "cost_usd", "p50", "p99", "goodput", "moves", "utilisation"]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulator", "simulate", *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=120)


def test_a_comparison_prints_one_object_a_policy_and_draws_a_page_without_network(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    spec = "poisson:rate=4,duration=60,seed=1"
    told = simulate("--trace", spec, "--fleet", str(FLEET), "--compare", "--json", "--plot", str(page))
    assert (told.returncode, told.stderr) == (0, "")
    objects = [json.loads(line) for line in told.stdout.splitlines()]
    assert all(list(found) == KEYS for found in objects)
    assert all(list(found["attainment"]) == ["live", "standard", "bulk"] for found in objects)
    assert {"taxiway", "static", "clairvoyant-edf", "lp-bound"} <= {found["policy"] for found in objects}
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "http" not in text
    assert all(found["policy"] in text for found in objects)


def test_one_policy_is_shown_as_a_table() -> None:
    told = simulate("--trace", "flash:rate=2,duration=60,at=20,length=10", "--fleet", str(FLEET), "--policy", "static")
    assert told.returncode == 0
    assert "static" in told.stdout
    assert "taxiway" not in told.stdout


@pytest.mark.parametrize(
    ("trace", "fleet", "words"),
    [
        ("poisson:rate=x", str(FLEET), "expected rate as a number"),
        ("no-such-file.csv", str(FLEET), "no-such-file.csv: expected a readable CSV"),
        ("poisson:rate=1,duration=9", "no-such-fleet.yaml", "no-such-fleet.yaml: document: expected a readable file"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint_and_exit_code_2(trace: str, fleet: str, words: str) -> None:
    told = simulate("--trace", trace, "--fleet", fleet)
    assert told.returncode == 2
    assert words in told.stderr
    assert "hint: " in told.stderr
    assert (told.stdout, "Traceback" in told.stderr) == ("", False)


def test_an_unwritable_plot_is_said_with_a_hint() -> None:
    told = simulate("--trace", "poisson:rate=1,duration=9", "--fleet", str(FLEET), "--plot", "/no/such/folder/out.html")
    assert told.returncode == 2
    assert "hint: " in told.stderr
