"""A whole fleet before vLLM's real server: a model that it announces, and requests that carry their level."""

from collections.abc import Iterator
from typing import Any

import pytest

import taxiway
from tasks.settings import Settings
from taxiway.contract.job import Result
from taxiway.errors import RequestTooLargeError
from tests.queues import engine_class, queues_of
from tests.real_engines import VLLM_NAME, vllm
from tests.routing import HTTP
from tests.serving import served_fleet
from tests.working import CLASS, worker_settings

SLOTS = 2
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm(tmp_path_factory.mktemp("vllm"), SLOTS) as url:
        yield url


@pytest.fixture(scope="module")
def client(engine: str, lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[taxiway.Client]:
    served = engine_class(f"{engine}/v1", slots=SLOTS, discover=True, priority=True)
    settings = worker_settings(lasting, tmp_path_factory.mktemp("fleet"), queues_of({CLASS: served}))
    with served_fleet(settings, "tiny-llama") as fleet, taxiway.Client(fleet.router.http) as client:
        yield client


def test_a_chat_has_the_answer_that_the_engine_alone_gives(client: taxiway.Client, engine: str) -> None:
    asked = HELLO | {"model": VLLM_NAME}
    alone = HTTP.post(f"{engine}/v1/chat/completions", json=asked, timeout=60).json()
    outputs = client.infer("tiny-llama", HELLO, timeout=60).outputs
    assert outputs["text"] == alone["choices"][0]["message"]["content"]
    usage = alone["usage"]
    assert (outputs["usage"]["prompt_tokens"], outputs["tokens"]) == (usage["prompt_tokens"], 12)
    *stated, result = client.stream("tiny-llama", HELLO, timeout=60)
    assert isinstance(result, Result)
    assert "".join(map(str, stated)) == result.outputs["text"] == outputs["text"]


def test_more_chats_than_slots_are_answered_whatever_their_priority(client: taxiway.Client) -> None:
    jobs = [client.submit("tiny-llama", HELLO, priority=priority) for priority in ("high", "low") * 4]
    assert len({job.result(timeout=120).outputs["text"] for job in jobs}) == 1


def test_a_prompt_beyond_the_context_that_the_engine_announces_is_refused(client: taxiway.Client) -> None:
    with pytest.raises(RequestTooLargeError):
        client.infer("tiny-llama", {"messages": [{"role": "user", "content": "x" * 2000}]}, timeout=60)
