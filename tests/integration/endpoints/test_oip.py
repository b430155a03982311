"""An endpoint that speaks OIP: the HTTP API of another fleet, with a real router and worker of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.settings import Settings
from tests.queues import engine_class, queues_of
from tests.serving import ServedFleet, served_fleet
from tests.working import CLASS, SLAB, Tower, empty_fleet, worker_settings

REMOTE = f"{SLAB}  other-fleet: {{runtime: oip, profiles: {{endpoint: {{base: 0.01, slope: 0.0001}}}}}}\n"
ROWS = {"samples": [1000, 2000, 3000], "seed": [1, 2, 3]}


@pytest.fixture
def other(valkey_url: str, tmp_path: Path) -> Iterator[ServedFleet]:
    (tmp_path / "other").mkdir()
    with served_fleet(worker_settings(empty_fleet(valkey_url), tmp_path / "other"), "slab") as fleet:
        yield fleet


@pytest.fixture
def fleet(settings: Settings, other: ServedFleet, tmp_path: Path) -> Settings:
    queues = queues_of({CLASS: engine_class(other.router.http, protocol="oip", models={"slab": "slab"})})
    configured = worker_settings(settings, tmp_path, queues)
    (configured.models / "slab" / "model.yaml").write_text(REMOTE)
    return configured


@pytest.mark.usefixtures("worker")
def test_a_model_of_another_fleet_gives_the_answers_that_it_gives_there(tower: Tower, other: ServedFleet) -> None:
    result = tower.result(tower.order("slab", ROWS, variant="other-fleet"))
    with Tower(other.settings) as there:
        same = there.result(there.order("slab", ROWS))
    assert result.outputs["estimate"] == same.outputs["estimate"]
    assert result.report.device == "endpoint:0"
