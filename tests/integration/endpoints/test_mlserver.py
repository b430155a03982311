"""A whole fleet before MLServer's real server: a model of a model.yaml, and one that it announces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import taxiway
from tasks.settings import Settings
from taxiway.errors import InvalidRequestError
from tests.real_engines import mlserver
from tests.routing import RouterProcess, eventually, router_process
from tests.working import empty_fleet, worker_process, worker_settings

QUEUES = """
hardware:
  cpu.batch:
    device: endpoint
    endpoint: {{protocol: oip, url: "{url}", slots: 4, discover: {discover}, models: {models}}}
    price: {{usd_per_hour: 0.1}}
service:
  standard: {{deadline: 60}}
default_service: standard
"""
SCALED = """
name: scaled
version: 1
summary: Twice the numbers, and the words in capitals.
licence: Apache-2.0
pipeline: tensors
inputs: [{name: x, datatype: FP32, shape: [-1, 2]}, {name: word, datatype: BYTES, shape: [-1, 1]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 2]}, {name: loud, datatype: BYTES, shape: [-1, 1]}]
reference: engine
variants:
  engine: {runtime: oip, profiles: {endpoint: {base: 0.01, slope: 0.0001}}}
"""
ROWS = {"x": [[1.5, 2.0], [3.0, -4.0]], "word": [["grüß"], ["gott"]]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlserver(tmp_path_factory.mktemp("server"), "double") as url:
        yield url


@pytest.fixture(scope="module", params=["described", "discovered"])
def client(
    request: pytest.FixtureRequest, valkey_url: str, tmp_path_factory: pytest.TempPathFactory, server: str
) -> Iterator[tuple[taxiway.Client, str]]:
    """A client of a fleet with the server, and what the fleet calls its model."""
    folder, found = tmp_path_factory.mktemp("fleet"), request.param == "discovered"
    queues = QUEUES.format(url=server, discover=str(found).lower(), models="{}" if found else "{scaled: double}")
    settings: Settings = worker_settings(empty_fleet(valkey_url), folder, queues)
    if not found:
        (settings.models / "scaled").mkdir()
        (settings.models / "scaled" / "model.yaml").write_text(SCALED)
    with worker_process(settings), router_process(settings) as router:
        eventually(lambda: served(router, "double" if found else "scaled"))
        with taxiway.Client(router.http) as client:
            yield client, "double" if found else "scaled"


def served(router: RouterProcess, model: str) -> bool:
    with taxiway.Client(router.http) as client:
        return any(one["name"] == model for one in client.models())


def test_tensors_and_text_come_back_row_by_row(client: tuple[taxiway.Client, str]) -> None:
    fleet, model = client
    outputs = fleet.infer(model, ROWS, timeout=60).outputs
    assert outputs["y"] == [[3.0, 4.0], [6.0, -8.0]]
    assert outputs["loud"] == [["GRÜSS"], ["GOTT"]]


def test_what_json_cannot_hold_is_refused_by_its_name(client: tuple[taxiway.Client, str]) -> None:
    fleet, model = client
    with pytest.raises(InvalidRequestError, match=r"inputs.word.*expected text, as the endpoint reads JSON alone"):
        fleet.infer(model, ROWS | {"word": [[b"\xff"], ["b"]]}, timeout=60)
