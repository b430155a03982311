"""The client at the broker's interface, against a real Valkey server."""

import asyncio
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import taxiway
from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from taxiway.client import valkey_results
from taxiway.client.sync_client import Client
from taxiway.client.valkey_results import Replies
from taxiway.contract.job import JobState, Result
from taxiway.contract.keys import ARRIVALS, job_key, result_key
from taxiway.contract.request import Request, new_id
from taxiway.errors import (
    BrokerUnavailableError,
    InvalidRequestError,
    ResultExpiredError,
    ResultTimeoutError,
    UnknownJobError,
    UnknownModelError,
)
from tests.integration.responder import Responder, echo, finish
from tests.routing import eventually
from tests.waiting import BUSY, until


@pytest.fixture
def url(settings: Settings) -> str:
    return settings.broker


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with taxiway.Client(url) as client:
        yield client


Take = Callable[[Any], None]


@pytest.fixture(params=["blocking", "asyncio"])
def each(request: pytest.FixtureRequest, url: str) -> Callable[..., None]:
    """Calls a method of a client of this kind, and `take` with each answer that it gives."""

    def blocking(method: str, *arguments: Any, take: Take, **terms: Any) -> None:
        with taxiway.Client(url) as client:
            for answer in getattr(client, method)(*arguments, timeout=60, **terms):
                take(answer)

    async def asynchronous(method: str, arguments: tuple[Any, ...], take: Take, terms: dict[str, Any]) -> None:
        async with taxiway.AsyncClient(url) as client:
            async for answer in getattr(client, method)(*arguments, timeout=60, **terms):
                take(answer)

    if request.param == "blocking":
        return blocking
    return lambda method, *arguments, take, **terms: asyncio.run(asynchronous(method, arguments, take, terms))


def test_an_error_of_the_job_is_raised_as_its_own_class_with_its_details(url: str, client: Client) -> None:
    def refuse(request: Request) -> Result:
        raise UnknownModelError("unknown model 'ecko'", near=["echo"])

    with Responder(url, refuse):
        job = client.submit("ecko", "hello")
        with pytest.raises(UnknownModelError, match="ecko") as caught:
            job.result(timeout=60)

    assert caught.value.details == {"near": ["echo"]}


async def test_submits_made_at_once_go_out_in_few_pushes(url: str, store: redis.Redis) -> None:
    before = pushes(store)
    async with taxiway.AsyncClient(url) as client:
        await asyncio.gather(*(client.submit("echo", n) for n in range(1000)))

    assert store.llen(ARRIVALS) == 1000
    assert pushes(store) - before <= 5


def pushes(store: redis.Redis) -> int:
    return store.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"]


async def test_arrivals_keep_the_order_in_which_they_were_submitted(url: str) -> None:
    with Responder(url) as responder:
        async with taxiway.AsyncClient(url) as client:
            jobs = await asyncio.gather(*(client.submit("echo", n) for n in range(700)))
            ids = [job.id for job in jobs]
        eventually(lambda: len(responder.taken) == 700)

    assert [envelope.headers["id"] for envelope in responder.taken] == ids


def test_a_job_of_another_client_is_announced_while_it_is_waited_for(
    client: Client, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: Replies) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Replies, "_poll", never)  # which reads the store again and again
    store.hset(job_key("theirs"), "state", "running")
    ending = threading.Timer(0.3, finish, (store, "theirs", lambda: said("late")))
    ending.start()

    assert client.job("theirs").result(timeout=60).outputs == {"payload": "late"}
    ending.join()  # the store outlives it


def said(value: str) -> Result:
    return echo(Request(model="echo", inputs=value))


def test_a_result_announced_while_the_subscription_is_cut_is_not_missed(
    url: str, client: Client, store: redis.Redis
) -> None:
    job = client.submit("echo", "hello")
    with pytest.raises(ResultTimeoutError):
        job.result(timeout=0.2)

    store.client_kill_filter(_type="pubsub")
    finish(store, job.id, lambda: said("while you were away"))

    assert job.result(timeout=60).outputs == {"payload": "while you were away"}


def test_a_result_that_was_kept_for_its_time_is_expired(client: Client, store: redis.Redis) -> None:
    store.hset(job_key("old"), mapping={"state": "running"})
    finish(store, "old", lambda: said("gone"))
    store.delete(result_key("old"))

    with pytest.raises(ResultExpiredError):
        client.job("old").result(timeout=60)


def test_a_job_that_was_submitted_here_is_accepted_until_a_router_writes_its_record(
    client: Client, store: redis.Redis
) -> None:
    job = client.submit("echo", "hello")
    assert job.status().record.state is JobState.ACCEPTED
    assert job.placement()["state"] == "accepted"
    assert not job.done()

    store.hset(job_key(job.id), mapping={"state": "queued", "hardware_class": "cpu.batch", "level": "2", "cell": "x"})
    record = job.status().record

    assert (record.state, record.hardware_class, record.level) == (JobState.QUEUED, "cpu.batch", 2)


def test_a_job_whose_record_is_gone_still_has_the_state_of_its_result(
    url: str, client: Client, store: redis.Redis
) -> None:
    with Responder(url):
        job = client.submit("echo", "hello")
        job.result(timeout=60)
    store.delete(job_key(job.id))

    assert job.status().record.state is JobState.SUCCEEDED
    assert job.done()


def test_map_yields_in_order_counts_its_progress_and_keeps_its_window(url: str, each: Callable[..., None]) -> None:
    drawn: list[int] = []
    given: list[tuple[int, int]] = []
    counts: list[int] = []

    def inputs() -> Iterator[int]:
        for n in range(50):
            drawn.append(n)
            yield n

    def take(result: Result) -> None:
        given.append((result.outputs["payload"], len(drawn)))

    with Responder(url):
        each("map", "echo", inputs(), window=8, progress=counts.append, take=take)

    assert [payload for payload, _ in given] == list(range(50))
    assert counts == list(range(1, 51))
    assert max(ahead - payload for payload, ahead in given) == 8


async def test_map_of_an_asyncio_client_takes_an_asynchronous_iterator(url: str) -> None:
    async def inputs() -> AsyncIterator[int]:
        for n in range(20):
            await asyncio.sleep(0)
            yield n

    with Responder(url):
        async with taxiway.AsyncClient(url) as client:
            results = client.map("echo", inputs(), window=4, timeout=60)
            assert [one.outputs["payload"] async for one in results] == list(range(20))


def test_map_raises_the_error_of_the_first_that_fails_in_its_turn(url: str, client: Client) -> None:
    def answer(request: Request) -> Result:
        if request.inputs == 3:
            raise InvalidRequestError("inputs: expected another number, got 3", field="inputs")
        return echo(request)

    with Responder(url, answer):
        results = client.map("echo", range(10), window=4, timeout=60)
        good = [next(results).outputs["payload"] for _ in range(3)]
        with pytest.raises(InvalidRequestError, match="got 3"):
            next(results)

    assert good == [0, 1, 2]


async def test_a_closed_client_does_not_connect_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey_results, "UNKNOWN_AFTER", 0.1)
    async with taxiway.AsyncClient(url) as client:
        with pytest.raises(taxiway.ResultTimeoutError):
            await client.job(new_id()).result(timeout=0.01)
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5, later.set)
    await later.wait()
    with redis.Redis.from_url(url) as store:
        mine = store.client_info()
        assert [one["id"] for one in store.client_list() if one["db"] == str(mine["db"])] == [str(mine["id"])]


def test_a_closed_client_says_that_it_is_closed(url: str) -> None:
    client = taxiway.Client(url)
    client.submit("echo", "hello")
    client.close()
    client.close()

    with pytest.raises(RuntimeError, match="closed"):
        client.submit("echo", "hello")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of what this test is about
def test_a_forked_child_connects_anew_and_its_parent_keeps_its_connections(
    url: str, client: Client, store: redis.Redis
) -> None:
    with Responder(url):
        before, connections = client.submit("echo", "before"), store.info("clients")["connected_clients"]
        child = os.fork()
        if child == 0:
            try:
                answers = [before.result(60), client.infer("echo", "child", timeout=60)]
                os._exit(0 if [one.outputs["payload"] for one in answers] == ["before", "child"] else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(2)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert before.result(60).outputs == {"payload": "before"}
        assert client.infer("echo", "parent", timeout=60).outputs == {"payload": "parent"}
        assert until(lambda: store.info("clients")["connected_clients"] <= connections)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_asyncio_client_and_its_jobs_serve_a_forked_childs_loop(url: str) -> None:
    client = taxiway.AsyncClient(url)

    async def submit() -> taxiway.AsyncJob:
        return await client.submit("echo", "before")

    async def ask() -> list[object]:
        answers = [await before.result(60), await client.infer("echo", "child", timeout=60)]
        await client.close()
        return [one.outputs["payload"] for one in answers]

    with Responder(url), asyncio.Runner() as runner:
        before = runner.run(submit())
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if asyncio.run(ask()) == ["before", "child"] else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(2)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        runner.run(client.close())


def test_a_submit_waits_for_the_broker_for_its_connect_timeout(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        url = server.url  # which a server in the folder keeps
    answers = []
    with taxiway.Client(url, connect_timeout=60) as client:
        waiting = threading.Thread(target=lambda: answers.append(client.infer("echo", "patience")))
        waiting.start()
        with EmbeddedValkey(tmp_path), Responder(url):
            waiting.join()

    assert answers[0].outputs == {"payload": "patience"}


def test_a_wrong_password_is_reported_at_once(url: str) -> None:
    host = url.rpartition("@")[2]
    with taxiway.Client(f"redis://:wrong@{host}") as client:
        started = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match=r"(?i)password|auth"):
            client.submit("echo", "hello")

        assert time.monotonic() - started < 2 + BUSY


def test_an_id_of_no_job_is_unknown_after_a_while_for_a_router_may_be_about_to_write_its_record(
    client: Client, store: redis.Redis
) -> None:
    job = client.job("00000000-0000-4000-8000-000000000000")
    with pytest.raises(ResultTimeoutError):
        job.result(timeout=0.1)
    with pytest.raises(UnknownJobError, match="no router has recorded it"):
        job.cancel()
    assert store.llen(ARRIVALS) == 0


@pytest.mark.parametrize("id", ["", "\ud800", "a\nb", "x" * 257])
def test_an_id_that_no_job_can_have_is_refused_and_holds_up_no_call(client: Client, id: str) -> None:
    with pytest.raises(InvalidRequestError, match="id: expected text of 1 to 256 printable characters, got "):
        client.job(id)
    assert not client.jobs().jobs
