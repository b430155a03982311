"""`taxiway profile` as people run it, and executors that find their profile out: real runtimes and processes."""

import datetime
import json
from contextlib import chdir
from pathlib import Path

import msgspec
import pytest
from click.testing import Result

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.profiles import Processor, load_book, load_profile, make_book, profile_path
from tasks.settings import TREE
from tests.builders import recorded
from tests.command_line import CommandLine
from workers.device import find_device
from workers.executor import Executor
from workers.profiling.__main__ import main
from workers.profiling.measure import bench_class

TODAY = datetime.datetime.now(datetime.UTC).date()


def profile(folder: Path, *arguments: str, **environment: str) -> Result:
    with chdir(folder):
        return CommandLine(main)(*arguments, env=environment)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A folder of models: echo, paced, and one that cannot be loaded."""
    models = tmp_path / "models"
    (models / "broken").mkdir(parents=True)
    (models / "broken" / "model.yaml").write_text(recorded("models/broken.yaml"))
    for name in ("echo", "paced"):
        (models / name).mkdir()
        (models / name / "model.yaml").write_text((TREE / "models" / name / "model.yaml").read_text())
    return models


def test_the_paced_devices_pace_is_measured_and_written(tmp_path: Path) -> None:
    done = profile(tmp_path, "--model", "paced", "--quick", "--output", "here")
    assert done.exit_code == 0, done.stderr
    assert "paced:1/paced" in done.stdout
    assert "1 of 1: paced:1/paced" in done.stderr
    (path,) = (tmp_path / "here").glob("*/profiles/*.yaml")
    measured = load_profile(path).variants["paced"]
    late = 1.25 if measured.disturbed < 0.05 else 5  # a sleep ends late while others use the processor
    for rows, seconds in ((1, 0.0051), (16, 0.0066)):
        assert seconds / 1.25 < measured.profile.latency(rows, 1) < seconds * late
    assert [point.rows for point in measured.points] == [1, 2, 4, 8, 16]
    assert measured.date in (TODAY.isoformat(), (TODAY + datetime.timedelta(1)).isoformat())


def test_a_measured_profile_is_what_the_book_answers_for_this_device(tmp_path: Path) -> None:
    done = profile(tmp_path, "--model", "echo", "--quick", "--json", "--output", str(tmp_path))
    answer = json.loads(done.stdout)
    assert [outcome["variant"] for outcome in answer["variants"]] == ["echo"]
    book, errors = load_book(tmp_path)
    device = find_device(bench_class("cpu"), "cpu:0", emulate=False)
    echo = load_catalogue(TREE / "models").resolve("echo")
    known = book.lookup(echo, "echo", "cpu", device.name)
    assert errors == ()
    assert known.warning is None
    assert answer["files"] == [str(profile_path(tmp_path, "echo", Processor(kind="cpu", name=device.name)))]
    assert known.profile.latency(1, 1) < 0.01


def test_what_cannot_be_measured_is_reported_and_the_rest_is_written(tmp_path: Path, catalogue: Path) -> None:
    done = profile(tmp_path, "--quick", "--output", str(tmp_path), TAXIWAY_MODELS=str(catalogue))
    assert done.exit_code == 1
    assert "failed: broken:1/python: " in done.stdout
    assert "skipped: broken:1/tpu-only: model.yaml has no profile for cpu" in done.stdout
    assert (tmp_path / "paced" / "profiles").is_dir()
    assert not (tmp_path / "broken").exists()


@pytest.mark.cases("arguments, status, message")
def test_wrong_usage_of_the_command_line_is_an_error(
    tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    done = profile(tmp_path, *arguments)
    assert done.exit_code == status
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.models
def test_a_real_models_memory_load_and_curve_are_measured(tmp_path: Path) -> None:
    arguments = ["--model", "sentiment", "--variant", "onnx-int8", "--quick", "--output", str(tmp_path)]
    done = profile(tmp_path, *arguments)
    assert done.exit_code == 0, done.stderr
    (path,) = tmp_path.glob("*/profiles/*.yaml")
    measured = load_profile(path).variants["onnx-int8"]
    assert 2**24 < measured.memory <= measured.peak < 2**30
    assert 0.01 < measured.load < 30
    assert measured.profile.latency(16, 128) > 4 * measured.profile.latency(1, 128)
    rows, sizes, _ = zip(*map(msgspec.structs.astuple, measured.points), strict=True)
    assert min(len(set(rows)), len(set(sizes))) >= 2  # as many as the time allows: two of each give a curve
    assert set(measured.packages) == {"onnxruntime"}


def test_a_worker_finds_out_that_its_profile_is_wrong(tmp_path: Path) -> None:
    device = find_device(bench_class("cpu"), "cpu:0", emulate=False)
    shipped = msgspec.json.decode(profile(tmp_path, "--model", "paced", "--quick", "--json", "--output", "o").stdout)
    file = load_profile(tmp_path / shipped["files"][0])
    hasty = msgspec.structs.replace(file.variants["paced"], base=0.001, slope=0.0001, floor=0.0)
    book = make_book([msgspec.structs.replace(file, variants={"paced": hasty})])
    executor = Executor(bench_class("cpu"), device, ArtefactStore(tmp_path), threads=1, book=book)
    loaded = executor.load(load_catalogue(TREE / "models").resolve("paced"), "paced")
    items = [loaded.pipeline.prepare({"payload": "x"}, {})]
    for _ in range(40):
        executor.run(loaded, items)
    track = executor.track(loaded)
    assert device.name == file.device.name
    assert track.drifted
    assert track.pace > 0.7 * 5.1 / 1.1  # or more, on a busy machine
