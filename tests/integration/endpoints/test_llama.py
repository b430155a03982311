"""A whole fleet before llama.cpp's real server: Valkey, a router, an endpoint's worker, and the model SmolLM2."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

import taxiway
from tasks.settings import TREE, Settings
from taxiway.errors import InvalidRequestError, JobCancelledError, RequestTooLargeError
from tests.builders import a_chat
from tests.llama import NAME, llama_server
from tests.queues import engine_class, queues_of
from tests.routing import HTTP, eventually
from tests.serving import ServedFleet, served_fleet
from tests.working import CLASS, worker_settings

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama.cpp to test with"),
]

SLOTS = 4
HELLO = a_chat("What is the capital of France?", max_tokens=24, temperature=0)
ENDLESS = a_chat("Count from one to a thousand, in words.", max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with llama_server(SLOTS) as url:
        yield url


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, llama: str, lasting: Settings) -> Iterator[ServedFleet]:
    queues = queues_of({CLASS: engine_class(f"{llama}/v1", models={"chat": NAME})}, {"standard": {"deadline": 120}})
    settings = worker_settings(lasting, tmp_path_factory.mktemp("fleet"), queues)
    (settings.models / "chat").symlink_to(TREE / "models" / "chat")
    with served_fleet(settings, "chat") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def interfaces(fleet: ServedFleet) -> dict[str, str]:
    return fleet.interfaces


def busy(llama: str) -> int:
    """Slots of the engine that generate now."""
    return sum(slot["is_processing"] for slot in HTTP.get(f"{llama}/slots").json())


def test_a_cancelled_chat_leaves_its_slot_at_once(client: taxiway.Client, llama: str) -> None:
    eventually(lambda: busy(llama) == 0, within=30)
    job = client.submit("chat", ENDLESS)
    eventually(lambda: busy(llama) == 1, within=30)
    job.cancel()
    eventually(lambda: busy(llama) == 0)
    with pytest.raises(JobCancelledError):
        job.result(timeout=60)


def test_a_chat_that_is_too_long_is_refused_in_the_engines_words(client: taxiway.Client) -> None:
    long = a_chat("far " * 1500, max_tokens=8)
    with pytest.raises(RequestTooLargeError, match="exceeds the available context size"):
        client.infer("chat", long, timeout=60)


@pytest.mark.parametrize("tools", [[{"type": "function"}], [{"type": "other", "function": {}}]])
def test_wrong_tools_are_refused_in_the_engines_words_and_not_tried_again(client: taxiway.Client, tools: Any) -> None:
    with pytest.raises(InvalidRequestError):
        client.infer("chat", HELLO | {"tools": tools}, timeout=60)
