"""The client at the HTTP API of a real router, with the smallest worker behind it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import redis

import taxiway
from tasks.settings import Settings
from taxiway.client.sync_client import Client
from taxiway.contract.job import JobState, Result
from taxiway.contract.keys import priority_lists
from taxiway.errors import (
    BrokerUnavailableError,
    FleetUnavailable,
    InvalidRequestError,
    JobCancelledError,
    ResultTimeoutError,
    TaxiwayError,
    UnknownModelError,
)
from tests.cable import Cable, cable_to
from tests.routing import EchoFleet, eventually, router_process
from tests.waiting import BUSY

OUTAGE = 1.5
"""Seconds: three times as long as a call is tried."""


@pytest.fixture
def client(echo: EchoFleet) -> Iterator[Client]:
    with taxiway.Client(echo.router.http) as client:
        yield client


@pytest.fixture
def cable(echo: EchoFleet) -> Iterator[Cable]:
    """A way to the router that can be interrupted."""
    with cable_to(echo.router.http) as (cable, _):
        yield cable


def test_a_request_is_explained_without_being_submitted(client: Client) -> None:
    answer = client.what_if("echo", ["a", "b"], deadline=30)
    dear = client.what_if("echo", "a", budget=1e-15)

    assert (answer["hardware_class"], answer["variant"], answer["error"]) == ("cpu.batch", "echo", None)
    assert (dear["hardware_class"], dear["error"]) == (None, "invalid_request")


def test_a_broker_explains_no_request_that_was_not_submitted(lasting: Settings) -> None:
    with taxiway.Client(lasting.broker) as client, pytest.raises(InvalidRequestError, match="what_if"):
        client.what_if("echo", "a")


def test_an_unknown_model_is_raised_with_near_names(client: Client) -> None:
    with pytest.raises(UnknownModelError) as caught:
        client.submit("ecko", "hello")

    assert "echo" in caught.value.details["near"]


@pytest.mark.usefixtures("paused")
def test_a_wait_with_a_timeout_ends_with_a_timeout_error(client: Client) -> None:
    job = client.submit("echo", "hello")
    started = time.monotonic()

    with pytest.raises(ResultTimeoutError):
        job.result(timeout=0.5)
    with pytest.raises(ResultTimeoutError):
        client.infer("echo", "hello", timeout=0.5)

    assert time.monotonic() - started < 2 + BUSY


@pytest.mark.usefixtures("paused")
def test_a_cancelled_job_says_so(client: Client) -> None:
    job = client.submit("echo", "hello")
    assert job.cancel()
    assert job.cancel()
    assert job.status().state is JobState.CANCELLED

    with pytest.raises(JobCancelledError):
        job.result(timeout=60)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.infer("echo", "hello"),
        lambda client: client.job("some").result(),
        lambda client: client.job("some").status(),
        lambda client: client.models(),
    ],
    ids=["infer", "result", "status", "models"],
)
def test_a_call_to_a_router_that_is_not_there_fails_within_two_seconds(call: Callable[[Client], object]) -> None:
    with taxiway.Client("http://127.0.0.1:9") as client:
        started = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="router"):
            call(client)

        assert time.monotonic() - started < 2 + BUSY


def test_calls_to_a_router_that_stands_still_fail_within_two_seconds_and_work_when_it_goes_on(echo: EchoFleet) -> None:
    with router_process(echo.settings) as router, taxiway.Client(router.http) as client:
        eventually(lambda: client.fleet()["devices"])
        client.infer("echo", "before", timeout=60)
        os.kill(router.process.pid, signal.SIGSTOP)
        try:
            calls: list[Callable[[], object]] = [
                lambda: client.infer("echo", "meanwhile"),
                lambda: client.job("some").result(),
            ]
            for call in calls:
                started = time.monotonic()
                with pytest.raises(BrokerUnavailableError):
                    call()
                assert time.monotonic() - started < 2 + BUSY
        finally:
            os.kill(router.process.pid, signal.SIGCONT)

        assert client.infer("echo", "after", timeout=60).outputs == {"payload": "after"}


def test_a_wait_for_some_seconds_goes_on_while_the_router_cannot_be_reached(client: Client, cable: Cable) -> None:
    job = client.submit("echo", "patience")
    cable.pull()
    threading.Timer(OUTAGE, cable.plug).start()
    with taxiway.Client(f"http://127.0.0.1:{cable.port}", connect_timeout=OUTAGE / 3) as impatient:
        assert impatient.job(job.id).result(timeout=60).outputs == {"payload": "patience"}


def test_an_answer_is_waited_for_while_the_router_cannot_be_reached_and_its_job_runs_once(
    echo: EchoFleet, cable: Cable
) -> None:
    answers: list[Result] = []
    before = len(echo.device.done)
    with (
        taxiway.Client(f"http://127.0.0.1:{cable.port}", connect_timeout=OUTAGE / 3) as client,
        redis.Redis.from_url(echo.settings.broker) as state,
    ):
        ask = partial(client.infer, "echo", "patience", timeout=60, deadline=60)
        waiting = threading.Thread(target=lambda: answers.append(ask()))
        with echo.device.pause():
            waiting.start()
            eventually(lambda: any(map(state.llen, priority_lists("cpu.batch"))))
            cable.pull()
            time.sleep(OUTAGE)
            cable.plug()
        waiting.join()
    assert [answer.outputs for answer in answers] == [{"payload": "patience"}]
    assert len(echo.device.done) == before + 1


def test_an_answer_of_another_server_is_reported_as_such() -> None:
    refused = pytest.raises(FleetUnavailable, match="502")
    with answering(b"502 Bad Gateway", b"<html") as url, taxiway.Client(url) as client, refused:
        client.models()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (b"200 OK", b"[" * 1_000_000),
        (b"200 OK", b"null"),
        (b"200 OK", b"{}"),
        (b"200 OK", b'{"model_name":5,"id":[1],"inputs":{"a":1},"outputs":7,"parameters":[]}'),
        (b"200 OK", b'{"inputs":[],"outputs":[]}'),
        (b"200 OK", b'{"id":"\\ud800","inputs":[{"name":"a","datatype":"BYTES","shape":[1]}],"outputs":[]}'),
        (b"200 OK", b'{"id":"../../admin","inputs":[{"name":"a","datatype":"BYTES","shape":[1]}],"outputs":[]}'),
        (b"429 Busy", b'{"code":"rate_limited","error":[],"details":{"retry_after":"soon"}}'),
        (b"400 Bad Request", b'{"code":["x"],"error":7,"details":5}'),
    ],
    ids=["deep", "null", "empty", "types", "no inputs", "surrogate", "path", "retry", "error"],
)
def test_an_answer_that_no_router_sends_raises_an_error_of_the_client_alone(status: bytes, body: bytes) -> None:
    def calls(client: Client) -> list[Callable[[], object]]:
        job = client.job("00000000-0000-4000-8000-000000000000")
        infer = partial(client.infer, "m", "x", timeout=5)
        return [partial(client.submit, "m", "x"), infer, job.status, partial(job.result, 5), client.models, client.jobs]

    with answering(status, body) as url, taxiway.Client(url) as client:
        for call in calls(client):
            with pytest.raises(TaxiwayError):
                call()


@contextmanager
def answering(status: bytes, body: bytes) -> Iterator[str]:
    """The address of a server that answers every request alike."""
    answer = b"HTTP/1.1 %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (status, len(body), body)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    serving.join()
