"""Calls that share a job, stored responses, and whose batch of requests is next."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.access import Bodies
from api.inference.infer import Inference
from api.objects.batch_runner import BatchRunner
from api.objects.batches import TURN_SECONDS, LineWindow, OpenBatch, next_batches
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
from tasks.document import Size
from tasks.models.model import parse_model
from tasks.models.profiles import ProfileBook
from tasks.queues.limits import Limits
from tasks.settings import TREE
from tasks.topology import load_topology, parse_topology
from taxiway.contract.job import Result, success_meta
from taxiway.contract.values import Blobs, to_wire
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, TaxiwayError, UnknownObjectError
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
    store, blobs = Store(), Blobs(16, linked=True)
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


class OneOpenBatch:
    """Objects whose only batch cannot be read, for this reason."""

    def __init__(self, reason: TaxiwayError) -> None:
        self.open = [("batch_1", "lab")]
        self._reason = reason

    async def open_batches(self) -> list[tuple[str, str]]:
        return self.open

    async def get(self, *_: Any) -> bytes:
        raise self._reason

    async def close_batch(self, name: str, tenant: str, ended: float) -> None:
        self.open.remove((name, tenant))


@pytest.mark.parametrize(
    ("reason", "left"),
    [
        pytest.param(BrokerUnavailableError("the state store does not answer"), 1, id="unavailable"),
        pytest.param(UnknownObjectError("no batch 'batch_1' is known"), 0, id="deleted"),
    ],
)
async def test_a_batch_that_cannot_be_read_stays_open_unless_it_was_deleted(reason: TaxiwayError, left: int) -> None:
    objects = OneOpenBatch(reason)

    unused = cast(Any, None)
    router = SimpleNamespace(leaving=False, store=SimpleNamespace(clock=SimpleNamespace(now=lambda: 1.0)))
    runner = BatchRunner(cast(Any, SimpleNamespace(router=router)), cast(Any, objects), unused, unused)
    with suppress(BrokerUnavailableError):
        await runner._look()
    await asyncio.gather(*runner._tasks.values())
    assert len(objects.open) == left


def test_a_running_line_counts_as_a_body_of_its_tenant_and_its_answer_until_it_is_written() -> None:
    unused = cast(Any, None)
    limits = Limits(payload=Size(100), bodies=Size(250), all_bodies=Size(400))
    bodies = Bodies(msgspec.structs.replace(parse_topology((TREE / "queues.yaml").read_text()), limits=limits))
    lines = LineWindow(1000)
    runner = BatchRunner(cast(Any, SimpleNamespace(router=None)), unused, unused, bodies)
    runner.lines = lines
    assert [runner.begins("lab", 100, 10) for _ in range(3)] == [True, True, False]
    assert [runner.begins("shop", 100, 10) for _ in range(3)] == [True, True, False]
    with pytest.raises(FleetUnavailable, match="all_bodies"):
        bodies.take("press", 1)
    runner.ended("lab", 100, 10, 889)
    bodies.take("press", 1)
    assert not runner.begins("lab", 1, 1)
    lines.add("lab", -889)
    assert not runner.begins("lab", 1, 890)
    assert runner.begins("lab", 1, 889)


NOW = 1000.0
TENANTS = ("lab", "shop", "press", "slow")
batches = st.lists(
    st.tuples(st.sampled_from(TENANTS), st.booleans(), st.floats(NOW - 2 * TURN_SECONDS, NOW)), max_size=12
).map(lambda found: [OpenBatch(f"batch-{n}", *one) for n, one in enumerate(found)])


def test_a_batch_that_would_begin_again_does_not_give_way_after_its_turn() -> None:
    working, waiting = OpenBatch("a", "lab", True, NOW - TURN_SECONDS), OpenBatch("b", "shop", False, NOW)
    assert next_batches([working, waiting], NOW, 1) == ["b"]
    assert next_batches([replace(working, loses=True), waiting], NOW, 1) == ["a"]


@given(batches, st.integers(1, 6))
def test_no_tenant_has_two_more_than_one_that_waits(batches: list[OpenBatch], most: int) -> None:
    chosen = next_batches(batches, NOW, most)
    assert len(chosen) == len(set(chosen)) == min(most, len(batches))
    tenants = {one.name: one.tenant for one in batches}
    have = Counter(tenants[name] for name in chosen)
    for tenant in {one.tenant for one in batches if one.name not in chosen}:
        assert max(have.values()) <= have[tenant] + 1


@given(batches, st.integers(1, 6))
def test_no_batch_is_left_for_a_younger_one_of_its_tenant(batches: list[OpenBatch], most: int) -> None:
    chosen = next_batches(batches, NOW, most)
    for tenant in TENANTS:
        order = sorted((one for one in batches if one.tenant == tenant), key=lambda one: not one.working)
        kept = [one.name in chosen for one in order]
        assert kept.count(True) >= sum(one.working for one in order) or not all(kept)
        waiting = [one.name in chosen for one in order if not one.working]
        assert waiting == sorted(waiting, reverse=True)


@given(st.integers(1, 12), st.integers(1, 5))
def test_every_tenant_gets_a_turn_before_any_gets_its_second(tenants: int, most: int) -> None:
    since, working, had = dict.fromkeys(range(tenants), 0.0), set[str](), Counter[str]()
    for turn in range(-(-tenants // most)):
        now = turn * TURN_SECONDS
        found = [OpenBatch(str(n), str(n), str(n) in working, since[n]) for n in range(tenants)]
        chosen = set(next_batches(found, now, most))
        since |= {n: now for n in since if (str(n) in chosen) != (str(n) in working)}
        had.update(chosen - working)
        working = chosen
    assert set(had) == {str(n) for n in range(tenants)}


@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 40) | st.just(1000)), max_size=60))
def test_lines_of_all_tenants_fit_the_window_but_for_one_line_of_each(lines: list[tuple[str, int]]) -> None:
    window, held = LineWindow(100), Counter[str]()
    window.tenants = len(TENANTS)
    for tenant, size in lines:
        if window.fits(tenant, size):
            window.add(tenant, size)
            held[tenant] += size
        else:
            assert held[tenant]
    for tenant, size in lines:
        assert held[tenant] <= max(100 // len(TENANTS), max(one for name, one in lines if name == tenant))
        if size == held[tenant] == 1000:
            window.add(tenant, -size)
            assert window.fits(tenant, 1)
