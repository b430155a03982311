"""A whole fleet before MLServer's real server: a model of a model.yaml, and one that it announces."""

from collections.abc import Iterator

import pytest

import taxiway
from taxiway.errors import InvalidRequestError
from tests.builders import recorded
from tests.queues import engine_class, queues_of
from tests.real_engines import mlserver
from tests.serving import served_fleet
from tests.working import CLASS, empty_fleet, worker_settings

ROWS = {"x": [[1.5, 2.0], [3.0, -4.0]], "word": [["grüß"], ["gott"]]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlserver(tmp_path_factory.mktemp("server"), "double") as url:
        yield url


@pytest.fixture(
    scope="module", params=[{"models": {"scaled": "double"}}, {"discover": True}], ids=["described", "found"]
)
def client(
    request: pytest.FixtureRequest, valkey_url: str, tmp_path_factory: pytest.TempPathFactory, server: str
) -> Iterator[tuple[taxiway.Client, str]]:
    """A client of a fleet with the server, and what the fleet calls its model."""
    queues = queues_of({CLASS: engine_class(server, protocol="oip", **request.param)})
    settings = worker_settings(empty_fleet(valkey_url, lasting=True), tmp_path_factory.mktemp("fleet"), queues)
    model = next(iter(request.param.get("models", ["double"])))
    (settings.models / "scaled").mkdir()
    (settings.models / "scaled" / "model.yaml").write_text(recorded("models/scaled.yaml"))
    with served_fleet(settings, model) as fleet, taxiway.Client(fleet.router.http) as client:
        yield client, model


def test_tensors_and_text_come_back_row_by_row(client: tuple[taxiway.Client, str]) -> None:
    fleet, model = client
    outputs = fleet.infer(model, ROWS, timeout=60).outputs
    assert outputs["y"] == [[3.0, 4.0], [6.0, -8.0]]
    assert outputs["loud"] == [["GRÜSS"], ["GOTT"]]


def test_what_json_cannot_hold_is_refused_by_its_name(client: tuple[taxiway.Client, str]) -> None:
    fleet, model = client
    with pytest.raises(InvalidRequestError, match=r"inputs.word.*expected text, as the endpoint reads JSON alone"):
        fleet.infer(model, ROWS | {"word": [[b"\xff"], ["b"]]}, timeout=60)
