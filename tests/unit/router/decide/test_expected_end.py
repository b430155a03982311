"""When a job may be done, and which devices are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.jobs import time_left, time_to_end
from api.operators.view import SILENT, silent_for
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import DeviceFacts
from taxiway.contract.job import JobRecord, JobState
from tests.builders import a_device

QUEUED = JobRecord(id="j", state=JobState.QUEUED, hardware_class="cpu.batch", level=1)


def fleet(*ages: float, work: tuple[float, ...] = (0.0, 0.0)) -> FleetSnapshot:
    return FleetSnapshot(devices=tuple(map(device, range(len(ages)), ages)), work={"cpu.batch": work})


def device(number: int, batch_age: float) -> DeviceFacts:
    return a_device(worker=f"cpu.batch.cpu-{number}@h", device=f"cpu:{number}", batch_age=batch_age)


@given(work=st.floats(0, 1e6), ran=st.floats(0, 1e6))
def test_what_runs_is_never_expected_to_be_done_already(work: float, ran: float) -> None:
    assert time_left(work, ran) > 0


def test_a_run_that_takes_longer_than_expected_is_expected_to_take_a_tenth_more() -> None:
    assert time_left(5.0, 2.0) == 3.0
    assert time_left(5.0, 60.0) == pytest.approx(6.0)


def test_a_job_that_waits_counts_the_work_before_it_and_its_own_once() -> None:
    assert time_to_end(fleet(0.0, 0.0, work=(4.0, 6.0, 100.0)), QUEUED, 2.0) == 5.0


def test_a_job_that_waits_behind_a_run_without_end_waits_longer_the_longer_that_runs() -> None:
    assert time_to_end(fleet(20.0, 40.0), QUEUED, 0.5) == pytest.approx(2.5)
    assert time_to_end(fleet(0.0, 40.0), QUEUED, 0.5) == pytest.approx(0.5)


def test_nothing_is_expected_where_no_device_serves_the_class() -> None:
    assert time_to_end(fleet(), QUEUED, 2.0) is None


def test_a_device_without_a_heartbeat_for_long_is_silent() -> None:
    devices = fleet(0.0, 0.0).devices
    heard = {devices[0].worker: 100.0, devices[1].worker: 100.0 - SILENT - 0.5}
    assert silent_for(devices, heard, now=100.2) == {devices[1].worker: pytest.approx(SILENT + 0.7)}
