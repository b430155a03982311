"""What a device asks for: behind the worker's own executor, with a loop that does not run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from broker.valkey.worker_store import Store
from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import load_catalogue
from tasks.settings import TREE
from tasks.ticket import Ticket
from tasks.topology import HardwareClass, Limits, Price
from taxiway.contract.keys import INFER, LEVELS, PATIENT
from workers.device import find_device
from workers.drain import Departure
from workers.executor import Executor
from workers.pipelines import Item
from workers.stages.decode import gather
from workers.stages.device import OTHERS_FIRST, DeviceLoop
from workers.stages.job import Delivery, Job

BATCH = 4


@pytest.fixture
def loop(tmp_path: Path) -> DeviceLoop:
    hardware = HardwareClass(
        device="cpu", runtimes=("echo",), max_batch=BATCH, max_wait=0.0, max_run=0.1, price=Price(usd_per_hour=1.0)
    )
    device = find_device(hardware, "cpu:0", emulate=False)
    executor = Executor(hardware, device, ArtefactStore(tmp_path), threads=1)
    return DeviceLoop(
        executor,
        Store("redis://127.0.0.1:1", "w", Limits()),
        end=lambda endings: None,
        accepted=lambda deliveries: None,
        revoked=lambda job: False,
        again=lambda delivery: None,
        give_back=lambda deliveries: None,
        departure=Departure(),
        tell=lambda pieces: None,
    )


def jobs(loop: DeviceLoop, count: int) -> list[Job]:
    """Jobs of a row each."""
    model = load_catalogue(TREE / "models").resolve("echo")
    ticket = Ticket(
        job="j", task=INFER, model=model.id, variants={}, prices={}, accepted=0.0, deadline_at=0.0, level=1, reason=""
    )
    delivery = Delivery("j", ticket, b"", "application/json", hardware_class="c", received=0.0)
    rows = ({"payload": "a text"},)
    hardware = loop.executor.hardware
    return [
        Job(delivery, hardware, model, "echo", "echo", rows, {}, ("payload",), single=True, arrived=0.0)
        for _ in range(count)
    ]


def test_a_device_with_nothing_to_do_asks_for_a_batch(loop: DeviceLoop) -> None:
    assert loop.wait_for_room(10.0) == BATCH


def test_a_device_that_has_a_batch_leaves_the_next_to_others_for_a_moment(loop: DeviceLoop) -> None:
    loop.put(jobs(loop, BATCH))
    asked = time.monotonic()
    assert loop.wait_for_room(10.0) == BATCH
    assert time.monotonic() - asked >= OTHERS_FIRST


def test_a_device_that_has_two_batches_asks_for_none(loop: DeviceLoop) -> None:
    loop.put(jobs(loop, 2 * BATCH))
    assert loop.wait_for_room(0.01) == 0


def slept(loop: DeviceLoop, level: int, size: int) -> Job:
    """A prepared job of `paced`, which the executor has loaded, of one row."""
    model = load_catalogue(TREE / "models").resolve("paced")
    loaded = loop.executor.ready(model, "paced") or loop.executor.load(model, "paced")
    ticket = Ticket(
        job="j",
        task=INFER,
        model=model.id,
        variants={},
        prices={},
        accepted=0.0,
        deadline_at=0.0,
        level=level,
        reason="",
    )
    delivery = Delivery("j", ticket, b"", "application/json", hardware_class="c", received=0.0)
    hardware = loop.executor.hardware
    job = Job(delivery, hardware, model, "paced", loaded.key, ({},), {}, ("payload",), single=True, arrived=0.0)
    job.items = [Item({}, size)]
    job.answers = [None]
    gather(job)
    return job


def test_a_device_with_enough_patient_work_asks_for_what_is_more_urgent_alone(loop: DeviceLoop) -> None:
    long = int(loop.ahead / 0.0001)  # of a tenth of a millisecond each

    assert loop.levels() == LEVELS
    loop.put([slept(loop, 1, long)])
    assert loop.levels() == LEVELS  # somebody waits for that
    loop.put([slept(loop, 3, 1)])
    assert loop.levels() == LEVELS
    loop.put([slept(loop, 3, long)])
    assert loop.levels() == PATIENT
    loop._collect(0.0)
    assert loop.levels() == PATIENT
    while any(loop._lanes.values()):
        next(filter(None, loop._lanes.values())).take(BATCH)
    assert loop.levels() == LEVELS


def test_patient_work_counts_that_waits_for_its_variant_to_load(loop: DeviceLoop) -> None:
    job = slept(loop, 3, int(loop.ahead / 0.0001))
    loop.executor.unload(loop.executor.load(job.model, "paced"))

    loop._loads.wait(job)
    assert loop.levels() == PATIENT
    assert loop._loads.give_up() == [job]
    assert loop.levels() == LEVELS
