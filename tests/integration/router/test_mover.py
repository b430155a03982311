import json
import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.events.state import Task

from tasks.settings import Settings
from taxiway.contract.job import Result, read_meta, read_result
from taxiway.contract.keys import ARRIVALS, WORK, job_key, priority_list, priority_lists, result_key, turns_cell
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from tests.builders import recorded
from tests.narrowing import as_bytes
from tests.producing import hearing
from tests.routing import EchoDevice, eventually, router_process
from tests.stored import fields_of, is_listened_to

QUEUES = recorded("fleets/movable.yaml")


@pytest.fixture
def twins(settings: Settings, tmp_path: Path) -> Settings:
    """Two classes of the same price, for the paced model."""
    (tmp_path / "queues.yaml").write_text(QUEUES)
    return replace(settings, queues=tmp_path / "queues.yaml")


@dataclass
class Fleet:
    store: redis.Redis

    def send(self, count: int, **terms: Any) -> list[str]:
        jobs = [str(uuid.uuid4()) for _ in range(count)]
        for job in jobs:
            message = infer_message(job, Request(model="paced", inputs=job, **terms), reply="", origin="test")
            self.store.lpush(priority_list(ARRIVALS, 1), message)
        return jobs

    def waiting(self, hardware_class: str) -> int:
        return sum(int(self.store.llen(name)) for name in priority_lists(hardware_class))

    def results(self, jobs: list[str]) -> list[Any]:
        return list(self.store.mget([result_key(job) for job in jobs]))

    def result(self, job: str) -> Result:
        return read_result(read_meta(eventually(lambda: self.store.get(result_key(job)))))


@contextmanager
def fleet_of(settings: Settings) -> Iterator[Fleet]:
    with redis.Redis.from_url(settings.broker) as store:
        yield Fleet(store)


def test_waiting_work_moves_to_a_class_that_became_idle_and_runs_once_but_nothing_that_no_router_signed(
    twins: Settings,
) -> None:
    with fleet_of(twins) as fleet, ExitStack() as stack:
        stack.enter_context(router_process(twins))
        first = stack.enter_context(EchoDevice(twins, hardware_class="cpu.a", answering=False))
        jobs = fleet.send(600)
        eventually(lambda: fleet.waiting("cpu.a") == 600)
        name = priority_list("cpu.a", 2)
        forged = json.loads(as_bytes(fleet.store.lpop(name)))
        forged["headers"]["taxiway"] = forged["headers"]["taxiway"].replace("level", "Level")
        fleet.store.lpush(name, json.dumps(forged))
        second = stack.enter_context(EchoDevice(twins, hardware_class="cpu.b"))
        eventually(lambda: len(second.done) > 100)
        assert len(set(second.done)) == len(second.done)
        moved = second.done[0]
        record = fields_of(fleet.store, job_key(moved))
        assert record["hardware_class"] == "cpu.b"
        assert 0 <= int(record["turn"]) < int(as_bytes(fleet.store.hget(WORK, turns_cell(record["cell"]))))
        (move,) = json.loads(record["moves"])
        assert (move["source"], move["target"]) == ("cpu.a", "cpu.b")
        assert move["kind"] in ("balance", "save")
        result = fleet.result(moved)
        assert result.outputs == {"payload": moved}
        assert result.report.reason.startswith(f"{move['kind']}: ")
        assert set(jobs) >= set(second.done)
        assert first.done == []
        left = [json.loads(raw)["headers"]["id"] for raw in fleet.store.lrange(name, 0, -1)]
        assert forged["headers"]["id"] in left


def has_more_than(device: EchoDevice, count: int, of: int) -> bool:
    return len(device.done) > count or count == of


def test_every_job_is_answered_once_while_those_that_lead_are_killed(twins: Settings) -> None:
    with fleet_of(twins) as fleet, ExitStack() as stack:
        with router_process(twins), EchoDevice(twins, hardware_class="cpu.a", answering=False):
            jobs = fleet.send(800)
            eventually(lambda: fleet.waiting("cpu.a") == 800, within=60)
        idle = stack.enter_context(EchoDevice(twins, hardware_class="cpu.b"))
        with EchoDevice(twins, hardware_class="cpu.a", answering=False):
            for _ in range(4):
                more = partial(has_more_than, idle, len(idle.done), len(jobs))
                with router_process(twins) as router:
                    eventually(more)
                    os.kill(router.process.pid, signal.SIGKILL)
        busy = stack.enter_context(EchoDevice(twins, hardware_class="cpu.a"))
        eventually(lambda: all(fleet.results(jobs)), within=120)
        assert sorted(idle.done + busy.done) == sorted(jobs)


def test_celerys_events_show_in_which_queue_a_moved_job_waits(twins: Settings) -> None:
    with fleet_of(twins) as fleet, ExitStack() as stack:
        app = stack.enter_context(Celery(broker=twins.broker, set_as_current=False))
        state = app.events.State()

        def waiting_in(queue: str) -> list[Task]:
            return state.freeze_while(lambda: [task for task in state.tasks.values() if task.routing_key == queue])

        stack.enter_context(hearing(app, state.event))
        stack.enter_context(router_process(twins))
        stack.enter_context(EchoDevice(twins, hardware_class="cpu.a", answering=False))
        eventually(lambda: is_listened_to(fleet.store))
        fleet.send(200)
        eventually(lambda: len(waiting_in("cpu.a")) == 200)
        stack.enter_context(EchoDevice(twins, hardware_class="cpu.b", answering=False))
        (first, *_) = eventually(lambda: waiting_in("cpu.b"))
        assert (first.state, first.kwargs.partition(":")[0]) == ("PENDING", "paced")
        assert "on cpu.b/paced: balance: " in first.kwargs or "on cpu.b/paced: save: " in first.kwargs


def renamed(settings: Settings, was: str, name: str) -> None:
    """The class has another name in queues.yaml from now on."""
    settings.queues.write_text(settings.queues.read_text().replace(f"{was}:", f"{name}:"))


def test_what_waits_for_a_class_that_was_renamed_runs_in_another(twins: Settings) -> None:
    with fleet_of(twins) as fleet:
        with router_process(twins), EchoDevice(twins, hardware_class="cpu.a", answering=False):
            jobs = fleet.send(40)
            eventually(lambda: fleet.waiting("cpu.a") == 40)
        renamed(twins, "cpu.a", "cpu.c")
        with router_process(twins), EchoDevice(twins, hardware_class="cpu.c") as device:
            eventually(lambda: all(fleet.results(jobs)))
            assert sorted(device.done) == sorted(jobs)
            assert fleet.waiting("cpu.a") == 0
            result = fleet.result(jobs[0])
            assert result.report.reason.startswith("rescue: cpu.a is not in queues.yaml; ")
