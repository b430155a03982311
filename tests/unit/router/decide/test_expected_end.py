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
    assert time_left(5.0, 2.0) == 3.0
    assert time_left(5.0, 60.0) == pytest.approx(6.0), "longer than expected: a tenth more"


@pytest.mark.parametrize(
    ("now", "own", "seconds"),
    [
        (fleet(0.0, 0.0, work=(4.0, 6.0, 100.0)), 2.0, 5.0),  # the work before it, and its own once
        (fleet(20.0, 40.0), 0.5, 2.5),  # behind runs without end: longer, the longer they run
        (fleet(0.0, 40.0), 0.5, 0.5),
        (fleet(), 2.0, None),  # no device serves the class
    ],
)
def test_a_waiting_job_ends_after_what_is_before_it(now: FleetSnapshot, own: float, seconds: float | None) -> None:
    found = time_to_end(now, QUEUED, own)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_device_without_a_heartbeat_for_long_is_silent() -> None:
    devices = fleet(0.0, 0.0).devices
    received = {devices[0].worker: 100.0, devices[1].worker: 100.0 - SILENT - 0.5}
    assert silent_for(devices, received, now=100.2) == {devices[1].worker: pytest.approx(SILENT + 0.7)}
