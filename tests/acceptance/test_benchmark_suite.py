import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.settings import TREE

pytestmark = pytest.mark.slow


def test_the_suite_measures_a_fleet_at_both_interfaces_beside_the_limit(tmp_path: Path) -> None:
    chart = tmp_path / "chart.html"
    briefly = ["--only", "W1", "--peers", "", "--seconds", "0.3", "--rounds", "1", "--chart", str(chart)]

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", *briefly], cwd=TREE, capture_output=True, text=True, timeout=280
    )

    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    saturated = {line["contestant"]: line["median"] for line in lines if line.get("measure") == "saturated"}
    assert saturated.keys() == {"limit", "taxiway", "taxiway-http"}
    assert 0 < saturated["taxiway"] <= saturated["limit"] * 1.1
    assert any("ratio of taxiway saturated to the limit" in line["question"] for line in lines)
    assert "taxiway-http" in chart.read_text()
