"""Patient work runs on a thread of a lower CPU priority, and everything else on the device's own."""

import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tasks.models.folder import load_catalogue
from tasks.models.model import Profile
from tasks.models.profiles import ProfileBook
from tasks.settings import TREE
from taxiway.contract.keys import PATIENT
from tests.unit.workers.parts import an_executor
from workers.executor import NOTICED, Executor
from workers.learned import Loaded
from workers.port import Item, Row, Runtime
from workers.profiling.measure import bench_class
from workers.runtimes.echo import EchoRuntime


def executor_of(folder: Path, **fields: int) -> Executor:
    return an_executor(folder, msgspec.structs.replace(bench_class("cpu"), **fields))


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the niceness by thread")
def test_only_patient_work_gets_a_lower_cpu_priority(tmp_path: Path) -> None:
    executor = executor_of(tmp_path, nice=3)
    lower = min(niceness() + 3, 19)
    assert executor.at_level(PATIENT, math.inf, niceness) == lower
    assert executor.at_level(PATIENT - 1, math.inf, niceness) == niceness()
    assert executor.at_level(PATIENT, NOTICED / 2, niceness) == niceness()
    assert niceness() < lower or lower == 19


def test_without_niceness_patient_work_stays_on_the_thread(tmp_path: Path) -> None:
    executor = executor_of(tmp_path, nice=0)
    assert executor.at_level(PATIENT, math.inf, threading.get_ident) == threading.get_ident()


class WhichThread:
    """A pipeline whose answers name the thread that ran it."""

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        return Item({}, 1, parameters, level=PATIENT)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        return [{"thread": threading.get_ident()} for _ in items]


@pytest.mark.parametrize(("runtime", "own"), [("onnx", False), ("echo", True), ("python", True)])
def test_what_computes_nothing_on_its_thread_does_not_wake_another(tmp_path: Path, runtime: str, own: bool) -> None:
    executor = executor_of(tmp_path, nice=3)
    model = load_catalogue(TREE / "models").resolve("echo")
    variant = msgspec.structs.replace(model.variants["echo"], runtime=runtime)
    second = replace(ProfileBook().lookup(model, "echo", "cpu", "test"), profile=Profile(base=1.0, slope=0.0))
    loaded = Loaded("echo:1/echo", model, variant, WhichThread(), EchoRuntime(), second, 0.0)
    (answer,) = executor.run(loaded, [loaded.pipeline.prepare({}, {})])
    assert isinstance(answer, dict)
    assert (answer["thread"] == threading.get_ident()) is own


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_what_patient_work_raises_is_raised_to_its_caller(tmp_path: Path, error: BaseException) -> None:
    executor = executor_of(tmp_path, nice=3)

    def fail() -> None:
        raise error

    for _ in range(2):  # the thread lives on
        with pytest.raises(type(error)):
            executor.at_level(PATIENT, math.inf, fail)
    assert executor.at_level(PATIENT, math.inf, lambda: 1) == 1
