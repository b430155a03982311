"""Calls that share a job, and what a stored response becomes when its job has ended."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from api.inference.infer import Inference
from api.openai.answers import AnswerHead
from api.openai.requests import read_call
from api.openai.responses.response import ResponseCall, StoredResponse, begun
from api.openai.responses.stored import Responses
from api.routing.results import CHECK_EVERY, WaitTimeouts
from api.routing.router import Submissions
from broker.port import ForwardOutcome, Outgoing
from broker.valkey.queues import ValkeyTransport
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from tasks.models.model import parse_model
from tasks.models.profiles import ProfileBook
from tasks.queues.limits import Limits
from tasks.settings import TREE
from tasks.topology import load_topology
from taxiway.contract.job import Result, success_meta
from taxiway.contract.values import ResultBlobs, to_wire
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError
from tests.builders import ENGINE_MODELS, a_report
from tests.narrowing import present

NEW, COPY = ForwardOutcome.NEW, ForwardOutcome.COPY
SOON = 20.0
UNFORESEEN = KeyError("gpu.none")


class Lane:
    """A transport that only forwards: each call waits until the test has answered it."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[tuple[list[str], asyncio.Future[list[ForwardOutcome]]]] = asyncio.Queue()

    async def forward(self, messages: Sequence[Outgoing], *_: object) -> list[ForwardOutcome]:
        answer: asyncio.Future[list[ForwardOutcome]] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait(([message.job for message in messages], answer))
        return await answer

    async def call(self) -> tuple[list[str], asyncio.Future[list[ForwardOutcome]]]:
        """The jobs of the next call, and what answers it."""
        return await asyncio.wait_for(self._calls.get(), SOON)


class Interface:
    """Requests that wait for an outbox."""

    def __init__(self) -> None:
        self.lane = Lane()
        fleet = FleetReader(
            RouterStore("redis://127.0.0.1", Limits()), load_topology(TREE / "queues.yaml"), ProfileBook({})
        )
        self._submissions = Submissions(cast(ValkeyTransport, self.lane), fleet)

    def ask(self, *jobs: str) -> list[asyncio.Future[ForwardOutcome]]:
        """A task for each job, that forwards it."""
        envelope = Envelope(body="", headers={}, properties={})
        messages = [Outgoing(tag="", queue="q", level=0, envelope=envelope, job=job) for job in jobs]
        return [asyncio.ensure_future(self._submissions.forward(message)) for message in messages]


async def ended(waits: Sequence[Awaitable[Any]]) -> list[Any]:
    """What each gave."""
    return await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), SOON)


@pytest.mark.parametrize("error", [BrokerUnavailableError("away"), UNFORESEEN], ids=["away", "unforeseen"])
async def test_an_error_reaches_its_callers_and_later_ones_share_a_call(
    error: BrokerUnavailableError | KeyError,
) -> None:
    interface = Interface()
    failing = interface.ask("a", "b")
    _, answer = await interface.lane.call()
    beside = interface.ask("c", "d")
    answer.set_exception(error)
    reply = await ended(failing)
    jobs, answer = await interface.lane.call()
    assert jobs == ["c", "d"]
    answer.set_result([NEW, COPY])
    assert await ended(beside) == [NEW, COPY]
    later = interface.ask("d")
    (await interface.lane.call())[1].set_result([NEW])
    assert await ended(later) == [NEW]
    assert reply == [error, error]


async def test_rows_without_an_answer_get_an_error() -> None:
    interface = Interface()
    asked = interface.ask("a", "b")
    (await interface.lane.call())[1].set_result([NEW])
    fresh, error = await ended(asked)
    assert fresh is NEW
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(("error", "logged"), [(BrokerUnavailableError("away"), []), (UNFORESEEN, [UNFORESEEN])])
async def test_an_unexpected_error_is_logged_though_its_callers_are_gone(
    caplog: pytest.LogCaptureFixture, error: BrokerUnavailableError | KeyError, logged: list[Exception]
) -> None:
    with caplog.at_level(logging.ERROR):
        interface = Interface()
        asked = interface.ask("a")
        _, answer = await interface.lane.call()
        beside = interface.ask("b")
        asked[0].cancel()
        answer.set_exception(error)
        (await interface.lane.call())[1].set_result([NEW])
        await ended([*asked, *beside])
    assert [present(record.exc_info)[1] for record in caplog.records] == logged


async def test_time_for_which_the_event_loop_stood_still_is_not_counted() -> None:
    timeout, loop = WaitTimeouts(), asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    waiting = asyncio.ensure_future(timeout.wait(future, 0.5))
    await asyncio.sleep(0)
    time.sleep(0.7)
    loop.call_later(2 * CHECK_EVERY, future.set_result, "came")
    assert await ended([waiting]) == ["came"]


async def test_a_wait_that_is_cancelled_is_forgotten() -> None:
    timeout, loop = WaitTimeouts(), asyncio.get_running_loop()
    given_up = asyncio.ensure_future(timeout.wait(loop.create_future(), SOON))
    await asyncio.sleep(0)
    given_up.cancel()
    (answer,) = await ended([given_up])
    (after,) = await ended([timeout.wait(loop.create_future(), 0.0)])
    assert (type(answer), type(after)) == (asyncio.CancelledError, TimeoutError)


AWAY = BrokerUnavailableError("the state store does not answer")
REPORT = a_report()


class Store:
    """A state store that keeps one response, and has no blobs or does not answer."""

    def __init__(self) -> None:
        asked = read_call(b'{"model": "talk", "input": "x", "background": true}', ResponseCall, Limits())
        response = begun(asked.call, parse_model(ENGINE_MODELS["talk"], "model.yaml"), AnswerHead("j", "default", 1))
        stored = StoredResponse(tenant="t", input=[], earlier=[], response=response)
        self.kept = msgspec.json.encode(stored)
        self.blobs_of: dict[str, bytes] | None = None
        self.responses = Responses(Inference(cast(Any, self._router())), cast(Any, self))

    def _router(self) -> SimpleNamespace:
        rules = SimpleNamespace(topology=SimpleNamespace(limits=Limits()), seal_keys=None)
        registry = SimpleNamespace(announce=self._announced)
        store = SimpleNamespace(clock=SimpleNamespace(now=lambda: 2.0))
        return SimpleNamespace(rules=rules, store=store, registry=registry, values=self)

    async def _announced(self, *_: Any) -> None:
        pass

    async def blobs(self, refs: list[str]) -> dict[str, bytes]:
        if self.blobs_of is None:
            raise AWAY
        return {ref: self.blobs_of[ref] for ref in refs}

    async def get(self, *_: Any) -> bytes:
        return self.kept

    async def change(self, kind: str, name: str, tenant: str | None, changed: Any) -> bytes:
        self.kept = msgspec.json.encode(changed(self.kept))
        return self.kept

    async def close_response(self, name: str) -> None:
        pass

    @property
    def status(self) -> str:
        return msgspec.json.decode(self.kept, type=StoredResponse).response.status


def test_a_response_whose_large_outputs_cannot_be_read_now_is_left_open_and_completes_later() -> None:
    store, blobs = Store(), ResultBlobs(16)
    message = {"role": "assistant", "content": "one two " * 8}
    outputs = to_wire({"message": message, "text": b"one two " * 8, "finish-reason": "stop"}, blobs=blobs)
    meta = success_meta("j", Result(model="talk:1", outputs=outputs, report=REPORT))
    assert blobs.contents
    with pytest.raises(BrokerUnavailableError):
        asyncio.run(store.responses._settle("resp_j", meta))
    assert store.status == "queued"
    store.blobs_of = {ref: bytes(content) for ref, content in blobs.contents.items()}
    asyncio.run(store.responses._settle("resp_j", meta))
    assert store.status == "completed"
