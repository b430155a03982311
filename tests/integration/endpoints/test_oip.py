"""An endpoint that speaks OIP: the HTTP API of another fleet, with a real router and worker of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tasks.settings import Settings
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
    """The other fleet's settings, with the address of its interface in the file `interface`."""
    (tmp_path / "other").mkdir()
    settings = worker_settings(empty_fleet(valkey_url), tmp_path / "other")
    with worker_process(settings), router_process(settings) as router:
        eventually(lambda: httpx.get(f"{router.http}/v2/models/slab/ready", trust_env=False).is_success)
        (tmp_path / "interface").write_text(router.http)
        yield settings


@pytest.fixture
def fleet(settings: Settings, other: Settings, tmp_path: Path) -> Settings:
    told = worker_settings(settings, tmp_path, QUEUES.format(url=(tmp_path / "interface").read_text()))
    (told.models / "slab" / "model.yaml").write_text(REMOTE)
    return told


@pytest.mark.usefixtures("worker")
def test_a_model_of_another_fleet_gives_the_answers_that_it_gives_there(tower: Tower, other: Settings) -> None:
    result = tower.result(tower.order("slab", ROWS, variant="other-fleet"))
    with Tower(other) as there:
        same = there.result(there.order("slab", ROWS))
    assert result.outputs["estimate"] == same.outputs["estimate"]
    assert result.report.device == "endpoint:0"
