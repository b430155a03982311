"""How many jobs a device has room for, and on which thread patient work runs, with a stage that does not run."""

import math
import os
import sys
import threading
import time
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
from taxiway.contract.keys import LEVELS, PATIENT
from tests.builders import a_class, a_ticket
from tests.unit.workers.parts import a_delivery, a_running_job, an_executor, shared
from workers.executor import NOTICED, Executor
from workers.learned import Loaded
from workers.port import Item, Row, Runtime
from workers.profiling.measure import bench_class
from workers.runtimes.echo import EchoRuntime
from workers.stages.admit import gather
from workers.stages.device import OTHERS_FIRST, DeviceStage
from workers.stages.job import RunningJob
from workers.stages.queues import DeviceQueue, patient_seconds

BATCH = 4


@pytest.fixture
def stage(tmp_path: Path) -> DeviceStage:
    executor = an_executor(tmp_path, a_class(max_batch=BATCH, max_run=0.1))
    parts = shared()
    return DeviceStage(DeviceQueue(), parts.endings.put, executor, parts)


def jobs(stage: DeviceStage, count: int) -> list[RunningJob]:
    """Jobs of a row each."""
    return [a_running_job(hardware=stage.variants.hardware, key="echo") for _ in range(count)]


def test_a_device_asks_for_up_to_two_batches_and_leaves_others_the_second(stage: DeviceStage) -> None:
    assert stage.wait_for_capacity(10.0) == BATCH
    stage._inbox.put(jobs(stage, BATCH))
    asked = time.monotonic()
    assert stage.wait_for_capacity(10.0) == BATCH
    assert time.monotonic() - asked >= OTHERS_FIRST
    stage._inbox.put(jobs(stage, BATCH))
    assert stage.wait_for_capacity(0.01) == 0


def slept(stage: DeviceStage, level: int, size: int) -> RunningJob:
    """A prepared job of `paced`, which the executor has loaded, of one row."""
    job = a_running_job("paced", delivery=a_delivery(a_ticket(level=level)), hardware=stage.variants.hardware)
    assert stage.variants.ready(job.model, "paced") or stage.variants.load(job.model, "paced")
    job.items = [Item({}, size)]
    job.patient = patient_seconds(job, stage.variants)
    job.answers = [None]
    gather(job)
    return job


def test_a_device_with_enough_patient_work_asks_for_what_is_more_urgent_alone(stage: DeviceStage) -> None:
    long = int(stage.ahead / 0.0001)  # of a tenth of a millisecond each
    assert stage.levels() == LEVELS
    stage._inbox.put([slept(stage, 1, long)])
    assert stage.levels() == LEVELS  # somebody waits for that
    stage._inbox.put([slept(stage, 3, 1)])
    assert stage.levels() == LEVELS
    stage._inbox.put([slept(stage, 3, long)])
    assert stage.levels() == PATIENT
    stage._collect()
    assert stage.levels() == PATIENT
    while stage._lanes:
        next(iter(stage._lanes)).take(0.0)
    assert stage.levels() == LEVELS


def test_patient_work_counts_that_waits_for_its_variant_to_load(stage: DeviceStage) -> None:
    job = slept(stage, 3, int(stage.ahead / 0.0001))
    stage.variants.unload(stage.variants.load(job.model, "paced"))
    stage._loads.wait(job)
    assert stage.levels() == PATIENT
    assert stage._loads.give_up() == [job]
    assert stage.levels() == LEVELS


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
