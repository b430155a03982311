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
from tests.routing import HTTP

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


def test_server_sent_events_have_an_answer_and_end_with_its_outputs(fleet: LocalFleet) -> None:
    text = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["Write one sentence about the sea."]}
    asked = {"inputs": [text], "parameters": {"deadline": 60, "stream": True}}
    headers = {"prefer": "respond-async"}
    job = HTTP.post(f"{fleet.http}/v2/models/generate/infer", json=asked, headers=headers).headers["location"]
    with HTTP.stream("GET", f"{fleet.http}{job}/stream", timeout=120) as answer:
        events = answer.read().decode().strip().split("\n\n")

    texts = [json.loads(event.partition("data: ")[2])["text_output"] for event in events[:-1]]
    kind, _, content = events[-1].partition("\ndata: ")
    assert kind == "event: result"
    assert "".join(texts) == json.loads(content)["outputs"][0]["data"][0]


def test_many_rows_are_answered_in_order(client: Client) -> None:
    texts = [TEXT, "The seat was broken and the crew was rude.", TEXT]

    result = client.infer("sentiment", texts, deadline=30)

    assert result.outputs["label"] == ["positive", "negative", "positive"]


def test_the_http_api_speaks_open_inference_protocol(fleet: LocalFleet) -> None:
    body = {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}],
        "parameters": {"deadline": 30},
    }
    answer = HTTP.post(f"{fleet.http}/v2/models/sentiment/infer", json=body, timeout=60).raise_for_status().json()

    assert answer["model_name"] == "sentiment"
    label = next(o for o in answer["outputs"] if o["name"] == "label")
    assert label == {"name": "label", "shape": [1], "datatype": "BYTES", "data": ["positive"]}


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


def test_a_failing_row_does_not_fail_its_batch_mates(client: Client) -> None:
    jobs = [client.submit("sentiment", text, deadline=30) for text in (TEXT, "", TEXT)]

    assert jobs[0].result(timeout=60).outputs["label"] == "positive"
    assert jobs[2].result(timeout=60).outputs["label"] == "positive"
    with pytest.raises(InvalidRequestError) as caught:
        jobs[1].result(timeout=60)
    status = jobs[1].status()
    assert status.error is not None
    assert (status.record.state, status.error.code) == ("failed", "invalid_request")
    assert status.error.message == caught.value.message
    assert jobs[0].status().error is None
