"""More work than hardware: what cannot be in time is refused at once at every interface, and counts as demand."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
import redis

import taxiway
from tasks.history import unserved
from taxiway.contract.keys import WORK, unserved_key, work_cell
from tests.openai_fleet import QUEUES, OpenAIFleet, openai_fleet
from tests.routing import HTTP, eventually

CHAT: Any = {"model": "talk", "messages": [{"role": "user", "content": "hi"}]}
TENSORS = {"inputs": [{"name": "request", "shape": [1], "datatype": "BYTES", "data": [{"messages": CHAT["messages"]}]}]}
ASKED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "streamed": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "completion": ("/v1/completions", {"model": "tale", "prompt": "hi"}),
    "embedding": ("/v1/embeddings", {"model": "vector", "input": "hi"}),
    "response": ("/v1/responses", {"model": "talk", "input": "hi"}),
    "tensors": ("/v2/models/talk/infer", TENSORS),
}
LIVE = {"x-taxiway-service": "live"}
AHEAD = 300.0  # device seconds of live work


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIFleet]:
    queues = QUEUES.replace("\nservice:", "\nservice:\n  live: {{deadline: 5, priority: high}}")
    with openai_fleet(tmp_path_factory.mktemp("scarce"), queues=queues) as fleet:
        yield fleet


@pytest.fixture
def crowded(fleet: OpenAIFleet) -> Iterator[redis.Redis]:
    """The store, while its class has far more live work than it can do."""
    with redis.Redis.from_url(fleet.settings.broker) as store:
        store.hincrbyfloat(WORK, work_cell("cpu.batch", 0), AHEAD)
        eventually(lambda: ask(fleet, "chat").status_code == 429)
        yield store
        store.hincrbyfloat(WORK, work_cell("cpu.batch", 0), -AHEAD)
        eventually(lambda: ask(fleet, "chat").is_success)


def ask(fleet: OpenAIFleet, what: str, **headers: str) -> httpx.Response:
    path, body = ASKED[what]
    return HTTP.post(fleet.router.http + path, json=body, headers={**LIVE, **headers})


@pytest.mark.parametrize("what", ASKED)
def test_what_cannot_be_in_time_is_refused_at_once_with_the_time_to_retry(
    fleet: OpenAIFleet, crowded: redis.Redis, what: str
) -> None:
    began = time.monotonic()
    answer = ask(fleet, what, prefer="respond-async" if what == "tensors" else "wait=5")
    assert time.monotonic() - began < 3, "it waited for its deadline"
    assert answer.status_code == 429, answer.text
    assert AHEAD - 10 < int(answer.headers["retry-after"]) <= AHEAD
    error = answer.json()["error"]
    assert "the deadline is 5 s" in (error["message"] if isinstance(error, dict) else error)


def test_refused_requests_count_as_demand_of_their_service_and_operators_learn_of_them(
    fleet: OpenAIFleet, crowded: redis.Redis
) -> None:
    before = counted(crowded)
    for _ in range(9):
        assert ask(fleet, "chat").status_code == 429
    for url in (fleet.settings.broker, fleet.router.http):
        with taxiway.Client(url) as client, pytest.raises(taxiway.OverloadedError) as refused:
            client.submit("talk", {"messages": CHAT["messages"]}, service="live").result(30)
        assert refused.value.retry_after is not None and refused.value.retry_after > AHEAD - 10
    eventually(lambda: counted(crowded)["talk:1", "live", 5.0] >= before["talk:1", "live", 5.0] + 11)
    problems = HTTP.get(f"{fleet.router.http}/v2/fleet").json()["problems"]
    (found,) = [one for one in problems if one["subject"] == "requests"]
    assert "were refused at once" in found["text"]


def test_what_has_the_time_to_wait_is_accepted_meanwhile(fleet: OpenAIFleet, crowded: redis.Redis) -> None:
    with taxiway.Client(fleet.router.http) as client:
        job = client.submit("talk", {"messages": CHAT["messages"]}, service="patient")
        assert job.status().state in ("held", "queued", "running", "succeeded")
        job.cancel()


def counted(store: redis.Redis) -> Counter[tuple[str, str, float]]:
    """The refused requests that the router has counted, by model, service and deadline."""
    found: Counter[tuple[str, str, float]] = Counter()
    for key in store.scan_iter(unserved_key("*")):
        counts: Any = store.hgetall(key)
        read = unserved(0, {terms.decode(): int(count) for terms, count in counts.items()})
        names = [[read.names[column][number] for number in read.jobs[column]] for column in ("model", "service")]
        found.update(zip(*names, read.jobs["deadline"].tolist(), strict=True))
    return found
