"""Large tensors through a real router and worker: beside their messages, whichever interface they come by."""

import hashlib
import secrets
import struct
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import redis
from celery import Celery

import taxiway
from tasks.settings import Settings
from taxiway.contract.keys import INFER, blob_key
from taxiway.contract.tensors import HEADER
from taxiway.contract.values import INLINE
from taxiway.errors import RequestTooLargeError
from tests.builders import recorded
from tests.producing import producing
from tests.serving import ServedFleet, served_fleet
from tests.working import QUEUES, worker_settings

LARGE = np.random.default_rng(7).random((2, 100_000), np.float32)
SMALL = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def settings(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    queues = QUEUES.replace("warm: [echo, slab]", "warm: [echo]").replace("lease: 1", "lease: 1, payload: 2MiB")
    settings = worker_settings(lasting, tmp_path_factory.mktemp("blobs"), queues)
    for name in ("mirror", "noted"):
        (settings.models / name).mkdir()
        (settings.models / name / "model.yaml").write_text(recorded(f"models/{name}.yaml"))
    return settings


@pytest.fixture(scope="module")
def fleet(settings: Settings) -> Iterator[ServedFleet]:
    with served_fleet(settings, "mirror") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def http(fleet: ServedFleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.router.http, timeout=30, trust_env=False) as http:
        yield http


@pytest.fixture(params=["broker", "http"])
def interface(request: pytest.FixtureRequest, fleet: ServedFleet) -> str:
    return fleet.interfaces[request.param]


@pytest.fixture
def celery(fleet: ServedFleet) -> Iterator[Celery]:
    with producing(fleet.settings) as app:
        yield app


@pytest.mark.parametrize("given", [LARGE, SMALL, LARGE[:1], LARGE[:, ::2]], ids=["large", "small", "row", "strided"])
def test_an_array_comes_back_as_the_same_array_from_either_interface(interface: str, given: np.ndarray) -> None:
    with taxiway.Client(interface, arrays=True) as client:
        back = client.infer("mirror", given, timeout=20).outputs["x"]

    assert back.dtype == np.float32
    assert np.array_equal(back, given)


def test_without_arrays_it_comes_back_as_lists(interface: str) -> None:
    with taxiway.Client(interface) as client:
        assert client.infer("mirror", LARGE, timeout=20).outputs["x"] == LARGE.tolist()
        assert client.infer("mirror", SMALL[0], timeout=20).outputs["x"] == SMALL[0].tolist()


def test_large_bytes_come_back_unchanged_now_and_later(interface: str) -> None:
    given = secrets.token_bytes(INLINE + 1)
    with taxiway.Client(interface) as client:
        job = client.submit("echo", {"a": [given, "text"]})

        assert job.result(timeout=20).outputs == {"payload": {"a": [given, "text"]}}
        assert client.job(job.id).result(timeout=20).outputs == {"payload": {"a": [given, "text"]}}


def test_what_was_asked_with_is_dropped_when_the_job_ends_and_the_answer_stays_for_its_time(
    interface: str, store: redis.Redis
) -> None:
    before = set(store.keys(blob_key("*")))
    with taxiway.Client(interface, arrays=True) as client:
        client.infer("mirror", LARGE, timeout=20)

    (left,) = set(store.keys(blob_key("*"))) - before
    assert 0 < store.ttl(left) <= 3600
    assert store.get(left) == LARGE.tobytes()


def test_plain_celery_gets_a_link_to_the_http_api_that_is_good_for_its_time(celery: Celery, http: httpx.Client) -> None:
    inputs = {"shape": [1, 100_000], "datatype": "FP32", "data": LARGE[0].tobytes()}
    asked = celery.send_task(INFER, kwargs={"model": "mirror", "inputs": inputs}, serializer="json")
    answer = asked.get(timeout=20)["outputs"]["x"]

    linked = http.get(answer["href"])
    assert (answer["shape"], answer["bytes"]) == ([1, 100_000], LARGE[0].nbytes)
    assert linked.headers["content-type"] == "application/octet-stream"
    assert linked.content == LARGE[0].tobytes()
    over = http.get(f"/v2/blobs/{uuid.uuid4().hex}")
    assert (over.status_code, over.json()["code"]) == (410, "result_expired")


@pytest.mark.cases("altered, error")
def test_a_reference_must_be_to_the_bytes_that_it_was_made_for(
    settings: Settings, celery: Celery, store: redis.Redis, altered: dict[str, Any], error: type[Exception] | None
) -> None:
    ref = uuid.uuid4().hex
    store.set(blob_key(ref), b"abc", ex=60)
    made = {"datatype": "BYTES", "ref": ref, "bytes": 3, "digest": hashlib.sha256(b"abc").hexdigest()}
    asked = celery.send_task(INFER, kwargs={"model": "echo", "inputs": made | altered}, ignore_result=True)

    with taxiway.Client(settings.broker) as client:
        if error is None:
            assert client.job(asked.id).result(timeout=20).outputs == {"payload": b"abc"}
        else:
            with pytest.raises(error):
                client.job(asked.id).result(timeout=20)


def test_what_travels_beside_a_message_counts_as_its_payload(interface: str) -> None:
    with taxiway.Client(interface) as client, pytest.raises(RequestTooLargeError):
        client.infer("mirror", np.zeros((1, 600_000), np.float32), timeout=20)


def raw_infer(
    http: httpx.Client, fields: Any, parts: bytes = b"", *, length: str | None = None, model: str = "mirror"
) -> httpx.Response:
    text = msgspec.json.encode(fields)
    headers = {HEADER: str(len(text)) if length is None else length, "content-type": "application/octet-stream"}
    return http.post(f"/v2/models/{model}/infer", content=text + parts, headers=headers)


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}} | fields


def test_an_infer_request_may_carry_its_tensors_raw_and_ask_for_raw_ones(http: httpx.Client) -> None:
    note = {"name": "note", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 12}}
    asked = {"inputs": [tensor(), note], "parameters": {"binary_data_output": True}}
    notes = struct.pack("<I", 2) + b"ab" + struct.pack("<I", 2) + b"\xff\xfe"
    answer = raw_infer(http, asked, SMALL.tobytes() + notes, model="noted")

    length = int(answer.headers[HEADER])
    x, echoed = msgspec.json.decode(answer.content[:length])["outputs"]
    assert (x["shape"], x["parameters"]) == ([2, 3], {"binary_data_size": 24})
    assert (echoed["shape"], echoed["parameters"]) == ([2], {"binary_data_size": 12})
    assert answer.content[length:] == SMALL.tobytes() + notes
    assert "binary_tensor_data" in http.get("/v2").json()["extensions"]


def test_each_output_may_be_asked_for_raw_or_not(http: httpx.Client) -> None:
    outputs = [{"name": "x", "parameters": {"binary_data": False}}]
    asked = {"inputs": [tensor()], "outputs": outputs, "parameters": {"binary_data_output": True}}
    answer = raw_infer(http, asked, SMALL.tobytes())

    assert HEADER not in answer.headers
    assert answer.json()["outputs"][0]["data"] == SMALL.reshape(-1).tolist()
