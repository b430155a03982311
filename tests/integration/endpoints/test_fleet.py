"""A router before endpoints: models that they announce, and what becomes of work when one dies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import taxiway
from tasks.settings import Settings
from tests.engine import Engine, serving
from tests.queues import engine_class, queues_of
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.stored import all_facts
from tests.working import worker_process, worker_settings

HELLO = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 9}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with serving(Engine(models=["acme/Talk-7B", "slab", "acme/embed"])) as engine:
        yield engine


@pytest.fixture
def discovering(settings: Settings, tmp_path: Path, engine: Engine) -> Iterator[RouterProcess]:
    finds: Any = {"discover": True, "health": {"every": 0.2}}
    tensors = engine_class(engine.url.removesuffix("/v1"), protocol="oip", **finds)
    queues = queues_of({"engine": engine_class(engine.url, **finds), "tensors": tensors})
    configured = worker_settings(settings, tmp_path, queues)
    with worker_process(configured, "--class", "engine"), router_process(configured) as router:
        yield router


def models(router: RouterProcess) -> dict[str, Any]:
    return {one["name"]: one for one in HTTP.get(f"{router.http}/v2/models").json()["models"]}


def test_a_model_that_an_endpoint_announces_is_served_without_a_model_yaml(
    discovering: RouterProcess, engine: Engine, settings: Settings
) -> None:
    eventually(lambda: "talk-7b" in models(discovering))
    with taxiway.Client(discovering.http) as client:
        eventually(lambda: client.infer("talk-7b", HELLO, timeout=60).outputs["text"] == "Hello there ")
        assert engine.chats[-1]["model"] == "acme/Talk-7B"
        assert client.infer("acme/Talk-7B", HELLO, timeout=60).outputs["text"] == "Hello there "
        embedded = {"model": "acme/embed", "input": ["a", "bc"]}
        answer = HTTP.post(f"{discovering.http}/v1/embeddings", json=embedded, timeout=60).json()
        assert [one["embedding"] for one in answer["data"]] == [[1.0, 1.0], [2.0, 1.0]]
        assert models(discovering)["slab"]["variants"].keys() == {"missing", "python"}  # a model.yaml keeps its name
        with redis.Redis.from_url(settings.broker) as store:
            (facts,) = all_facts(store)
        assert "a model.yaml has the name of 'slab'" in facts.unavailable["slab:1/openai"]
        engine.models.append("acme/Later")
        eventually(lambda: "later" in models(discovering))
        assert client.infer("later", HELLO, timeout=60).outputs["tokens"] == 2
        engine.models.remove("acme/Talk-7B")
        with pytest.raises(taxiway.TaxiwayError):
            eventually(lambda: not client.infer("talk-7b", HELLO, timeout=60))
