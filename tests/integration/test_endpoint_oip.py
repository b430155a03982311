"""Endpoints that speak OIP: another fleet's HTTP door, and a scripted one beside a class that runs the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
import pytest
import redis

import taxiway
from tasks.heartbeat import DeviceFacts
from tasks.settings import Settings
from taxiway.contract.keys import DEVICES
from tests.engine import Engine, serving
from tests.routing import eventually, router_process
from tests.working import SLAB, Tower, empty_fleet, worker_process, worker_settings

QUEUES = """
hardware:
  cpu.batch:
    device: endpoint
    endpoint: {{protocol: oip, url: "{url}", slots: 4, models: {{slab: slab}}}}
    price: {{usd_per_hour: 1}}
service:
  standard: {{deadline: 60}}
default_service: standard
"""
REMOTE = f"{SLAB}  other-fleet: {{runtime: oip, profiles: {{endpoint: {{base: 0.01, slope: 0.0001}}}}}}\n"
ROWS = {"samples": [1000, 2000, 3000], "seed": [1, 2, 3]}


@pytest.fixture
def other(valkey_url: str, tmp_path: Path) -> Iterator[Settings]:
    """The other fleet's settings, with the address of its door in the file `door`."""
    (tmp_path / "other").mkdir()
    settings = worker_settings(empty_fleet(valkey_url), tmp_path / "other")
    with worker_process(settings), router_process(settings) as router:
        eventually(lambda: httpx.get(f"{router.http}/v2/models/slab/ready", trust_env=False).is_success)
        (tmp_path / "door").write_text(router.http)
        yield settings


@pytest.fixture
def fleet(settings: Settings, other: Settings, tmp_path: Path) -> Settings:
    told = worker_settings(settings, tmp_path, QUEUES.format(url=(tmp_path / "door").read_text()))
    (told.models / "slab" / "model.yaml").write_text(REMOTE)
    return told


@pytest.mark.usefixtures("worker")
def test_a_model_of_another_fleet_gives_the_answers_that_it_gives_there(tower: Tower, other: Settings) -> None:
    result = tower.result(tower.order("slab", ROWS, variant="other-fleet"))
    with Tower(other) as there:
        same = there.result(there.order("slab", ROWS))
    assert result.outputs["estimate"] == same.outputs["estimate"]
    assert result.report.device == "endpoint:0"


CHEAP = """
hardware:
  engine:
    device: endpoint
    endpoint: {{protocol: oip, url: "{url}", slots: 1, models: {{slab: slab}}, health: {{every: 0.2}}}}
    price: {{usd_per_hour: 0.01}}
  cpu.batch:
    device: cpu
    runtimes: [python]
    max_batch: 4
    max_wait: 0
    price: {{usd_per_hour: 10}}
service:
  standard: {{deadline: 60}}
default_service: standard
limits: {{lease: 1}}
"""


def serving_kinds(settings: Settings) -> set[str]:
    """The kinds of the devices that take work."""
    with redis.Redis.from_url(settings.state) as store:
        found = [msgspec.json.decode(raw, type=DeviceFacts) for raw in store.hvals(DEVICES)]
    return {one.kind for one in found if one.classes}


def test_what_waits_and_what_ran_on_an_endpoint_that_dies_runs_elsewhere(settings: Settings, tmp_path: Path) -> None:
    engine = Engine(script="stall")
    with ExitStack() as server:
        server.enter_context(serving(engine))
        told = worker_settings(settings, tmp_path, CHEAP.format(url=engine.url.removesuffix("/v1")))
        (told.models / "slab" / "model.yaml").write_text(REMOTE)
        with (
            worker_process(told),
            worker_process(told, "--class", "engine"),
            router_process(told),
            taxiway.Client(told.broker) as client,
        ):
            eventually(lambda: serving_kinds(told) == {"cpu", "endpoint"})
            jobs = [client.submit("slab", {"samples": [4], "seed": [n]}) for n in range(4)]
            eventually(lambda: engine.begun)
            server.close()
            results = [job.result(timeout=30) for job in jobs]
    assert [result.report.hardware_class for result in results] == ["cpu.batch"] * 4
    assert results[3].outputs["estimate"] == [0.75]
