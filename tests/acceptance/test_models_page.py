"""The page on models, followed as it is printed, beside a router and a worker that run all the while."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from tasks.models.folder import load_catalogue
from tasks.models.model import parse_model
from tasks.settings import TREE, Settings
from tests.routing import eventually, router_process
from tests.working import QUEUES, worker_process, worker_settings

PAGE = (TREE / "docs" / "models.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def block(language: str, word: str) -> str:
    """The one block that begins with or says a word."""
    (found,) = [text for text in blocks(language) if word in text]
    return found


def run(command: list[str], folder: Path, fleet: Settings, url: str) -> str:
    environment = {**os.environ, **fleet.environment(), "TAXIWAY_URL": url, "PYTHONPATH": str(TREE)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_a_model_of_ones_own_is_served_by_a_fleet_that_runs(settings: Settings, tmp_path: Path) -> None:
    queues = QUEUES.replace("[python, echo]", "[python, echo, onnx]").replace("[echo, slab]", "[echo]")
    fleet = worker_settings(settings, tmp_path, queues)
    shutil.rmtree(fleet.models / "slab")  # one of its variants is there to fail
    with worker_process(fleet), router_process(fleet) as router:
        run([sys.executable, "-c", block("python", "onnx.save")], tmp_path, fleet, router.http)
        graph = fleet.models / "iris" / "iris.onnx"
        said = run(["sha256sum", "models/iris/iris.onnx"], tmp_path, fleet, router.http)
        digest = hashlib.sha256(graph.read_bytes()).hexdigest()
        assert said.startswith(digest)
        described = block("yaml", "name: iris").replace("HASH", digest)
        (fleet.models / "iris" / "model.yaml").write_text(described, encoding="utf-8")
        page = re.findall(r"^\$ taxiway (.*)$", block("console", "taxiway submit iris"), re.MULTILINE)
        check, submit = ([sys.executable, "-m", "taxiway", *shlex.split(line)] for line in page)
        checked = run(check, tmp_path, fleet, router.http)
        eventually(lambda: httpx.get(f"{router.http}/v2/models/iris").is_success)  # a router looks once a second
        answered = run([*submit, "--json"], tmp_path, fleet, router.http)
    assert "iris:1/onnx-fp32" in checked
    answer = json.loads(answered)
    first, second = answer["outputs"]["probabilities"]
    assert max(first) == first[0] > 0.9  # a setosa
    assert max(second) == second[2] > 0.9  # a virginica


def test_the_python_model_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(block("python", "def call(text"), scope)
    described = parse_model(block("yaml", "name: word-count"), "model.yaml")
    (example,) = described.examples
    answer = scope["call"](**example)
    assert answer == {"words": 4, "long-words": 2}
    assert set(answer) == {spec.name for spec in described.outputs}


def test_the_tensors_of_the_page_are_those_of_a_model(tmp_path: Path) -> None:
    fields = yaml.safe_load(block("yaml", "name: iris")) | yaml.safe_load(block("yaml", "batch_axis: null"))
    fields["artefacts"]["graph"] = {"kind": "https", "url": "https://models.example/vad.onnx", "sha256": "0" * 64}
    (tmp_path / "iris").mkdir()
    (tmp_path / "iris" / "model.yaml").write_text(yaml.safe_dump(fields))
    assert load_catalogue(tmp_path).serves("iris")
