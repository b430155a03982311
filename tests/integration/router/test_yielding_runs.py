"""Running callables that yield their device to urgent jobs, and move to other classes: real routers and workers."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import taxiway
from tasks.models.files import Code
from tasks.settings import TREE, Settings
from taxiway import Run
from taxiway.contract.job import JobState
from tests.builders import recorded
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.waiting import BUSY
from tests.working import add_callable, worker_process, worker_settings

ISING = TREE / "models" / "ising"
QUEUES = recorded("fleets/yielding.yaml")
INPUTS = {"size": 16, "temperature": 2.1, "sweeps": 40_000, "seed": 3}
STEPS = {"steps": 100, "seed": 1, "every": 0}


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    fleet = worker_settings(settings, tmp_path, QUEUES)
    (fleet.models / "ising").symlink_to(ISING)
    add_callable(fleet.models, "walk")
    return fleet


@pytest.fixture
def router(fleet: Settings) -> Iterator[RouterProcess]:
    with router_process(fleet) as router:
        yield router


@pytest.fixture
def client(router: RouterProcess) -> Iterator[taxiway.Client]:
    with taxiway.Client(router.http) as client:
        yield client


@cache
def undisturbed() -> Any:
    return Code(f"{ISING / 'ising'}.py:call").load()(**INPUTS, run=Run())


def can_yield(client: taxiway.Client) -> bool:
    """Whether a running job can; its claim's token is not shown."""
    running = [one for device in client.fleet()["devices"] for one in device.get("yieldable", ())]
    assert all(token == "" for _, token, *_ in running)
    return bool(running)


def ready(router: RouterProcess, model: str) -> None:
    eventually(lambda: HTTP.get(f"{router.http}/v2/models/{model}/ready").is_success)


def test_a_long_run_yields_to_an_urgent_callable_and_ends_with_the_same_bytes(
    fleet: Settings, router: RouterProcess, client: taxiway.Client
) -> None:
    with worker_process(fleet):
        ready(router, "walk")
        job = client.submit("ising", INPUTS)
        eventually(lambda: can_yield(client))
        live = client.infer("walk", STEPS, service="live", timeout=60)
        assert live.report.queue_wait < 3 + BUSY
        waiting = HTTP.get(f"{router.http}/v2/jobs/{job.id}/placement").json()
        result = job.result(timeout=120)
    assert waiting["yielded"].startswith("yields to ")
    assert result.outputs == undisturbed()
    assert result.report.checkpoints.startswith(f"{waiting['yielded']}; resumed from a checkpoint")
    metrics = HTTP.get(f"{router.http}/metrics").text
    assert 'taxiway_yields_total{class="cpu.batch"} 1.0' in metrics
    assert client.fleet()["moves"][0]["kind"] == "yield"


def test_a_long_run_yields_to_a_callable_that_was_placed_before_a_heartbeat_listed_it(
    fleet: Settings, router: RouterProcess, client: taxiway.Client
) -> None:
    with worker_process(fleet):
        ready(router, "walk")
        job = client.submit("ising", INPUTS)
        eventually(lambda: job.status().state is JobState.RUNNING)
        client.infer("walk", STEPS, service="live", deadline=20, timeout=60)
        yielded = HTTP.get(f"{router.http}/v2/jobs/{job.id}/placement").json()["yielded"]
        job.cancel()
    assert yielded.startswith("yields to ")


def test_a_long_run_goes_on_where_it_is_cheaper_and_ends_with_the_same_bytes(
    fleet: Settings, router: RouterProcess, client: taxiway.Client
) -> None:
    with worker_process(fleet, "--class", "cpu.dear"):
        ready(router, "ising")
        job = client.submit("ising", INPUTS)
        eventually(lambda: job.status().state is JobState.RUNNING)
        with worker_process(fleet, "--device", "cpu:1"):
            result = job.result(timeout=120)
    assert result.report.hardware_class == "cpu.batch"
    assert result.report.checkpoints.startswith("save: ")
    assert "resumed from a checkpoint" in result.report.checkpoints
    assert result.outputs == undisturbed()
