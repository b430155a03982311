"""Real models behind every interface of a real fleet. What interfaces have in common is in test_interfaces_agree.py."""

from collections.abc import Iterator

import pytest

import taxiway
from local.fleet import LocalFleet
from taxiway.client.sync_client import Client

TEXT = "What a smooth and friendly flight, thank you!"


@pytest.fixture(scope="module", params=["broker", "http"])
def client(request: pytest.FixtureRequest, fleet: LocalFleet) -> Iterator[Client]:
    with taxiway.Client(getattr(fleet, request.param)) as client:
        yield client


def test_a_client_gets_a_real_answer_with_its_placement(client: Client) -> None:
    result = client.submit("sentiment", TEXT, deadline=30).result(timeout=60)

    assert result.outputs["label"] == "positive"
    assert result.outputs["score"] > 0.5
    assert result.report.hardware_class in {"cpu.batch", "gpu.realtime", "tpu.bulk"}
    assert result.report.reason
    assert result.report.cost > 0
