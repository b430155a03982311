"""The same tenant and key are the same job while its record is kept, from any submitter at any interface."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from taxiway import Client
from taxiway.contract.keys import ARRIVALS, job_key, priority_lists, result_key
from taxiway.errors import FleetUnavailable, IdempotencyConflictError, InvalidRequestError, ResultExpiredError
from tests.routing import EchoDevice, eventually, router_process
from tests.working import empty_fleet

KEY: dict[str, Any] = {"tenant": "tower", "deadline": 30.0}


@dataclass
class Fleet:
    """Two routers with a device, and a client for each of two interfaces of each kind."""

    device: EchoDevice
    clients: list[Client]
    state: redis.Redis


@pytest.fixture(scope="module")
def fleet(lasting: Settings) -> Iterator[Fleet]:
    with ExitStack() as stack:
        device = stack.enter_context(EchoDevice(lasting))
        routers = [stack.enter_context(router_process(lasting)) for _ in range(2)]
        urls = [*(router.http for router in routers), lasting.broker, lasting.broker]
        clients = [stack.enter_context(Client(url)) for url in urls]
        yield Fleet(device, clients, stack.enter_context(redis.Redis.from_url(lasting.broker)))


def test_the_window_ends_with_the_record_and_not_with_the_result(fleet: Fleet) -> None:
    once: Any = {"idempotency_key": "flight-17", **KEY}
    http, broker = fleet.clients[0], fleet.clients[2]
    job = http.submit("echo", "once", **once)
    assert job.result(60).outputs == {"payload": "once"}
    fleet.state.delete(result_key(job.id))
    for again in (http, broker):
        with pytest.raises(ResultExpiredError):
            again.submit("echo", "once", **once).result(60)
    assert fleet.device.done.count(job.id) == 1
    fleet.state.delete(job_key(job.id))
    assert http.submit("echo", "once", **once).result(60).outputs == {"payload": "once"}
    eventually(lambda: fleet.device.done.count(job.id) == 2)


def test_another_request_under_a_key_is_refused_where_it_is_submitted_with_one_text_at_every_interface(
    fleet: Fleet,
) -> None:
    for n, first in enumerate(fleet.clients):
        once: Any = {"idempotency_key": f"taken-{n}", **KEY}
        job = first.submit("echo", "first", **once)
        job.result(60)  # what waits in the arrivals has no key yet
        texts = set()
        for other in fleet.clients:
            for model, inputs in (("echo", "second"), ("paced", "first"), ("echo", ["first", "first"])):
                with pytest.raises(IdempotencyConflictError) as caught:
                    other.submit(model, inputs, **once)
                texts.add(caught.value.message)
            assert other.submit("echo", "first", **once).result(60).outputs == {"payload": "first"}
        assert len(texts) == 3  # one a request, whichever the interface
        assert fleet.device.done.count(job.id) == 1


def test_of_concurrent_requests_under_one_key_one_becomes_the_job_and_the_others_are_refused(fleet: Fleet) -> None:
    def ask(client: Client, key: str, inputs: str) -> tuple[str, str] | None:
        try:
            job = client.submit("echo", inputs, idempotency_key=key, **KEY)
            assert job.result(60).outputs == {"payload": inputs}
        except IdempotencyConflictError:
            return None
        return job.id, inputs

    with ThreadPoolExecutor(16) as pool:
        for key in ("gate-1", "gate-2", "taxiway.resent:x"):
            inputs = [f"passenger {n % 4}" for n in range(16)]
            answers = list(pool.map(ask, fleet.clients * 4, [key] * 16, inputs))
            [(job, boarded)] = {answer for answer in answers if answer is not None}
            assert [answer is not None for answer in answers] == [one == boarded for one in inputs]
            assert fleet.device.done.count(job) == 1


@pytest.mark.parametrize("interface", [0, 2], ids=["http", "broker"])
def test_a_copy_that_can_no_longer_be_placed_gets_the_job_that_was_accepted(fleet: Fleet, interface: int) -> None:
    client, key = fleet.clients[interface], f"late-{interface}"
    accepted = client.submit("echo", "first", idempotency_key=key, **KEY)
    accepted.result(60)
    copy = client.submit("echo", "first", idempotency_key=key, budget=1e-15, **KEY)
    assert copy.result(60).outputs == {"payload": "first"}
    with pytest.raises(InvalidRequestError, match="budget"):
        client.submit("echo", "second", idempotency_key=key, budget=1e-15, **KEY).result(60)
    assert fleet.device.done.count(accepted.id) == 1


def test_a_submission_that_a_failover_lost_is_made_again_by_the_client_that_waits_for_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        settings = empty_fleet(stack.enter_context(EmbeddedValkey(tmp_path)).url)
        stack.enter_context(EchoDevice(settings))
        client = stack.enter_context(Client(settings.broker))
        store = stack.enter_context(redis.Redis.from_url(settings.broker))
        asking = stack.enter_context(ThreadPoolExecutor(1))
        answer = asking.submit(client.infer, "echo", "lost once", idempotency_key="flight-99", timeout=60, **KEY)
        eventually(lambda: store.pubsub_channels("taxiway:reply:*") and store.llen(ARRIVALS))
        store.delete(*priority_lists(ARRIVALS))
        store.client_kill_filter(_type="pubsub")
        stack.enter_context(router_process(settings))
        assert answer.result(60).outputs == {"payload": "lost once"}


def test_a_submit_under_a_key_that_no_router_answers_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taxiway.client.valkey_transport._CONFIRMED_WITHIN", 0.2)
    unheard = pytest.raises(FleetUnavailable, match="submit it again under its key")
    with Client(settings.broker) as client, unheard:
        client.submit("echo", "unheard", idempotency_key="flight-100", **KEY)
