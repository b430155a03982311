"""An idle device serves a starving class and returns, ordered by a router or by an operator."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import redis
from celery import Celery

from tasks.heartbeat import DeviceFacts
from tasks.settings import Settings
from taxiway import Client, Job
from taxiway.contract.keys import DEVICES
from tests.builders import recorded
from tests.narrowing import present
from tests.routing import EchoDevice, eventually, router_process
from tests.working import worker_process

QUEUES = recorded("fleets/retargeted.yaml")


ROWS = 8
"""Of each of the jobs, which make the class's work last for some seconds."""


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    (tmp_path / "queues.yaml").write_text(QUEUES)
    return replace(settings, queues=tmp_path / "queues.yaml")


def classes_of(store: redis.Redis, worker: str) -> tuple[str, ...]:
    raw = store.hget(DEVICES, worker)
    return msgspec.json.decode(raw, type=DeviceFacts).classes if raw else ()


def test_an_idle_worker_serves_a_class_without_devices_after_its_own_and_goes_back(fleet: Settings) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(redis.Redis.from_url(fleet.broker))
        router = stack.enter_context(router_process(fleet))
        client = stack.enter_context(Client(router.http))
        worker = stack.enter_context(worker_process(fleet, "--class", "cpu.day"))
        jobs: list[Job] = []

        def own_work_passes() -> bool:
            """Whether work of the worker's own class is answered while some of the other's waits."""
            with EchoDevice(fleet, hardware_class="cpu.night", answering=False):
                jobs[:] = [client.submit("paced", [f"hoot {n}"] * ROWS, tenant="owl") for n in range(150)]
            jobs[0].result(timeout=60)
            assert client.infer("echo", "tu-whit", tenant="lark").report.hardware_class == "cpu.day"
            return jobs[-1].status().record.state == "queued"

        eventually(own_work_passes)
        results = [job.result(timeout=60) for job in jobs]
        assert [one.outputs["payload"] for one in results] == [[f"hoot {n}"] * ROWS for n in range(150)]
        reports = [one.report for one in results]
        assert {(one.hardware_class, one.emulated) for one in reports} == {("cpu.night", False)}
        assert max(one.batch for one in reports) <= 2
        assert all(one.cost >= 999 / 3600 * one.run_time / one.batch for one in reports)
        eventually(lambda: classes_of(store, worker.name) == ("cpu.day",))


def test_an_operator_lends_a_worker_by_celerys_own_commands_and_only_where_it_is_fit(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "queues.yaml").write_text(QUEUES)
    app = Celery("operator", broker=settings.broker, backend=settings.broker, set_as_current=False)
    fleet = replace(settings, queues=tmp_path / "queues.yaml")
    with redis.Redis.from_url(fleet.broker) as store, worker_process(fleet, "--class", "cpu.day") as worker:
        (answer,) = present(app.control.add_consumer("gpu.realtime", reply=True, timeout=60, limit=1))
        assert answer == {worker.name: {"error": "the class is for cuda, cpu:0 is cpu"}}
        app.control.add_consumer("cpu.night")
        eventually(lambda: classes_of(store, worker.name) == ("cpu.day", "cpu.night"))
    app.close()
