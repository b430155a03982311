"""`GET /v2/jobs`, the client's `jobs` at both interfaces, and `taxiway jobs`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis

import taxiway
from api.access import SCOPES
from tasks.settings import Settings
from taxiway.client.sync_client import Client
from taxiway.contract.job import JobRecord
from taxiway.contract.keys import ACCEPTED, job_key
from taxiway.errors import InvalidRequestError
from tests.command_line import CommandLine
from tests.keyring import authorized, keys_in
from tests.routing import EchoFleet, eventually, router_process


@pytest.fixture(scope="module")
def jobs(echo: EchoFleet) -> Iterator[dict[str, Any]]:
    """Ids of what was asked, the first first: 20 of the tenant a, in one burst, then 3 of b, one of them cancelled."""
    with taxiway.Client(echo.settings.broker) as broker, taxiway.Client(echo.router.http) as http:
        burst = [broker.submit("echo", str(n), tenant="a", deadline=60) for n in range(20)]
        for job in burst:
            job.result(20)
        http.infer("echo", "one", tenant="b", timeout=20)
        http.infer("echo", "two", tenant="b", timeout=20)
        with echo.device.pause():
            late = http.submit("echo", "three", tenant="b", service="bulk")
            late.cancel()
        refused = broker.submit("no-such-model", "x", tenant="b")
        with pytest.raises(taxiway.TaxiwayError):
            refused.result(20)
        yield {"a": {job.id for job in burst}, "cancelled": late.id, "refused": refused.id}


@pytest.fixture(params=["http", "broker"])
def client(request: pytest.FixtureRequest, echo: EchoFleet) -> Iterator[Client]:
    with taxiway.Client(echo.interfaces[request.param]) as client:
        yield client


def all_pages(client: Client, **asked: Any) -> list[JobRecord]:
    pages = [client.jobs(**asked)]
    while pages[-1].next is not None:
        pages.append(client.jobs(**asked, cursor=pages[-1].next))
    return [job for page in pages for job in page.jobs]


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
def test_pages_of_any_size_have_every_job_once_the_latest_first(
    client: Client, jobs: dict[str, Any], limit: int
) -> None:
    found = all_pages(client, limit=limit)

    assert len({job.id for job in found}) == len(found) == 24
    assert [job.accepted for job in found] == sorted((job.accepted for job in found), reverse=True)


def test_jobs_are_filtered_by_state_model_and_tenant(client: Client, jobs: dict[str, Any]) -> None:
    assert {job.id for job in all_pages(client, tenant="a", limit=4)} == jobs["a"]
    assert {job.id for job in all_pages(client, model="echo", tenant="a")} == jobs["a"]
    assert len(all_pages(client, model="echo:1")) == 23
    assert [job.id for job in all_pages(client, states=["cancelled"])] == [jobs["cancelled"]]
    assert {job.id for job in all_pages(client, states=["failed", "cancelled"])} == {jobs["cancelled"], jobs["refused"]}
    assert (
        all_pages(client, model="echo:2") == all_pages(client, tenant="c") == all_pages(client, states=["held"]) == []
    )


def test_a_job_that_was_refused_is_listed_as_what_it_was(client: Client, jobs: dict[str, Any]) -> None:
    (found,) = all_pages(client, states=["failed"])

    assert (found.id, found.model, found.tenant) == (jobs["refused"], "no-such-model", "b")


@pytest.mark.cases("wrong, field")
def test_a_wrong_question_is_refused_by_name(
    client: Client, jobs: dict[str, Any], wrong: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as caught:
        client.jobs(**wrong)
    assert caught.value.details["field"] == field


@pytest.mark.parametrize("where", ["http", "broker"])
def test_the_command_line_lists_jobs_at_both_interfaces(
    echo: EchoFleet, jobs: dict[str, Any], where: str, cli: CommandLine
) -> None:
    def printed(*options: str) -> str:
        return cli.succeed("jobs", "--url", echo.interfaces[where], *options, env={"COLUMNS": "160"}).stdout

    answer = json.loads(printed("--json", "--tenant", "a", "--limit", "3"))
    rest = json.loads(printed("--json", "--tenant", "a", "--cursor", answer["next"]))
    table = printed("--state", "cancelled", "--state", "failed").splitlines()

    assert {job["id"] for job in answer["jobs"] + rest["jobs"]} == jobs["a"]
    assert table[1].split() == ["job", "state", "model", "class", "age"]
    assert {line.split()[1] for line in table[2:]} == {"cancelled", "failed"}


def test_what_expired_leaves_the_index(echo: EchoFleet, jobs: dict[str, Any]) -> None:
    with redis.Redis.from_url(echo.settings.broker) as store:
        old, gone = 1000.0, msgspec.msgpack.encode([job_key("gone"), job_key("gone-too")])
        there = msgspec.msgpack.encode([job_key("gone"), job_key(jobs["cancelled"])])
        store.zadd(ACCEPTED, {gone: old, there: old})

        assert eventually(lambda: store.zscore(ACCEPTED, gone) is None)
        assert store.zscore(ACCEPTED, there) == old
        store.zrem(ACCEPTED, there)


def test_with_a_key_a_tenants_own_jobs_alone_are_listed(
    lasting: Settings, jobs: dict[str, Any], tmp_path: Path
) -> None:
    with (
        router_process(lasting, None, keys_in(tmp_path / "keys", a=SCOPES)) as router,
        httpx.Client(base_url=router.http, headers=authorized("a")) as http,
    ):
        listed = http.get("/v2/jobs", params={"limit": 1000}).json()["jobs"]
        foreign = http.get("/v2/jobs", params={"tenant": "b"})

    assert {job["id"] for job in listed} == jobs["a"]
    assert (foreign.status_code, foreign.json()["code"]) == (403, "forbidden")
