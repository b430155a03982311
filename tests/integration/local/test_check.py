"""`taxiway check` and what `taxiway up` does of it, as an operator runs them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tasks.topology import load_topology
from tests.command_line import program
from tests.graphs import SCALE_SPECS, VAD_SPECS, scale_graph, vad_graph, write_model
from tests.working import QUEUES


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """The variables of a fleet of a class that runs graphs, whose models folder is empty."""
    (tmp_path / "models").mkdir()
    (tmp_path / "queues.yaml").write_text(
        QUEUES.replace("echo]", "echo, onnx]").replace("warm: [echo, slab]", "warm: []")
    )
    return {"TAXIWAY_MODELS": str(tmp_path / "models"), "TAXIWAY_QUEUES": str(tmp_path / "queues.yaml")}


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {verdict["subject"]: verdict for verdict in json.loads(done.stdout)["verdicts"]}


def test_a_run_answers_an_example_of_each_sound_model_and_says_why_others_do_not(settings: dict[str, Any]) -> None:
    models = Path(settings["TAXIWAY_MODELS"])
    write_model(models, "scale", scale_graph(2.0), **SCALE_SPECS, examples=[[1.0, 2.0]])
    write_model(models, "vad", vad_graph(), **VAD_SPECS)
    write_model(models, "failing", scale_graph(2.0), **SCALE_SPECS, examples=[[1.0, 2.0, 3.0]])
    wrong = {**SCALE_SPECS, "inputs": [{"name": "z", "datatype": "FP32", "shape": [-1, 2]}]}
    write_model(models, "wrong", scale_graph(2.0), **wrong, examples=[[1.0, 2.0]])
    done = program("taxiway", "check", "--run", "--json", **settings)
    assert done.returncode == 1
    found = verdicts(done)
    assert found["scale:1/onnx"]["level"] == "ok"
    assert "its example was answered in" in found["scale:1/onnx"]["text"]
    assert (found["vad:1/onnx"]["level"], "no examples" in found["vad:1/onnx"]["text"]) == ("warning", True)
    assert found["failing:1/onnx"]["level"] == "error"
    assert "expected shape [-1, 2]" in found["failing:1/onnx"]["text"]
    assert found["wrong:1/onnx"]["level"] == "error"
    assert "Required inputs (['x']) are missing" in found["wrong:1/onnx"]["text"]


def test_what_show_prints_is_the_same_queues_yaml_with_every_default(settings: dict[str, Any], tmp_path: Path) -> None:
    shown = program("taxiway", "check", "--show", **settings)
    (tmp_path / "shown.yaml").write_text(shown.stdout)

    again = program("taxiway", "check", "--show", **{**settings, "TAXIWAY_QUEUES": str(tmp_path / "shown.yaml")})

    assert (shown.returncode, again.stdout) == (0, shown.stdout)
    assert load_topology(tmp_path / "shown.yaml") == load_topology(Path(settings["TAXIWAY_QUEUES"]))
    assert "payload: 16MiB" in shown.stdout


def test_show_says_what_is_wrong_with_an_invalid_queues_yaml(settings: dict[str, Any]) -> None:
    Path(settings["TAXIWAY_QUEUES"]).write_text("hardware: 3")

    done = program("taxiway", "check", "--show", **settings)

    assert (done.returncode, "hardware: expected" in done.stdout) == (1, True)
