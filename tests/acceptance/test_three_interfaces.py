"""The same request through every interface of a real fleet gives the same answer, or the same error."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import taxiway
from local.fleet import LocalFleet
from taxiway.client.sync_client import Client
from taxiway.errors import InvalidRequestError, RequestError, UnknownModelError, UnplaceableError

TEXT = "What a smooth and friendly flight, thank you!"


@pytest.fixture(scope="module", params=["broker", "http"])
def client(request: pytest.FixtureRequest, fleet: LocalFleet) -> Iterator[Client]:
    with taxiway.Client(getattr(fleet, request.param)) as client:
        yield client


def infer(
    fleet: LocalFleet,
    model: str,
    value: list[Any],
    *,
    datatype: str = "BYTES",
    name: str = "text",
    headers: dict[str, Any] | None = None,
    **parameters: int,
) -> httpx.Response:
    tensor = {"name": name, "shape": [len(value)], "datatype": datatype, "data": value}
    body = {"inputs": [tensor], "parameters": parameters}
    return httpx.post(f"{fleet.http}/v2/models/{model}/infer", json=body, headers=headers, timeout=60)


def test_a_client_gets_a_real_answer_with_its_placement(client: Client) -> None:
    result = client.submit("sentiment", TEXT, deadline=30).result(timeout=60)

    assert result.outputs["label"] == "positive"
    assert result.outputs["score"] > 0.5
    assert result.report.hardware_class in {"cpu.batch", "gpu.realtime", "tpu.bulk"}
    assert result.report.reason
    assert result.report.cost > 0


def test_a_generated_answer_is_streamed_as_it_grows(client: Client) -> None:
    events = client.stream("generate", "Write one sentence about the sea.", timeout=120, deadline=60)
    *pieces, result = events

    assert isinstance(result, taxiway.Result)
    assert len(pieces) > 5
    assert "".join(map(str, pieces)) == result.outputs["text"]


def test_server_sent_events_have_an_answer_and_end_with_its_outputs(fleet: LocalFleet) -> None:
    asked = {"text_input": "Write one sentence about the sea.", "parameters": {"deadline": 60}}
    with httpx.stream("POST", f"{fleet.http}/v2/models/generate/generate_stream", json=asked, timeout=120) as answer:
        events = answer.read().decode().strip().split("\n\n")

    texts = [json.loads(event.partition("data: ")[2])["text_output"] for event in events[:-1]]
    kind, _, content = events[-1].partition("\ndata: ")
    assert kind == "event: result"
    assert "".join(texts) == json.loads(content)["outputs"][0]["data"][0]


def test_many_rows_are_answered_in_order(client: Client) -> None:
    texts = [TEXT, "The seat was broken and the crew was rude.", TEXT]

    result = client.infer("sentiment", texts, deadline=30)

    assert result.outputs["label"] == ["positive", "negative", "positive"]


def test_both_clients_give_equal_outputs(fleet: LocalFleet) -> None:
    with taxiway.Client(fleet.broker) as one, taxiway.Client(fleet.http) as other:
        for value in (TEXT, [TEXT, TEXT]):
            assert one.infer("echo", value, deadline=30).outputs == other.infer("echo", value, deadline=30).outputs


def test_an_async_client_awaits_jobs(fleet: LocalFleet) -> None:
    import asyncio

    async def ask() -> list[Any]:
        async with taxiway.AsyncClient(fleet.broker) as client:
            jobs = [await client.submit("echo", f"row {n}", deadline=30) for n in range(20)]
            return [(await job).outputs for job in jobs]

    answers = asyncio.run(ask())

    assert [answer["payload"] for answer in answers] == [f"row {n}" for n in range(20)]


def test_map_keeps_the_order_of_its_inputs(client: Client) -> None:
    results = client.map("echo", (f"row {n}" for n in range(100)), window=16, deadline=60)

    assert [r.outputs["payload"] for r in results] == [f"row {n}" for n in range(100)]


def test_the_http_api_speaks_open_inference_protocol(fleet: LocalFleet) -> None:
    answer = infer(fleet, "sentiment", [TEXT], deadline=30).raise_for_status().json()

    assert answer["model_name"] == "sentiment"
    label = next(o for o in answer["outputs"] if o["name"] == "label")
    assert label == {"name": "label", "shape": [1], "datatype": "BYTES", "data": ["positive"]}


def test_an_asynchronous_request_is_polled_to_its_result(fleet: LocalFleet) -> None:
    accepted = infer(fleet, "echo", ["later"], name="payload", headers={"Prefer": "respond-async"}, deadline=30)

    assert accepted.status_code == 202
    where = fleet.http + accepted.headers["Location"]
    status = httpx.get(where, params={"wait": 20}, timeout=30).json()
    assert status["state"] == "succeeded"
    assert status["hardware_class"]
    answer = httpx.get(f"{where}/result").json()
    assert answer["outputs"][0]["data"] == ["later"]


def test_a_plain_celery_producer_needs_no_taxiway(fleet: LocalFleet, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import json, sys
        from celery import Celery
        assert "taxiway" not in sys.modules
        app = Celery(broker=sys.argv[1], backend=sys.argv[1])
        kwargs = {"model": "sentiment", "inputs": sys.argv[2], "deadline": 30}
        answer = app.send_task("taxiway.infer", kwargs=kwargs, queue="taxiway.arrivals")
        refused = app.send_task("taxiway.infer", kwargs={"model": "sentimant", "inputs": "x"}, queue="taxiway.arrivals")
        got = answer.get(timeout=60)
        error = refused.get(timeout=60, propagate=False)
        print(json.dumps({"got": got, "status": refused.status, "error": type(error).__name__, "text": str(error)}))
        """
    )

    answer = json.loads(run_without_taxiway(tmp_path, script, fleet.broker, TEXT))

    assert answer["got"]["outputs"]["label"] == "positive"
    assert answer["status"] == "FAILURE"
    assert answer["error"] == "UnknownModelError"
    assert "sentiment" in answer["text"]


def run_without_taxiway(folder: Path, script: str, *arguments: str) -> str:
    """Run a script in a virtual environment of its own that holds Celery and redis, and no taxiway."""
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "celery[redis]"]
    subprocess.run(install, check=True, timeout=240)
    missing = subprocess.run([python, "-c", "import taxiway"], cwd=folder, capture_output=True, timeout=30, check=False)
    assert missing.returncode != 0, "taxiway must not be importable here"
    command = [python, "-c", script, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("model", "value", "terms", "expected", "field"),
    [
        ("sentimant", TEXT, {}, UnknownModelError, None),
        ("sentiment:9", TEXT, {}, UnknownModelError, None),
        ("sentiment", "", {}, InvalidRequestError, "text"),
        ("sentiment", TEXT, {"deadline": float("nan")}, InvalidRequestError, "deadline"),
        ("sentiment", TEXT, {"deadline": -1.0}, InvalidRequestError, "deadline"),
        ("sentiment", TEXT, {"budget": -0.5}, InvalidRequestError, "budget"),
        ("sentiment", TEXT, {"service": "platinum"}, InvalidRequestError, "service"),
        ("sentiment", TEXT, {"parameters": {"max_tokens": 4}}, InvalidRequestError, "max_tokens"),
        ("sentiment", TEXT, {"locality": "moon"}, UnplaceableError, None),
        ("classify-image", b"\xff\xd8\xff\xe0 not a jpeg", {}, InvalidRequestError, "image"),
    ],
)
def test_bad_input_gets_the_same_named_error_at_every_interface(
    client: Client,
    model: str,
    value: str | bytes,
    terms: dict[str, Any],
    expected: type[RequestError],
    field: str | None,
) -> None:
    with pytest.raises(RequestError) as caught:
        client.submit(model, value, **{"deadline": 30, **terms}).result(timeout=60)

    assert type(caught.value) is expected
    if field is not None:
        assert field in str(caught.value)


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


def test_one_idempotency_key_is_one_job_across_interfaces(fleet: LocalFleet) -> None:
    terms: dict[str, Any] = {"deadline": 30, "tenant": "tower", "idempotency_key": "flight-17"}
    with taxiway.Client(fleet.broker) as one, taxiway.Client(fleet.http) as other:
        first, second = one.submit("echo", "once", **terms), other.submit("echo", "once", **terms)

        assert first.id == second.id
        assert first.result(timeout=60).outputs == second.result(timeout=60).outputs
        for client in (one, other):
            with pytest.raises(taxiway.errors.IdempotencyConflictError):
                client.submit("echo", "twice", **terms).result(timeout=60)


def test_a_cancelled_job_says_so(client: Client) -> None:
    job = client.submit("generate", "Count slowly.", deadline=3000, service="bulk", parameters={"max_tokens": 512})
    job.cancel()

    with pytest.raises(taxiway.JobCancelledError):
        job.result(timeout=60)


def test_a_job_past_its_deadline_is_not_answered(client: Client) -> None:
    job = client.submit("echo", "too late", deadline=1e-6)

    with pytest.raises(taxiway.DeadlineExceededError, match=r"^deadline of 1e-06 s exceeded: "):
        job.result(timeout=60)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/models/nothing", 404, "unknown_model"),
        ("/v2/jobs/00000000-0000-0000-0000-000000000000", 404, "unknown_job"),
        ("/nowhere", 404, None),
    ],
)
def test_unknown_things_are_404_in_one_form(fleet: LocalFleet, path: str, status: int, code: str | None) -> None:
    answer = httpx.get(fleet.http + path)

    assert answer.status_code == status
    assert answer.json()["error"]
    assert code is None or answer.json()["code"] == code


def test_a_body_over_the_limit_is_413(fleet: LocalFleet) -> None:
    answer = infer(fleet, "echo", ["x" * (17 * 2**20)], name="payload")

    assert answer.status_code == 413
    assert answer.json()["code"] == "too_large"


def test_text_that_is_not_json_is_400(fleet: LocalFleet) -> None:
    answer = httpx.post(
        f"{fleet.http}/v2/models/echo/infer", content=b"{nope", headers={"content-type": "application/json"}
    )

    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_request"
