"""Generations that are cut and go on, at llama.cpp's real servers: two replicas with a worker each, and a router."""

from __future__ import annotations

import json
import os
import secrets
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
from broker.valkey.claims import YieldAnswer, YieldAsk, yield_call
from local.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings, settings_from
from taxiway.contract.job import Result
from taxiway.contract.keys import job_key
from tests.llama import NAME, llama_server, llama_server_process
from tests.routing import RouterProcess, eventually, router_process
from tests.working import WorkerProcess, worker_process, worker_settings

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed: no llama.cpp to test with"),
]

QUEUES = """
hardware:
  cpu.batch:
    device: endpoint
    endpoint: {{protocol: openai, url: ["{first}/v1", "{second}/v1"], slots: 2, models: {{chat: {name}}}}}
    price: {{usd_per_hour: 0.1}}
service:
  standard: {{deadline: 120}}
  bulk: {{deadline: 900, priority: low, preemptible: true}}
default_service: standard
limits: {{lease: 1, grace: 1}}
"""
STORY = {
    "messages": [{"role": "user", "content": "Tell a story of a fox, with an é and a — in it."}],
    "max_tokens": 48,
    "temperature": 0,
    "repeat_penalty": 1.1,
}


@dataclass
class Fleet:
    settings: Settings
    router: RouterProcess
    workers: dict[str, WorkerProcess]
    state: redis.Redis

    def holder(self, job: str) -> str:
        """The token of the job's claim."""
        return (self.state.hget(job_key(job), "holder") or b"").decode().partition(" ")[0]  # type: ignore[union-attr]

    def worker(self, job: str) -> WorkerProcess:
        """The worker that holds the job."""
        return self.workers[self.holder(job).rpartition("#")[0]]

    def device(self, job: str) -> str:
        """Where the job runs."""
        return (self.state.hget(job_key(job), "device") or b"").decode()  # type: ignore[union-attr]

    def ask_to_yield(self, job: str) -> bool:
        ask = YieldAsk(job, self.holder(job), "a live chat waits")
        return bool(run(self.state, yield_call(5.0, [ask])) == [YieldAnswer.ASKED])


@contextmanager
def fleet_before(llamas: Sequence[str], folder: Path) -> Iterator[Fleet]:
    """A fleet whose replicas are these servers."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedValkey(folder / "valkey"))
        told = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        settings = worker_settings(told, folder, QUEUES.format(first=llamas[0], second=llamas[1], name=NAME))
        (settings.models / "chat").symlink_to(TREE / "models" / "chat")
        started = [stack.enter_context(worker_process(settings, "--device", f"endpoint:{n}")) for n in (0, 1)]
        router = stack.enter_context(router_process(settings))
        eventually(lambda: httpx.get(f"{router.http}/v2/models/chat/ready", trust_env=False).is_success)
        state = stack.enter_context(redis.Redis.from_url(settings.broker))
        yield Fleet(settings, router, {worker.name: worker for worker in started}, state)


@pytest.fixture(scope="module")
def llamas() -> Iterator[list[str]]:
    with llama_server(2) as first, llama_server(2) as second:
        yield [first, second]


@pytest.fixture
def fleet(tmp_path: Path, llamas: list[str]) -> Iterator[Fleet]:
    with fleet_before(llamas, tmp_path) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[taxiway.Client]:
    with taxiway.Client(fleet.settings.broker) as client:
        yield client


def told_of(client: taxiway.Client, cut: Any, cuts: list[int]) -> tuple[list[Any], Result]:
    """All that a reader of the story was told, and its result; `cut` is called once that many events came."""
    told: list[Any] = []
    job = client.submit("chat", STORY, service="bulk", stream=True)
    for event in job.stream(timeout=60):
        told.append(event)
        if len(told) in cuts:
            cut(job.id)
    *events, result = told
    assert isinstance(result, Result)
    return events, result


def test_a_greedy_story_that_yields_at_any_point_is_the_undisturbed_one(fleet: Fleet, client: taxiway.Client) -> None:
    whole = client.infer("chat", STORY, timeout=60)
    for cuts in ([1], [7, 20], [30]):
        events, result = told_of(client, fleet.ask_to_yield, cuts)
        assert_undisturbed(events, result, whole)
        assert result.outputs["usage"]["prompt_tokens"] == whole.outputs["usage"]["prompt_tokens"]
        parts = result.report.parts
        assert len(parts) == len(cuts) + 1
        assert sum(part.text for part in parts) == len(result.outputs["text"])
        assert result.report.tokens is not None
        assert result.report.tokens.output == sum(part.tokens.output for part in parts) == 48
        assert {part.seam for part in parts[1:]} == {"continued"}
        assert {part.ended for part in parts[:-1]} == {"a live chat waits"}


def assert_undisturbed(events: list[Any], result: Result, whole: Result) -> None:
    """What a reader was told is the text that the engine gives undisturbed, each token once."""
    assert all(isinstance(event, str) for event in events)
    assert "".join(events) == result.outputs["text"] == whole.outputs["text"]
    assert result.outputs["usage"]["completion_tokens"] == 48


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_a_reader_misses_nothing_of_a_worker_that_goes(fleet: Fleet, client: taxiway.Client, how: int) -> None:
    whole = client.infer("chat", STORY, timeout=60)
    events, result = told_of(client, lambda job: os.kill(fleet.worker(job).process.pid, how), [12])
    assert_undisturbed(events, result, whole)
    assert [part.seam for part in result.report.parts] == ["", "continued"]


def test_a_reader_misses_nothing_of_an_engine_that_is_lost(tmp_path: Path, llamas: list[str]) -> None:
    with ExitStack() as stack:
        lost = stack.enter_context(llama_server_process(2))
        fleet = stack.enter_context(fleet_before([lost.url, llamas[1]], tmp_path))
        client = stack.enter_context(taxiway.Client(fleet.settings.broker))
        whole = client.infer("chat", STORY, timeout=60)
        cut = list[str]()

        def end(job: str) -> None:
            cut.append(fleet.device(job))
            if cut[0] == "endpoint:0":
                lost.kill()
            else:
                fleet.ask_to_yield(job)

        events, result = told_of(client, end, [12])
        assert_undisturbed(events, result, whole)


def test_a_chat_for_more_than_text_does_not_yield(fleet: Fleet, client: taxiway.Client) -> None:
    shaped = STORY | {"response_format": {"type": "json_object"}, "max_tokens": 12}
    job = client.submit("chat", shaped, service="bulk", stream=True)
    events = job.stream(timeout=60)
    next(events)
    assert fleet.ask_to_yield(job.id)
    *_, result = events
    assert isinstance(result, Result)
    assert result.report.parts == ()


def test_an_openai_stream_goes_on_over_the_seam(fleet: Fleet, client: taxiway.Client) -> None:
    whole = client.infer("chat", STORY, timeout=60)
    body = STORY | {"model": "chat", "stream": True, "service": "bulk", "stream_options": {"include_usage": True}}
    text, chunks, job = "", 0, ""
    with httpx.stream("POST", f"{fleet.router.http}/v1/chat/completions", json=body, trust_env=False) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            chunks, job = chunks + 1, chunk["id"].partition("-")[2]
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if chunks == 9:
                assert fleet.ask_to_yield(job)
    assert text == whole.outputs["text"]
    assert chunk["usage"]["completion_tokens"] == 48
