"""A short job that comes alone to an idle device runs on the thread that brings it."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from broker.valkey.claims import Claim, Verdict
from tests.unit.workers.stages.test_device_reload import Device, answer
from tests.waiting import until
from workers.stages.admit import prepare
from workers.stages.device import ALONE_AT_MOST
from workers.stages.job import Answered, RunningJob
from workers.stages.lane import Lane


@pytest.fixture
def device(tmp_path: Path) -> Device:
    opened = Device(tmp_path)
    opened.gate.set()
    return opened


def ready(device: Device, name: str = "one") -> RunningJob:
    """A job whose variant is loaded, decoded."""
    job = device.job(name)
    loaded = device.executor.ready(job.model, job.variant) or device.executor.load(job.model, job.variant)
    prepare(job, loaded)
    return job


def test_a_job_alone_runs_on_its_callers_thread(device: Device) -> None:
    assert device.stage.run_alone(ready(device))
    [ending] = device.endings.all
    assert answer(ending) == [2.0, 4.0]
    assert device.stage.use.busy > 0


def test_it_is_left_to_the_device_thread_where_that_has_work_or_runs(device: Device) -> None:
    device.gate.clear()
    job, other = ready(device), ready(device, "other")
    device.jobs.put([job])
    assert not device.stage.run_alone(other)
    with device.running():
        assert device.begun.wait(20)
        assert not device.stage.run_alone(other)
        device.gate.set()
        assert until(lambda: len(device.endings.all) == 1)


def test_the_device_thread_waits_for_it_and_runs_what_came_meanwhile(device: Device) -> None:
    device.gate.clear()
    first, second = ready(device), ready(device)
    with device.running():
        alone = threading.Thread(target=device.stage.run_alone, args=[first])
        alone.start()
        assert device.begun.wait(20)
        device.jobs.put([second])
        assert not device.endings.all
        device.gate.set()
        alone.join()
        assert until(lambda: len(device.endings.all) == 2)
    assert [one.job for one in device.endings.all if isinstance(one, Answered)] == [first, second]


def test_a_long_or_suspect_or_undecoded_job_is_left_to_the_device_thread(device: Device) -> None:
    long, suspect = ready(device), ready(device)
    suspect.delivery.claim = Claim(Verdict.RUN, "token", blamed=1)
    loaded = device.executor.ready(long.model, long.variant)
    assert loaded is not None
    known = loaded.known
    loaded.known = replace(known, profile=structs.replace(known.profile, base=2 * ALONE_AT_MOST))
    assert not device.stage.run_alone(long)
    loaded.known = known
    assert not device.stage.run_alone(suspect)
    assert not device.stage.run_alone(device.job("one"))
    assert device.stage.run_alone(long)


def test_one_that_waits_for_others_is_run_by_the_device_thread(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.001])
    due = Lane.due
    monkeypatch.setattr(Lane, "due", lambda lane, now, clock: max(due(lane, now, clock), next(waits, 0.0)))
    job = ready(device)
    with device.running():
        assert device.stage.run_alone(job)
        assert until(lambda: len(device.endings.all) == 1)
