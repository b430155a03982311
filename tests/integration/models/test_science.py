"""The scientific examples: their figures, and that an interrupted run ends as one that was not."""

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import taxiway
from tasks.models.files import Code
from tasks.settings import TREE, Settings
from taxiway import Run
from taxiway.contract.keys import job_key, priority_list
from taxiway.contract.wire import decode_envelope, encode_envelope
from tests.narrowing import as_bytes
from tests.routing import eventually, router_process
from tests.stored import record_of
from tests.working import CLASS, QUEUES, Tower, worker_process, worker_settings

SCIENCE = TREE / "examples" / "science"
TPU = "tpu.bulk"
INPUTS = {"size": 32, "temperature": 2.1, "sweeps": 4000, "seed": 3}


class InterruptedError(Exception):
    """The run was cut."""


class CutRun(Run):
    """A run that is cut after its second checkpoint."""

    saved = 0

    def checkpoint(self, state: Any, *, portable: bool = True) -> bool:
        """Save a state, and end the run."""
        self.saved += super().checkpoint(state, portable=portable)
        if self.saved == 2:
            raise InterruptedError
        return True


def example(name: str) -> Callable[..., dict[str, Any]]:
    folder = TREE / "models" if name == "ising" else SCIENCE
    call: Callable[..., dict[str, Any]] = Code(f"{folder / name / name}.py:call").load()
    return call


def resumed(call: Callable[..., dict[str, Any]], **inputs: Any) -> dict[str, Any]:
    """The answer of a run that was cut, and went on from its checkpoint."""
    cut = CutRun()
    with pytest.raises(InterruptedError):
        call(**inputs, run=cut)
    return call(**inputs, run=Run(cut.restored))


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("warm: [echo, slab]", "warm: [echo, ising]"))
    (fleet.models / "ising").symlink_to(TREE / "models" / "ising")
    return fleet


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(SCIENCE)
    yield importlib.import_module("sweep")
    del sys.modules["sweep"]


@pytest.mark.parametrize("temperature", [1.6, 1.9])
def test_the_magnetisation_is_onsagers(temperature: float, sweep: Any) -> None:
    answer = example("ising")(size=32, temperature=temperature, sweeps=1000, seed=1, run=Run())
    assert answer["magnetisation"] == pytest.approx(sweep.exact(temperature), abs=0.01)


def test_an_interrupted_run_of_openmm_ends_with_the_same_bytes_and_argon_s_energy() -> None:
    pytest.importorskip("openmm")
    inputs = {"steps": 1200, "temperature": 94.4, "seed": 1}
    one, other = example("argon")(**inputs, run=Run()), resumed(example("argon"), **inputs)
    assert one["energy"] == other["energy"] == pytest.approx(-5.2 * 216, rel=0.03)
    assert np.array_equal(one["positions"], other["positions"])


def test_a_killed_worker_s_simulation_goes_on_elsewhere_and_ends_with_the_same_bytes(fleet: Settings) -> None:
    with Tower(fleet) as tower:
        job = tower.order("ising", INPUTS, variant="python")
        with worker_process(fleet) as first:
            eventually(lambda: bool(tower.state.hexists(job_key(job), "checkpoint")))
            first.process.kill()
        with worker_process(fleet, "--device", "cpu:1"):
            result = tower.result(job)
    assert result.outputs == example("ising")(**INPUTS, run=Run())
    assert result.report.checkpoints.startswith("resumed from a checkpoint")


def test_a_fit_finds_the_frequency_and_an_interrupted_one_ends_with_the_same_bytes() -> None:
    inputs = {"steps": 3000, "noise": 0.1, "seed": 1}
    answer = example("ringdown")(**inputs, run=Run())
    assert answer["frequency"] == pytest.approx(5.0, abs=0.01)
    assert resumed(example("ringdown"), **inputs) == answer


def test_a_fit_that_began_on_a_cpu_ends_on_a_tpu(settings: Settings, tmp_path: Path) -> None:
    queues = QUEUES.replace("warm: [echo, slab]", "warm: [ringdown]").replace("gpu.realtime", TPU)
    queues = queues.replace("device: cuda", "device: tpu").replace("runtimes: [echo]", "runtimes: [python]")
    fleet = worker_settings(settings, tmp_path, queues)
    (fleet.models / "ringdown").symlink_to(SCIENCE / "ringdown")
    inputs = {"steps": 80_000, "noise": 0.1, "seed": 1}
    with Tower(fleet) as tower:
        job = tower.order("ringdown", inputs, variants={CLASS: "python", TPU: "python"})
        with worker_process(fleet) as first:
            eventually(lambda: (seen := record_of(tower.state, job).progress) is not None and seen.fraction > 0.02)
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(60) == 0
        move(tower)
        with worker_process(fleet, "--class", TPU, "--emulate"):
            result = tower.result(job)
    assert (result.report.hardware_class, result.report.emulated) == (TPU, True)
    assert result.report.checkpoints.startswith("resumed from a checkpoint")
    assert result.outputs["frequency"] == pytest.approx(5.0, abs=0.01)


def move(tower: Tower) -> None:
    """Move what waits to the other class, as the rebalancer does."""
    raw = as_bytes(tower.state.rpop(priority_list(CLASS, 1)))
    place = {"delivery_info": {"exchange": TPU, "routing_key": TPU}}
    envelope = decode_envelope(raw)
    moved = msgspec.structs.replace(envelope, properties=envelope.properties | place)
    tower.state.lpush(priority_list(TPU, 1), encode_envelope(moved))


def test_a_sweep_draws_a_point_for_each_temperature(fleet: Settings, tmp_path: Path, sweep: Any) -> None:
    files = ["--files", str(tmp_path / "files")]
    with router_process(fleet, options=files) as router, worker_process(fleet), taxiway.Client(router.http) as client:
        eventually(lambda: client.fleet()["devices"])
        points = sweep.sweep(client, [1.6, 3.5], size=16, sweeps=400)
    assert points[1.6] > 0.9 > 0.3 > points[3.5]
    assert sweep.drawing(points).count("<circle") == 2
