"""What happens when a class cannot drain in time: who waits, who passes, and what the refused are told."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

import taxiway
from taxiway.errors import DeadlineExceededError, OverloadedError
from tests.routing import router_process
from tests.working import worker_process, worker_settings

QUEUES = """
hardware:
  cpu.batch: {device: cpu, runtimes: [echo], max_batch: 32, max_wait: 0.005, warm: [paced], price: {usd_per_hour: 0.05}}
service:
  live: {deadline: 1, priority: high}
  bulk: {deadline: 3600, priority: low, preemptible: true}
default_service: live
limits: {lease: 2}
"""
ROWS = ["x"] * 96  # three full batches: 25 ms of the device


@pytest.fixture
def fleet(settings, tmp_path):
    worker = worker_settings(settings, tmp_path, QUEUES)
    with worker_process(worker), router_process(worker):
        yield worker


async def passing(broker, service):
    """Seconds that each job takes of a tenant that asks for a fifth of the device, beside another tenant's flood."""
    async with taxiway.AsyncClient(broker) as client:
        for tenant in ("flooding", "other"):
            await client.infer("paced", ROWS, service=service, tenant=tenant)
        for _ in range(200):
            await client.submit("paced", ROWS, service=service, tenant="flooding")
        taken = []
        for _ in range(10):
            await asyncio.sleep(0.1)  # it sends one in a while
            began = time.monotonic()
            await client.infer("paced", ROWS, service=service, tenant="other")
            taken.append(time.monotonic() - began)
        return taken


def test_one_tenants_flood_waits_and_anothers_work_passes_it(fleet):
    live, bulk = (asyncio.run(passing(fleet.broker, service)) for service in ("live", "bulk"))

    assert statistics.median(live) < 0.3  # the flood takes 5 s, and a second of live work is in time
    assert statistics.median(bulk) < 0.3


async def refused(broker):
    """How many of a hundred live jobs are answered; when the others are told to come again; one that does."""
    async with taxiway.AsyncClient(broker) as client:
        asked = [client.infer("paced", ROWS) for _ in range(100)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        told = [answer for answer in answers if isinstance(answer, OverloadedError)]
        late = [answer for answer in answers if isinstance(answer, DeadlineExceededError)]
        await asyncio.sleep(max(error.retry_after for error in told))
        await client.infer("paced", ROWS)
        return len(told), len(late), [error.retry_after for error in told]


def test_what_cannot_be_done_in_time_is_refused_and_done_when_it_comes_again_as_told(fleet):
    told, late, after = asyncio.run(refused(fleet.broker))

    assert told > 30  # two and a half seconds of work, due within one
    assert late < told
    assert 0 < max(after) < 2.5
