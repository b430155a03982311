"""Models and workers on a real CUDA device. Everything here skips where there is none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import taxiway
from local.fleet import LocalFleet
from tasks.machine import look
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.settings import TREE, cache_directory
from tests.acceptance.running import start_fleet
from tests.acceptance.running import taxiway as command_line
from workers.port import Placed, Row, import_runtime, open_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.models]

CATALOGUE = load_catalogue(TREE / "models")
TEXTS = ("The landing was smooth.", "My bag never came, and nobody cared.", "Yes.", "A long way round the bay. " * 12)


@pytest.fixture(scope="module", autouse=True)
def torch_sees_a_device() -> None:
    """Skips without a device or torch, which is imported only then: it takes seconds."""
    if not look().cuda or not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no CUDA device here")


def answers(model: Model, name: str, device: str) -> list[Row]:
    """What a variant says of `TEXTS` on a device."""
    variant = model.variants[name]
    files = ArtefactStore(cache_directory(os.environ)).files(model, name)
    placed = Placed(name, variant.precision, variant.entry, files, device, folder=model.folder)
    runtime, pipeline = import_runtime(variant.runtime)(placed), open_pipeline(model, variant, placed)
    runtime.load()
    rows = pipeline.run(runtime, [pipeline.prepare({model.inputs[0].name: text}, {}) for text in TEXTS])
    runtime.unload()
    return rows


@pytest.mark.parametrize("name", [n for n, v in CATALOGUE.resolve("embed").variants.items() if v.runtime == "torch"])
def test_an_embedding_on_the_device_agrees_with_the_reference_on_the_cpu(name: str) -> None:
    model = CATALOGUE.resolve("embed")
    pairs = zip(answers(model, name, "cuda:0"), answers(model, model.reference, "cpu"), strict=True)
    least = min(float(np.dot(ours["embedding"], theirs["embedding"])) for ours, theirs in pairs)
    assert least >= {"torch-fp32": 0.9999, "torch-bf16": 0.999}[name]


@pytest.fixture(scope="module")
def gpu_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A fleet with a worker on the real device."""
    data = tmp_path_factory.mktemp("gpu-fleet")
    yield start_fleet(
        data, "--no-flower", "--workers", "cpu.batch=1", "--workers", "gpu.realtime=1", "--workers", "cpu.llama=0"
    )
    command_line("down", "--data", str(data))


def test_a_worker_on_the_device_is_not_emulated_and_reports_its_memory(gpu_fleet: LocalFleet) -> None:
    with taxiway.Client(gpu_fleet.http) as client:
        device = next(d for d in client.fleet()["devices"] if d["hardware_class"] == "gpu.realtime")
    assert (device["kind"], device["emulated"]) == ("cuda", False)
    assert device["memory_total"] > device["memory_free"] > 0


def test_profiles_are_measured_on_the_device(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taxiway", "profile", "--model", "embed", "--variant", "torch-fp32", "--quick"]
    command += ["--device", "cuda:0", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
