"""Streamed answers at the broker's interface, on a real Valkey server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import redis

import taxiway
from broker.valkey.worker_store import WorkerStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.job import Result
from taxiway.contract.request import Request
from taxiway.contract.stream import Lost, Piece, Restarted
from taxiway.errors import ExecutionError, InvalidRequestError
from tests.cable import cable_to
from tests.integration.responder import REPORT, Responder
from tests.waiting import until

TEXT = "one two three"
WHOLE = Result(model="tell:1", outputs={"text": TEXT}, report=REPORT)


class Teller:
    """Answers every request with `TEXT`; a test tells the pieces, and when the answer is done."""

    def __init__(self, settings: Settings) -> None:
        self.done = threading.Event()
        self._store = WorkerStore(settings.broker, "worker", Limits())
        self._responder = Responder(settings.broker, self._answer)

    def __enter__(self) -> Teller:
        self._responder.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._responder.__exit__(None, None, None)

    def tell(self, job: str, text: str, *, at: int, attempt: int = 1) -> None:
        self._store.append([(job, Piece(attempt, at, text))])

    def _answer(self, request: Request) -> Result:
        assert request.stream
        self.done.wait(60)
        if request.inputs == "fail":
            raise ExecutionError("the device is gone")
        return WHOLE


@pytest.fixture
def teller(settings: Settings) -> Iterator[Teller]:
    with Teller(settings) as teller:
        yield teller


@pytest.fixture
def client(settings: Settings) -> Iterator[taxiway.Client]:
    with taxiway.Client(settings.broker) as client:
        yield client


def submit(client: taxiway.Client, inputs: str = "tell me") -> taxiway.Job:
    return client.submit("tell", inputs, stream=True)


def test_text_comes_before_the_answer_is_done_and_the_result_last(client: taxiway.Client, teller: Teller) -> None:
    job = submit(client)
    events = job.stream(timeout=60)
    for at, text in ((0, "one "), (4, "two ")):
        teller.tell(job.id, text, at=at)
        assert next(events) == text
    teller.done.set()
    assert list(events) == ["three", WHOLE]


def test_a_late_reader_gets_the_answer_from_its_beginning(client: taxiway.Client, teller: Teller) -> None:
    job = submit(client)
    teller.tell(job.id, "one ", at=0)
    teller.done.set()
    job.result(timeout=60)
    assert "".join(map(str, list(client.job(job.id).stream(timeout=60))[:-1])) == TEXT


def test_a_reader_gets_a_new_attempt_and_what_was_lost_as_events(client: taxiway.Client, teller: Teller) -> None:
    job = submit(client)
    teller.tell(job.id, "uno ", at=0)
    teller.tell(job.id, "one ", at=0, attempt=2)
    teller.tell(job.id, "three", at=8, attempt=2)
    events = job.stream(timeout=60)
    assert [next(events) for _ in range(5)] == ["uno ", Restarted(2), "one ", Lost(4), "three"]
    teller.done.set()
    assert list(events) == [WHOLE]


def test_an_error_of_the_job_is_raised_after_its_events(client: taxiway.Client, teller: Teller) -> None:
    job = submit(client, "fail")
    teller.tell(job.id, "one ", at=0)
    events = job.stream(timeout=60)
    assert next(events) == "one "
    teller.done.set()
    with pytest.raises(ExecutionError, match="the device is gone"):
        next(events)


def test_nothing_is_lost_when_the_connection_breaks_on_the_way(settings: Settings, teller: Teller) -> None:
    with cable_to(settings.broker) as (cable, url), taxiway.Client(url, connect_timeout=60) as client:
        job = submit(client)
        events = job.stream(timeout=60)
        teller.tell(job.id, "one ", at=0)
        assert next(events) == "one "
        cable.pull()
        teller.tell(job.id, "two ", at=4)
        cable.plug()
        assert next(events) == "two "
        teller.done.set()
        assert list(events) == ["three", WHOLE]


def test_a_reader_who_stops_leaves_no_connection_behind(
    client: taxiway.Client, teller: Teller, settings: Settings
) -> None:
    def connections() -> int:
        with redis.Redis.from_url(settings.broker) as store:
            return sum(command == "xread" for command in (c["cmd"] for c in store.client_list()))

    job = submit(client)
    teller.tell(job.id, "one ", at=0)
    events: Any = job.stream(timeout=60)  # a generator
    assert next(events) == "one "
    events.close()
    assert until(lambda: connections() == 0)
    teller.done.set()
    assert job.result(timeout=60) == WHOLE


def test_an_asyncio_reader_gets_the_same(settings: Settings, teller: Teller) -> None:
    async def read() -> list[object]:
        async with taxiway.AsyncClient(settings.broker) as client:
            return [event async for event in client.stream("tell", "me", timeout=60)]

    teller.done.set()
    assert asyncio.run(read()) == [TEXT, WHOLE]


def test_a_stream_is_asked_for_by_yes_or_no(client: taxiway.Client) -> None:
    with pytest.raises(InvalidRequestError, match="stream: expected true or false, got 'yes'"):
        client.submit("tell", "me", stream=cast(bool, "yes"))
