"""Generations that are cut and go on, at llama.cpp's real servers: two replicas with a worker each, and a router."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import taxiway
from broker.valkey import run
from broker.valkey.jobs import YieldAnswer, YieldAsk, yield_call
from tasks.heartbeat import DeviceFacts
from tasks.settings import TREE, Settings
from taxiway.contract.job import Result
from taxiway.contract.keys import job_key
from tests.builders import a_chat
from tests.llama import NAME, llama_server, llama_server_process
from tests.narrowing import as_bytes
from tests.queues import engine_class, queues_of
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.serving import is_ready
from tests.stored import all_facts
from tests.working import CLASS, WorkerProcess, worker_process, worker_settings

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama.cpp to test with"),
]

SERVICES: dict[str, Any] = {
    "standard": {"deadline": 120},
    "live": {"deadline": 10, "priority": "high"},
    "bulk": {"deadline": 3600, "priority": "low", "preemptible": True},
}
LIMITS = {"lease": 1, "grace": 1}
TOKENS = 48
TALE = "Tell a story of a fox, with an é and a — in it."
STORY = a_chat(TALE, max_tokens=TOKENS, temperature=0, repeat_penalty=1.1)


@dataclass
class Fleet:
    settings: Settings
    router: RouterProcess
    workers: dict[str, WorkerProcess]
    state: redis.Redis

    def holder(self, job: str) -> str:
        """The token of the job's claim."""
        return self._field(job, "holder").partition(" ")[0]

    def worker(self, job: str) -> WorkerProcess:
        """The worker that holds the job."""
        return self.workers[self.holder(job).rpartition("#")[0]]

    def device(self, job: str) -> str:
        """Where the job runs."""
        return self._field(job, "device")

    def _field(self, job: str, name: str) -> str:
        return as_bytes(self.state.hget(job_key(job), name) or b"").decode()

    def devices(self) -> list[DeviceFacts]:
        """What the workers' heartbeats say."""
        return all_facts(self.state)

    def ask_to_yield(self, job: str) -> bool:
        ask = YieldAsk(job, self.holder(job), "a live chat waits")
        return bool(run(self.state, yield_call(5.0, [ask])) == [YieldAnswer.ASKED])


def settings_with(settings: Settings, folder: Path, **classes: Any) -> Settings:
    """Settings of a fleet with these classes, whose model is a chat."""
    configured = worker_settings(settings, folder, queues_of(classes, SERVICES, LIMITS))
    (configured.models / "chat").symlink_to(TREE / "models" / "chat")
    return configured


@contextmanager
def fleet_before(llamas: Sequence[str], base: Settings, folder: Path) -> Iterator[Fleet]:
    """A fleet whose replicas are these servers."""
    served = engine_class([f"{url}/v1" for url in llamas], slots=2, price=0.1, models={"chat": NAME})
    settings = settings_with(base, folder, **{CLASS: served})
    with ExitStack() as stack:
        started = [
            stack.enter_context(worker_process(settings, "--device", f"endpoint:{n}")) for n in range(len(llamas))
        ]
        router = stack.enter_context(router_process(settings))
        eventually(lambda: is_ready(router, "chat"))
        state = stack.enter_context(redis.Redis.from_url(settings.broker))
        yield Fleet(settings, router, {worker.name: worker for worker in started}, state)


@pytest.fixture(scope="module")
def llamas() -> Iterator[list[str]]:
    with llama_server(2) as first, llama_server(2) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def fleet(lasting: Settings, tmp_path_factory: pytest.TempPathFactory, llamas: list[str]) -> Iterator[Fleet]:
    """For tests that leave it as it is."""
    with fleet_before(llamas, lasting, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def own(settings: Settings, tmp_path: Path, llamas: list[str]) -> Iterator[Fleet]:
    """A fleet of a test's own."""
    with fleet_before(llamas, settings, tmp_path) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[taxiway.Client]:
    with taxiway.Client(fleet.settings.broker) as client:
        yield client


def told_of(client: taxiway.Client, cut: Any, cuts: list[int], chat: Any = STORY) -> tuple[list[Any], Result]:
    """All that a reader of the answer was told, and its result; `cut` is called once that many events came."""
    configured: list[Any] = []
    job = client.submit("chat", chat, service="bulk", stream=True)
    for event in job.stream(timeout=60):
        configured.append(event)
        if len(configured) in cuts:
            cut(job.id)
    *events, result = configured
    assert isinstance(result, Result)
    return events, result


def assert_seamless(events: list[Any], result: Result) -> None:
    """A reader was told the text of the result, each token once, and that is as long as it may be."""
    assert all(isinstance(event, str) for event in events)
    assert "".join(events) == result.outputs["text"]
    assert result.outputs["usage"]["completion_tokens"] == TOKENS


@pytest.mark.parametrize("cuts", [[1], [7, 20], [30]])
def test_a_story_that_yields_at_any_point_goes_on_after_it(
    fleet: Fleet, client: taxiway.Client, cuts: list[int]
) -> None:
    events, result = told_of(client, fleet.ask_to_yield, cuts)
    assert_seamless(events, result)
    parts = result.report.parts
    assert 1 < len(parts) <= len(cuts) + 1
    assert sum(part.text for part in parts) == len(result.outputs["text"])
    assert {part.seam for part in parts[1:]} == {"continued"}
    assert {part.ended for part in parts[:-1]} == {"a live chat waits"}
    report, usage = result.report, result.outputs["usage"]
    assert report.tokens is not None
    assert report.tokens.output == sum(part.tokens.output for part in parts)
    assert report.cost == pytest.approx(sum(part.cost for part in parts))
    assert usage["prompt_tokens"] == parts[0].tokens.input
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_a_reader_misses_nothing_of_a_worker_that_goes(own: Fleet, how: int) -> None:
    with taxiway.Client(own.settings.broker) as client:
        events, result = told_of(client, lambda job: os.kill(own.worker(job).process.pid, how), [12])
    assert_seamless(events, result)
    assert result.report.parts[-1].seam == "continued"  # what a killed worker used is known if it was kept before


def test_a_reader_misses_nothing_of_an_engine_that_is_lost(
    settings: Settings, tmp_path: Path, llamas: list[str]
) -> None:
    with ExitStack() as stack:
        lost = stack.enter_context(llama_server_process(2))
        fleet = stack.enter_context(fleet_before([lost.url, llamas[1]], settings, tmp_path))
        client = stack.enter_context(taxiway.Client(fleet.settings.broker))
        cut = list[str]()

        def end(job: str) -> None:
            cut.append(fleet.device(job))
            if cut[0] == "endpoint:0":
                lost.kill()
            else:
                fleet.ask_to_yield(job)

        events, result = told_of(client, end, [12])
        assert_seamless(events, result)


def test_an_openai_stream_goes_on_over_the_seam(fleet: Fleet, client: taxiway.Client) -> None:
    body = STORY | {"model": "chat", "stream": True, "service": "bulk", "stream_options": {"include_usage": True}}
    text, chunks, job = "", 0, ""
    with HTTP.stream("POST", f"{fleet.router.http}/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            chunks, job = chunks + 1, chunk["id"].partition("-")[2]
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if chunks == 9:
                assert fleet.ask_to_yield(job)
    assert text == client.job(job).result(timeout=60).outputs["text"]
    assert chunk["usage"]["completion_tokens"] == TOKENS


def test_a_live_chat_that_would_be_late_gets_the_slot_of_a_bulk_generation(own: Fleet) -> None:
    with taxiway.Client(own.settings.broker) as client:
        long = STORY | {"max_tokens": 900, "ignore_eos": True}
        bulk = [client.submit("chat", long, service="bulk") for _ in range(4)]
        eventually(lambda: sum(len(one.yieldable) for one in own.devices()) == 4)
        result = client.infer("chat", STORY | {"max_tokens": 4}, service="live", timeout=60)
        assert result.outputs["tokens"] == 4
        cut = [job for job in bulk if own.state.hget(job_key(job.id), "yields")]
        assert len(cut) == 1
        with httpx.Client(base_url=own.router.http, trust_env=False) as http:
            parts = http.get(f"/v2/jobs/{cut[0].id}/placement").json()["parts"]
            assert parts[0]["ended"].startswith("yields to ")
            assert 'taxiway_yields_total{class="cpu.batch"} 1.0' in http.get("/metrics").text
            assert http.get("/v2/fleet").json()["moves"][0]["kind"] == "yield"
        for job in bulk:
            job.cancel()
