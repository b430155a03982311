"""How many jobs a device has room for: behind the worker's own executor, with a stage that does not run."""

import time
from pathlib import Path

import pytest

from taxiway.contract.keys import LEVELS, PATIENT
from tests.builders import a_class, a_ticket
from tests.unit.workers.parts import a_delivery, a_running_job, an_executor, shared
from workers.port import Item
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


def test_a_device_asks_for_a_batch_unless_it_has_two_and_leaves_the_second_to_others_for_a_moment(
    stage: DeviceStage,
) -> None:
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
