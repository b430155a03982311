"""Patient work runs on a thread of a lower CPU priority, and everything else on the device's own."""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from tasks.models.artefacts import ArtefactStore
from taxiway.contract.keys import PATIENT
from workers.device import find_device
from workers.executor import NOTICED, Executor
from workers.profiling.measure import bench_class


def executor_of(folder: Path, **fields: int) -> Executor:
    hardware = msgspec.structs.replace(bench_class("cpu"), **fields)
    device = find_device(hardware, "cpu:0", emulate=False)
    return Executor(hardware, device, ArtefactStore(folder), threads=1)


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


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_what_patient_work_raises_is_raised_to_its_caller(tmp_path: Path, error: BaseException) -> None:
    executor = executor_of(tmp_path, nice=3)

    def fail() -> None:
        raise error

    for _ in range(2):  # the thread lives on
        with pytest.raises(type(error)):
            executor.at_level(PATIENT, math.inf, fail)
    assert executor.at_level(PATIENT, math.inf, lambda: 1) == 1
