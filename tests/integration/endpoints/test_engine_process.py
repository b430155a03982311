"""An engine that is started with its endpoint's worker, and ends with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from local.embedded import free_port
from tasks.settings import TREE, Settings
from tests.builders import add_engine_models
from tests.command_line import program
from tests.llama import gguf
from tests.queues import engine_class, queues_of
from tests.routing import eventually
from tests.working import CLASS, Tower, worker_settings


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    command = {"command": [sys.executable, "-m", "tests.engine", "{port}"]}
    url = f"http://127.0.0.1:{free_port()}/v1"
    engine = engine_class(url, models={"talk": "served"}, health={"every": 0.2}, start=command)
    configured = worker_settings(settings, tmp_path, queues_of({CLASS: engine}))
    add_engine_models(configured.models, "talk")
    return configured


def llama(file: Any) -> str:
    """The queues.yaml of a class that needs a GGUF file alone."""
    url = "http://127.0.0.1:0/v1"
    return queues_of({CLASS: engine_class(url, slots=2, models={"talk": "tiny"}, start={"llama": file})})


OPTIONS = ("--class", "cpu.batch", "--device", "endpoint:0")
COMMAND = [sys.executable, "-W", "ignore", "-m", "local.engine", *OPTIONS]


@contextmanager
def engine_process(fleet: Settings) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **fleet.environment()}
    with subprocess.Popen(COMMAND, cwd=TREE, env=environment, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert json.loads(started.stdout.readline())["ready"] == "worker"
        yield started
        started.kill()


@pytest.fixture
def process(fleet: Settings) -> Iterator[subprocess.Popen[bytes]]:
    with engine_process(fleet) as process:
        yield process


def engines(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if "tests.engine" in one.cmdline()]


def test_an_engine_serves_with_its_worker_is_restarted_and_ends_with_it(
    fleet: Settings, process: subprocess.Popen[bytes]
) -> None:
    talk = {"messages": [{"role": "user", "content": "Hello"}]}
    with Tower(fleet) as tower:
        assert tower.result(tower.order("talk", talk, variant="engine")).outputs["text"] == "Hello "
        (first,) = engines(process)
        assert first.nice() == min(os.nice(0) + 10, 19), "workers on its cores come first"
        first.kill()
        first.wait(60)
        assert tower.result(tower.order("talk", talk, variant="engine")).outputs["text"] == "Hello "
        (second,) = eventually(lambda: engines(process))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        eventually(lambda: not second.is_running())


@pytest.mark.models
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama.cpp to test with")
@pytest.mark.parametrize("file", ["tiny.gguf", {"model": "chat", "artefact": "weights"}], ids=["file", "artefact"])
def test_a_gguf_file_is_all_that_an_engine_needs(settings: Settings, tmp_path: Path, file: Any) -> None:
    configured = worker_settings(settings, tmp_path, llama(file))
    add_engine_models(configured.models, "talk")
    (configured.models / "chat").symlink_to(TREE / "models" / "chat")
    (configured.queues.parent / "tiny.gguf").symlink_to(gguf())
    talk = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
    with engine_process(configured) as process, Tower(configured) as tower:
        result = tower.result(tower.order("talk", talk, variant="engine"))
        assert result.outputs["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_gguf_file_that_does_not_exist_is_named(settings: Settings, tmp_path: Path) -> None:
    configured = worker_settings(settings, tmp_path, llama("nowhere.gguf"))
    done = program("local.engine", *OPTIONS, settings=configured)
    assert done.returncode == 2
    assert f"expected a GGUF file, got {configured.queues.parent / 'nowhere.gguf'}" in done.stderr
