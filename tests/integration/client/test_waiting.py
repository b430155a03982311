"""Waits of a client at either interface: for a time, for a job that is cancelled, and through outages."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import redis

import taxiway
from local.embedded import EmbeddedValkey
from taxiway.client.sync_client import Client
from taxiway.contract.job import JobState, Result
from taxiway.contract.keys import priority_lists
from taxiway.errors import BrokerUnavailableError, JobCancelledError, ResultTimeoutError, UnknownJobError
from tests.cable import Cable, cable_to
from tests.narrowing import present
from tests.routing import EchoFleet, echo_fleet, eventually
from tests.waiting import BUSY
from tests.working import empty_fleet

OUTAGE = 1.5
"""Seconds: three times as long as a call is tried."""

CALLS: list[Callable[[Client], object]] = [
    lambda client: client.submit("echo", "hello"),
    lambda client: client.infer("echo", "hello"),
    lambda client: client.job("some").result(),
    lambda client: client.job("some").status(),
    lambda client: client.job("some").cancel(),
    lambda client: client.models(),
]


def within_two_seconds(client: Client, call: Callable[[Client], object]) -> bool:
    """Whether a call that is bound to fail does so in time."""
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError):
        call(client)
    return time.monotonic() - began < 2 + BUSY


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "redis://127.0.0.1:9/0"])
def test_every_call_to_a_server_that_is_not_there_fails_within_two_seconds(url: str) -> None:
    def fails(call: Callable[[Client], object]) -> bool:
        with taxiway.Client(url) as client:
            return within_two_seconds(client, call)

    with ThreadPoolExecutor(len(CALLS)) as pool:
        assert all(pool.map(fails, CALLS))


@pytest.mark.parametrize("interface", ["broker", "http"])
def test_calls_to_a_server_that_stands_still_fail_within_two_seconds_and_work_when_it_goes_on(
    tmp_path: Path, interface: str
) -> None:
    with EmbeddedValkey(tmp_path) as server, echo_fleet(empty_fleet(server.url)) as fleet:
        still = present(server.pid) if interface == "broker" else fleet.router.process.pid
        with taxiway.Client(fleet.interfaces[interface]) as client:
            job = client.submit("echo", "before")
            job.result(timeout=60)
            os.kill(still, signal.SIGSTOP)
            try:
                with ThreadPoolExecutor() as pool:
                    assert all(pool.map(partial(within_two_seconds, client), CALLS[:4]))
            finally:
                os.kill(still, signal.SIGCONT)
            assert client.job(job.id).result(timeout=60).outputs == {"payload": "before"}
            assert client.infer("echo", "after", timeout=60).outputs == {"payload": "after"}


def test_a_wait_with_a_timeout_ends_with_an_error_and_may_be_repeated(client: Client, echo: EchoFleet) -> None:
    with echo.device.pause():
        job = client.submit("echo", "hello")
        ask = partial(client.infer, "echo", "hello", timeout=0.5)
        for wait in (partial(job.result, 0.5), partial(client.job(job.id).result, 0), ask):
            with pytest.raises(ResultTimeoutError):
                wait()
    assert job.result(timeout=60).outputs == {"payload": "hello"}


@pytest.mark.usefixtures("paused")
def test_a_cancelled_job_says_so(client: Client) -> None:
    job = client.submit("echo", "hello")
    assert job.cancel()
    assert job.cancel()
    assert job.status().state is JobState.CANCELLED
    with pytest.raises(JobCancelledError):
        job.result(timeout=60)


def test_an_id_of_no_job_has_one_error_text_by_every_call(interfaces: dict[str, str]) -> None:
    texts = set()
    for url in interfaces.values():
        with taxiway.Client(url) as client:
            job = client.job("00000000-0000-4000-8000-000000000000")
            for call in (job.status, job.placement, job.done, job.cancel, partial(job.result, 90)):
                with pytest.raises(UnknownJobError) as caught:
                    call()
                texts.add(caught.value.message)
    assert len(texts) == 1


@pytest.fixture(params=["broker", "http"])
def cable(request: pytest.FixtureRequest, interfaces: dict[str, str]) -> Iterator[tuple[Cable, Client]]:
    """A client, and its way to the fleet, which can be interrupted."""
    with cable_to(interfaces[request.param]) as (cable, url), taxiway.Client(url, connect_timeout=OUTAGE / 3) as client:
        yield cable, client


def test_a_wait_for_a_job_of_another_client_goes_on_through_an_outage(
    interfaces: dict[str, str], cable: tuple[Cable, Client]
) -> None:
    with taxiway.Client(interfaces["http"]) as other:
        job = other.submit("echo", "patience")
    cable[0].pull()
    threading.Timer(OUTAGE, cable[0].plug).start()
    assert cable[1].job(job.id).result(timeout=60).outputs == {"payload": "patience"}


def test_an_answer_is_waited_for_through_an_outage_and_its_job_runs_once(
    echo: EchoFleet, cable: tuple[Cable, Client], state: redis.Redis
) -> None:
    answers: list[Result] = []
    before = len(echo.device.done)
    ask = partial(cable[1].infer, "echo", "patience", timeout=60, deadline=60)
    waiting = threading.Thread(target=lambda: answers.append(ask()))
    with echo.device.pause():
        waiting.start()
        eventually(lambda: any(map(state.llen, priority_lists("cpu.batch"))))
        cable[1].models()  # its answer comes after the one to the message that was pushed
        cable[0].pull()
        time.sleep(OUTAGE)
        cable[0].plug()
    waiting.join()
    assert [answer.outputs for answer in answers] == [{"payload": "patience"}]
    assert len(echo.device.done) == before + 1


@pytest.mark.usefixtures("paused")
@pytest.mark.parametrize("interface", ["broker", "http"])
def test_an_asyncio_client_says_on_another_loop_that_it_serves_one(interfaces: dict[str, str], interface: str) -> None:
    client = taxiway.AsyncClient(interfaces[interface])
    with asyncio.Runner() as first:
        job = first.run(client.submit("echo", "hello"))
        for call in (client.submit, client.infer):
            with pytest.raises(RuntimeError, match="serves one event loop"):
                asyncio.run(call("echo", "hello"))
        with pytest.raises(RuntimeError, match="serves one event loop"):
            asyncio.run(job.result())
        assert first.run(job.done()) is False
        first.run(client.close())


@pytest.mark.usefixtures("paused")
def test_a_map_whose_client_is_closed_says_so(client: Client) -> None:
    answers = client.map("echo", ["one", "two"], window=2)
    closing = threading.Timer(0.1, client.close)
    closing.start()
    with pytest.raises(RuntimeError, match="this client was closed while it waited"):
        next(answers)
    closing.join()
