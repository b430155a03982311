"""Two engines of one class: chats go where their prefix was read, as long as no slot idles for it, and none is lost."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import taxiway
from tasks.settings import Settings
from tests.builders import add_engine_models
from tests.engine import Engine, serving
from tests.queues import engine_class, queues_of
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.waiting import BUSY
from tests.working import WorkerProcess, worker_process, worker_settings

CONVERSATIONS, TURNS = 4, 5


class Fleet:
    """The engines, with a worker each, and a router."""

    def __init__(self, engines: list[Engine], workers: list[WorkerProcess], router: RouterProcess) -> None:
        self.engines, self.workers = engines, workers
        self.client = taxiway.Client(router.http)
        self._http = router.http

    def why(self, job: str) -> Any:
        """Why a job ran where it did."""
        return HTTP.get(f"{self._http}/v2/jobs/{job}/placement").json()

    @property
    def devices(self) -> int:
        """How many devices the router sees that take work."""
        shown = HTTP.get(f"{self._http}/v2/fleet").json()
        return sum(device.get("serves") != [] for device in shown["devices"])

    def where(self, text: str) -> int:
        """The index of the engine that was asked with this last."""
        return next(
            number
            for number, engine in enumerate(self.engines)
            if any(chat["messages"][-1]["content"] == text for chat in engine.chats)
        )


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        engines = [stack.enter_context(serving(Engine())) for _ in range(2)]
        urls = [engine.url for engine in engines]
        engine = engine_class(urls, slots=2, models={"talk": "served"}, health={"every": 0.2})
        reason = worker_settings(settings, tmp_path, queues_of({"engine": engine}, limits={"lease": 5}))
        add_engine_models(reason.models, "talk")
        options = [("--class", "engine", "--device", f"endpoint:{number}") for number in range(2)]
        workers = [stack.enter_context(worker_process(reason, *one)) for one in options]
        router = stack.enter_context(router_process(reason))
        fleet = Fleet(engines, workers, router)
        stack.enter_context(fleet.client)
        eventually(lambda: fleet.devices == 2)
        yield fleet


def chat(conversation: int, text: str) -> dict[str, Any]:
    """A turn of a conversation that begins with some 3,000 characters of its own."""
    instructions = f"You know number {conversation} by heart. " * 100
    return {"messages": [{"role": "system", "content": instructions}, {"role": "user", "content": text}]}


def ask(fleet: Fleet, conversation: int, text: str) -> str:
    """The job of a turn, which has ended."""
    job = fleet.client.submit("talk", chat(conversation, text))
    job.result(timeout=60)
    return job.id


def test_at_low_load_each_conversation_stays_on_the_replica_that_began_it(fleet: Fleet) -> None:
    home, preferred = dict[int, int](), 0
    for turn in range(TURNS):
        for conversation in range(CONVERSATIONS):
            text = f"turn {turn} of {conversation}"
            why = fleet.why(ask(fleet, conversation, text))
            if why["led_to"]:
                preferred += 1
                assert fleet.where(text) == home[conversation]
                assert why["led_to"] == fleet.workers[home[conversation]].name
            home[conversation] = fleet.where(text)
    # A worker says each second anew that it waits: a chat that comes in this instant goes to any replica.
    assert preferred >= CONVERSATIONS * (TURNS - 1) / 2
    reason = "tokens of the prompt were read there before"
    asked = eventually(lambda: reason in (seen := fleet.client.what_if("talk", chat(1, "more")))["reason"] and seen)
    assert asked["considered"][0]["saved"] > 0


def test_at_high_load_no_slot_idles_while_a_chat_waits_for_the_replica_of_its_prefix(fleet: Fleet) -> None:
    ask(fleet, 1, "first")
    texts = [f"wait=0.05 a b c d {number}" for number in range(16)]
    jobs = [fleet.client.submit("talk", chat(1, text)) for text in texts]
    assert all(job.result(timeout=60).outputs["text"].endswith(f"{number} ") for number, job in enumerate(jobs))
    places = [fleet.where(text) for text in texts]
    assert min(places.count(0), places.count(1)) >= 3
    assert [engine.most for engine in fleet.engines] == [2, 2]


def test_what_was_led_to_a_worker_that_dies_runs_on_the_other(fleet: Fleet) -> None:
    ask(fleet, 1, "first")
    home = fleet.where("first")
    fleet.workers[home].process.kill()
    fleet.workers[home].process.wait()
    began = time.monotonic()
    jobs = [fleet.client.submit("talk", chat(1, f"again {number}")) for number in range(4)]
    results = [job.result(timeout=60) for job in jobs]
    assert [result.outputs["text"] for result in results] == [f"again {number} " for number in range(4)]
    assert [fleet.where(f"again {number}") for number in range(4)] == [1 - home] * 4
    assert time.monotonic() - began < 5 + BUSY
