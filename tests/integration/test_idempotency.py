"""The same tenant and key are the same job as long as its record is kept, whoever submits it where."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from tasks.embedded import EmbeddedValkey
from tasks.settings import settings_from
from taxiway import Client
from taxiway.errors import ResultExpiredError
from taxiway.keys import job_key, result_key
from tests.routing import EchoDevice, eventually, router_process

KEY: dict[str, Any] = {"tenant": "tower", "deadline": 30.0}


@dataclass
class Fleet:
    """Two routers with a device, and a client for each of two doors of each kind."""

    device: EchoDevice
    clients: list[Client]
    state: redis.Redis


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedValkey(tmp_path_factory.mktemp("idempotency")))
        settings = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        device = stack.enter_context(EchoDevice(settings))
        routers = [stack.enter_context(router_process(settings)) for _ in range(2)]
        urls = [*(router.http for router in routers), settings.broker, settings.broker]
        clients = [stack.enter_context(Client(url)) for url in urls]
        yield Fleet(device, clients, stack.enter_context(redis.Redis.from_url(settings.state)))


def test_concurrent_submits_by_two_doors_and_two_routers_are_one_job_that_runs_once(fleet: Fleet) -> None:
    def ask(client: Client, key: str) -> str:
        job = client.submit("echo", "only once", idempotency_key=key, **KEY)
        job.result(10)
        return str(job.id)

    with ThreadPoolExecutor(16) as pool:
        for key in ("flight-1", "flight-2", "flight-3", "flight-4"):
            [job] = set(pool.map(ask, fleet.clients * 4, [key] * 16))
            assert fleet.device.done.count(job) == 1


def test_the_window_ends_with_the_record_and_not_with_the_result(fleet: Fleet) -> None:
    once: Any = {"idempotency_key": "flight-17", **KEY}
    http, broker = fleet.clients[0], fleet.clients[2]
    job = http.submit("echo", "once", **once)
    assert job.result(10).outputs == {"payload": "once"}
    fleet.state.delete(result_key(job.id))
    for again in (http, broker):
        with pytest.raises(ResultExpiredError):
            again.submit("echo", "once", **once).result(5)
    assert fleet.device.done.count(job.id) == 1
    fleet.state.delete(job_key(job.id))
    assert http.submit("echo", "once", **once).result(10).outputs == {"payload": "once"}
    eventually(lambda: fleet.device.done.count(job.id) == 2)
