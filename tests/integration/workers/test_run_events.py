"""What a running callable reports, as Celery's events tell Flower."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tasks.settings import Settings
from tests.integration.workers.test_runs import WALK
from tests.routing import eventually
from tests.working import QUEUES, Tower, add_callable, worker_process, worker_settings


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("warm: [echo, slab]", "warm: [echo, walk]"))
    add_callable(fleet.models, "walk", WALK)
    return fleet


def test_a_report_is_an_event_whose_result_flower_shows(fleet: Settings, producer: Celery) -> None:
    held = fleet.models.parent / "held"
    held.touch()
    heard: list[dict[str, Any]] = []
    with worker_process(fleet), Tower(fleet) as tower, producer.connection_for_read() as connection:
        receiver = producer.events.Receiver(connection, handlers={"*": heard.append})
        listening = threading.Thread(target=lambda: receiver.capture(limit=None, timeout=None, wakeup=False))
        listening.daemon = True
        listening.start()
        eventually(lambda: heard)  # a heartbeat
        job = tower.order("walk", {"steps": 100, "seed": 1, "every": 25}, variant="python")

        def shown() -> list[str]:
            events = [event for event in list(heard) if event.get("uuid") == job]
            return [event["result"] for event in events if event["type"] == "task-progress"]

        eventually(lambda: "51 %: 51 steps" in shown())
        receiver.should_stop = True
        held.unlink()
        tower.result(job)
        listening.join(10)
