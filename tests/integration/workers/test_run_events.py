"""What a running callable reports, as Celery's events tell Flower."""

import uuid
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signature

from tasks.settings import Settings
from taxiway.contract.keys import job_key
from tests.producing import hearing
from tests.routing import eventually
from tests.working import QUEUES, Tower, add_callable, worker_process, worker_settings


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("warm: [echo, slab]", "warm: [echo, walk]"))
    add_callable(fleet.models, "walk")
    return fleet


@pytest.mark.parametrize("followed", [False, True])  # what a link follows is run by Celery itself
def test_a_report_is_an_event_whose_result_flower_shows_and_a_state_of_celery(
    fleet: Settings, producer: Celery, followed: bool
) -> None:
    held = fleet.models.parent / "held"
    held.touch()
    received: list[dict[str, Any]] = []
    with worker_process(fleet), Tower(fleet) as tower, hearing(producer, received.append):
        eventually(lambda: received)  # a heartbeat
        job = str(uuid.uuid4())
        tower.state.hset(job_key(job), "state", "queued")  # as a router's record has it
        canvas = {"callbacks": [signature("lab.next", queue="lab.link", app=producer)]} if followed else {}
        tower.order("walk", {"steps": 100, "seed": 1, "every": 25}, variant="python", job=job, canvas=canvas)

        def shown() -> list[str]:
            events = [event for event in list(received) if event.get("uuid") == job]
            return [event["result"] for event in events if event["type"] == "task-progress"]

        eventually(lambda: "51 %: 51 steps" in shown())
        seen: Any = producer.AsyncResult(job)
        eventually(lambda: seen.state == "PROGRESS" and seen.info["message"] == "51 steps")  # as is stored later
        held.unlink()
        tower.result(job)
