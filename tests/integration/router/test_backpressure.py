"""A class that cannot drain in time: who waits, who passes, and what refused submitters get."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import taxiway
from tasks.settings import Settings
from taxiway.errors import DeadlineExceededError, OverloadedError
from tests.builders import recorded
from tests.narrowing import present
from tests.routing import eventually
from tests.serving import served_fleet
from tests.working import worker_settings

QUEUES = recorded("fleets/backpressure.yaml")
ROWS = ["x"] * 96  # three full batches: 25 ms of the device
FLOOD = 400  # jobs, which take ten seconds


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    with served_fleet(worker_settings(settings, tmp_path, QUEUES), "paced") as fleet:
        yield fleet.settings


async def passing(broker: str, service: str) -> bool:
    """Whether a tenant that asks for a fifth of the device is answered while another one's flood still waits."""
    async with taxiway.AsyncClient(broker) as client:
        for tenant in ("flooding", "other"):
            await client.infer("paced", ROWS, service=service, tenant=tenant)
        flood = [await client.submit("paced", ROWS, service=service, tenant="flooding") for _ in range(FLOOD)]
        for _ in range(5):
            await asyncio.sleep(0.1)  # it sends one in a while
            await client.infer("paced", ROWS, service=service, tenant="other")
        return not await flood[-1].done()


def test_one_tenants_flood_waits_and_anothers_work_passes_it(fleet: Settings) -> None:
    asyncio.run(passing(fleet.broker, "live"))  # within its deadline, or it would raise
    eventually(lambda: asyncio.run(passing(fleet.broker, "bulk")))  # before the flood ends, unless the machine stalls


async def refused(broker: str) -> tuple[int, int, list[float]]:
    """How many of a flood of live jobs are refused and late, and the refusals' retry times; a later job runs."""
    async with taxiway.AsyncClient(broker) as client:
        asked = [client.infer("paced", ROWS) for _ in range(FLOOD)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        waits = [present(answer.retry_after) for answer in answers if isinstance(answer, OverloadedError)]
        late = [answer for answer in answers if isinstance(answer, DeadlineExceededError)]
        await asyncio.sleep(max(waits))
        await client.infer("paced", ROWS)
        return len(waits), len(late), waits


def test_what_cannot_be_done_in_time_is_refused_and_done_when_retried_after_the_stated_time(fleet: Settings) -> None:
    refusals, late, after = asyncio.run(refused(fleet.broker))

    assert refusals > FLOOD / 4  # ten seconds of work, due within four
    assert late < refusals
    assert 0 < max(after) < 10
