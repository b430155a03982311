"""Real models behind every interface of a real fleet. What interfaces have in common is in test_interfaces_agree.py."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import taxiway
from local.fleet import LocalFleet
from taxiway.client.sync_client import Client
from taxiway.errors import InvalidRequestError

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


def test_a_plain_celery_producer_needs_no_taxiway(fleet: LocalFleet, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import json, sys
        sys.modules["taxiway"] = None  # as where it is not installed
        from celery import Celery
        app = Celery(broker=sys.argv[1], backend=sys.argv[1])
        kwargs = {"model": "sentiment", "inputs": sys.argv[2], "deadline": 30}
        answer = app.send_task("taxiway.infer", kwargs=kwargs, queue="taxiway.arrivals")
        refused = app.send_task("taxiway.infer", kwargs={"model": "sentimant", "inputs": "x"}, queue="taxiway.arrivals")
        got = answer.get(timeout=60)
        error = refused.get(timeout=60, propagate=False)
        print(json.dumps({"got": got, "status": refused.status, "error": type(error).__name__, "text": str(error)}))
        """
    )
    command = [sys.executable, "-c", script, fleet.broker, TEXT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)

    assert answer["got"]["outputs"]["label"] == "positive"
    assert answer["status"] == "FAILURE"
    assert answer["error"] == "UnknownModelError"
    assert "sentiment" in answer["text"]


@pytest.mark.parametrize(
    ("model", "value", "field"),
    [("sentiment", "", "text"), ("classify-image", b"\xff\xd8\xff\xe0 not a jpeg", "image")],
)
def test_a_row_that_its_pipeline_cannot_read_is_named(
    client: Client, model: str, value: str | bytes, field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        client.infer(model, value, deadline=30, timeout=60)
