"""A router before endpoints: models that they announce, and what becomes of work when one dies."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

import taxiway
from tasks.heartbeat import DeviceFacts
from tasks.settings import Settings
from tests.engine import Engine, serving
from tests.queues import engine_class, queues_of
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.stored import all_facts
from tests.waiting import BUSY
from tests.working import CLASS, SLAB, worker_process, worker_settings

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
        (facts,) = device_facts(settings)
        assert "a model.yaml has the name of 'slab'" in facts.unavailable["slab:1/openai"]
        engine.models.append("acme/Later")
        eventually(lambda: "later" in models(discovering))
        assert client.infer("later", HELLO, timeout=60).outputs["tokens"] == 2
        engine.models.remove("acme/Talk-7B")
        with pytest.raises(taxiway.TaxiwayError):
            eventually(lambda: not client.infer("talk-7b", HELLO, timeout=60))


DEAR = {"device": "cpu", "runtimes": ["python"], "max_batch": 4, "max_wait": 0, "price": {"usd_per_hour": 10}}
REMOTE = (
    SLAB[: SLAB.index("  missing")] + "  remote: {runtime: oip, profiles: {endpoint: {base: 0.01, slope: 0.0001}}}\n"
)


def device_facts(settings: Settings) -> list[DeviceFacts]:
    with redis.Redis.from_url(settings.broker) as store:
        return all_facts(store)


def test_what_waits_and_what_ran_on_an_endpoint_that_dies_runs_elsewhere(settings: Settings, tmp_path: Path) -> None:
    engine = Engine(script="stall")
    with ExitStack() as server:
        server.enter_context(serving(engine))
        own: Any = {"protocol": "oip", "models": {"slab": "slab"}, "health": {"every": 0.2}}
        cheap = engine_class(engine.url.removesuffix("/v1"), slots=1, price=0.01, **own)
        configured = worker_settings(settings, tmp_path, queues_of({"engine": cheap, CLASS: DEAR}, limits={"lease": 1}))
        (configured.models / "slab" / "model.yaml").write_text(REMOTE)
        with (
            worker_process(configured),
            worker_process(configured, "--class", "engine"),
            router_process(configured) as router,
            taxiway.Client(router.http) as client,
        ):
            eventually(lambda: {one.kind for one in device_facts(configured) if one.classes} == {"cpu", "endpoint"})
            eventually(lambda: client.what_if("slab", {"samples": [4], "seed": [0]})["hardware_class"] == "engine")
            jobs = [client.submit("slab", {"samples": [4], "seed": [n]}) for n in range(4)]
            eventually(lambda: engine.begun)
            server.close()
            died = time.monotonic()
            eventually(lambda: [one.kind for one in device_facts(configured) if one.classes] == ["cpu"])
            assert time.monotonic() - died < 2 + BUSY  # two heartbeats
            results = [job.result(timeout=60) for job in jobs]
    assert [result.report.hardware_class for result in results] == ["cpu.batch"] * 4
    assert results[3].outputs["estimate"] == [0.75]
