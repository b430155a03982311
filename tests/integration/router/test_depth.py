"""A tenant's `max_depth` holds over all routers, whichever of its jobs' processes die."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import httpx
import pytest
import redis

import taxiway
from tasks.settings import Settings
from taxiway.contract.job import JobState
from taxiway.contract.keys import open_key
from tests.producing import infer_body
from tests.routing import EchoDevice, RouterProcess, eventually, router_process
from tests.scripting import Store

CLASS = "cpu.batch"
MOST = 5
AT_ONCE = 40
BOUNDED = f"""
hardware:
  {CLASS}: {{device: cpu, runtimes: [echo], max_batch: 16, max_wait: 0, price: {{usd_per_hour: 0.05}}, max_depth: 100}}
service: {{standard: {{deadline: 600}}}}
default_service: standard
tenants: {{lab: {{max_depth: {MOST}, payload: 1KiB}}}}
limits: {{requests_per_second: 100000}}
"""


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with a tenant of bounded depth."""
    (tmp_path / "queues.yaml").write_text(BOUNDED)
    return dataclasses.replace(settings, queues=tmp_path / "queues.yaml")


@pytest.fixture
def routers(fleet: Settings) -> Iterator[list[RouterProcess]]:
    """Two routers, and a device that answers nothing."""
    with EchoDevice(fleet, answering=False), router_process(fleet) as one, router_process(fleet) as other:
        yield [one, other]


def burst(routers: Sequence[RouterProcess], deadline: float = 600) -> list[httpx.Response]:
    """The answers to simultaneous requests of the tenant, of which each router gets as many."""
    body = infer_body("a", tenant="lab", deadline=deadline)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=AT_ONCE)) as http:
            urls = [f"{routers[n % len(routers)].http}/v2/models/echo/infer" for n in range(AT_ONCE)]
            headers = {"prefer": "respond-async"}
            return await asyncio.gather(*(http.post(url, json=body, headers=headers) for url in urls))

    return asyncio.run(ask())


def accepted(answers: Sequence[httpx.Response]) -> list[str]:
    """The paths of the accepted jobs; the others were refused for the depth of their tenant."""
    refused = [answer for answer in answers if answer.status_code != 202]
    said = Counter((r.status_code, r.json()["details"]["limit"], r.headers["retry-after"]) for r in refused)
    assert said.keys() <= {(429, "tenants.lab.max_depth", "1")}
    return [answer.json()["location"] for answer in answers if answer.status_code == 202]


def test_two_routers_accept_as_many_simultaneous_jobs_as_a_tenant_may_have_and_again_once_those_ended(
    fleet: Settings, routers: list[RouterProcess], store: redis.Redis
) -> None:
    first = accepted(burst(routers))
    assert len(first) == store.zcard(open_key("lab")) == MOST
    assert accepted(burst(routers)) == []
    with httpx.Client(base_url=routers[0].http, trust_env=False) as http:
        large = http.post("/v2/models/echo/infer", json=infer_body("a" * 2000, tenant="lab"))
        assert (large.status_code, large.json()["details"]["limit"]) == (413, "tenants.lab.payload")
        for job in first:
            http.delete(job)
        again = accepted(burst(routers))  # at once, whatever routers have counted since they last read
        assert len(again) == MOST
        post = partial(http.post, "/v2/models/echo/infer", json=infer_body("a"), headers={"prefer": "respond-async"})
        others = [post() for _ in range(105 - MOST)]  # five more than its class may have, besides what is on its way
        assert [one.status_code for one in (*others[: 100 - MOST], others[-1])] == [202] * (100 - MOST) + [429]
        for one in (*again[:1], *(other.json()["location"] for other in others[:9])):
            http.delete(one)
        assert post().status_code == 202
    with taxiway.Client(fleet.broker) as client:
        kept = client.submit("echo", "a", tenant="lab", idempotency_key="one")
        assert eventually(lambda: kept.status().state) is JobState.QUEUED


def test_jobs_whose_router_and_worker_died_count_until_they_end_and_no_longer(
    routers: list[RouterProcess], store: redis.Redis
) -> None:
    jobs = accepted(burst(routers, deadline=3))
    assert len(jobs) == MOST
    Store(store).claim("dead", *(job.rpartition("/")[2] for job in jobs))
    killed, left = routers
    killed.process.kill()
    eventually(lambda: not store.exists(open_key("lab")))
    assert len(accepted(burst([left]))) == MOST
