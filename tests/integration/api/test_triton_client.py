"""Triton's own client, unmodified, against a router before a worker: its repository, versions and compressed bodies."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tasks.settings import Settings
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.routing import RouterProcess, router_process
from tests.waiting import until
from tests.working import LONG, QUEUES, empty_fleet, worker_process, worker_settings


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Settings:
    """A fleet of one class that runs graphs, with the models echo, paced and slab."""
    queues = QUEUES.replace("[python, echo]", "[python, echo, onnx]")
    return worker_settings(empty_fleet(valkey_url), tmp_path_factory.mktemp("triton"), queues)


@pytest.fixture(scope="module")
def router(served: Settings) -> Iterator[RouterProcess]:
    with worker_process(served), router_process(served) as process:
        yield process


@pytest.fixture
def client(router: RouterProcess) -> Iterator[InferenceServerClient]:
    with connected(router) as client:
        yield client


def connected(router: RouterProcess) -> InferenceServerClient:
    return InferenceServerClient(router.http.removeprefix("http://"))


def write(served: Settings, name: str, factor: float, *, file: str = "model.yaml", **fields: Any) -> None:
    """Put a model that multiplies by a factor into the folder, its model.yaml last."""
    graph = f"graph-{factor:g}.onnx"
    made = write_model(served.models.parent / "beside", name, scale_graph(factor), **SCALE_SPECS, **fields)
    text = (made / "model.yaml").read_text().replace("graph.onnx", graph)
    (served.models / name).mkdir(exist_ok=True)
    (made / "graph.onnx").replace(served.models / name / graph)
    (made / "model.yaml").write_text(text)
    (made / "model.yaml").replace(served.models / name / file)


def scaled(client: InferenceServerClient, name: str, version: str = "", **more: Any) -> list[float]:
    row = np.array([[1.0, 2.0]], dtype=np.float32)
    given = InferInput("x", row.shape, "FP32")
    given.set_data_from_numpy(row)
    numbers: list[float] = client.infer(name, [given], model_version=version, **more).as_numpy("y")[0].tolist()
    return numbers


def state(client: InferenceServerClient, name: str, version: str = "1") -> tuple[str, str] | None:
    """A version's state in the index, and the reason."""
    index = client.get_model_repository_index()
    return next(
        ((m["state"], m.get("reason", "")) for m in index if (m["name"], m["version"]) == (name, version)), None
    )


def warm(router: RouterProcess) -> set[str]:
    fleet = httpx.get(f"{router.http}/v2/fleet").json()
    return {key for device in fleet["devices"] for key in device["warm"]}


def test_a_model_is_loaded_before_anyone_asks_for_it_and_taken_out_of_service(
    served: Settings, router: RouterProcess, client: InferenceServerClient
) -> None:
    assert client.is_server_ready()
    assert "model_repository" in client.get_server_metadata()["extensions"]
    write(served, "later", 2.0)
    client.load_model("later")
    assert "later:1/onnx" in warm(router)
    assert client.is_model_ready("later")
    assert scaled(client, "later") == [2.0, 4.0]

    client.unload_model("later")
    assert state(client, "later") == ("UNAVAILABLE", "an operator unloaded it")
    assert not client.is_model_ready("later")
    assert "later" not in {
        m["name"] for m in httpx.post(f"{router.http}/v2/repository/index", json={"ready": True}).json()
    }
    with pytest.raises(InferenceServerException, match="'later:1' is unloaded"):
        scaled(client, "later")
    assert until(lambda: "later:1/onnx" not in warm(router))
    assert httpx.get(f"{router.http}/v2/fleet").json()["unloaded"] == ["later:1"]
    with router_process(served) as second, connected(second) as other:
        with pytest.raises(InferenceServerException, match="'later:1' is unloaded"):
            scaled(other, "later")
        other.load_model("later")
    assert scaled(client, "later") == [2.0, 4.0]
    assert state(client, "later") == ("READY", "")


def test_what_was_accepted_runs_though_its_model_was_unloaded(
    router: RouterProcess, client: InferenceServerClient
) -> None:
    inputs = [{"name": name, "datatype": "INT64", "shape": [1], "data": value} for name, value in LONG.items()]
    headers = {"prefer": "respond-async"}
    jobs = [
        httpx.post(f"{router.http}/v2/models/slab/infer", json={"inputs": inputs}, headers=headers).headers["location"]
        for _ in range(2)
    ]
    client.unload_model("slab")
    refused = httpx.post(f"{router.http}/v2/models/slab/infer", json={"inputs": inputs})
    assert (refused.status_code, refused.json()["details"]["reason"]) == (503, "an operator unloaded it")
    results = [httpx.get(f"{router.http}{job}/result?wait=30", timeout=40) for job in jobs]
    assert [result.status_code for result in results] == [200] * 2
    assert until(lambda: not any(key.startswith("slab:") for key in warm(router)))
    client.load_model("slab")
    assert any(key.startswith("slab:") for key in warm(router))


def test_the_result_of_a_job_is_there_after_its_model_was_removed(
    served: Settings, router: RouterProcess, client: InferenceServerClient
) -> None:
    write(served, "removed", 2.0)
    client.load_model("removed")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    headers = {"prefer": "respond-async"}
    job = httpx.post(f"{router.http}/v2/models/removed/infer", json=body, headers=headers).headers["location"]
    assert httpx.get(f"{router.http}{job}?wait=30", timeout=40).json()["state"] == "succeeded"
    shutil.rmtree(served.models / "removed")
    assert until(lambda: state(client, "removed") is None)
    result = httpx.get(f"{router.http}{job}/result")
    assert (result.status_code, result.json()["outputs"][0]["data"]) == (200, [2.0, 4.0])


def test_a_load_that_cannot_be_done_says_why_and_what_was_served_still_is(
    served: Settings, client: InferenceServerClient
) -> None:
    write(served, "broken", 2.0)
    client.load_model("broken")
    path = served.models / "broken" / "model.yaml"
    good = path.read_text()
    path.write_text(good.replace("1MiB", "much"))
    with pytest.raises(InferenceServerException, match=r"in its last valid version, .*memory: expected bytes"):
        client.load_model("broken")
    assert scaled(client, "broken") == [2.0, 4.0]
    stated = state(client, "broken")
    assert stated is not None
    assert (stated[0], "memory: expected bytes" in stated[1]) == ("READY", True)
    path.write_text(good.replace("1MiB", "900GiB"))
    with pytest.raises(
        InferenceServerException, match=r"'broken:1' is not loaded: cpu.batch: .*needs 966367641600 bytes"
    ):
        client.load_model("broken")
    path.write_text(good.replace("runtime: onnx", "runtime: torch\n    entry: nothing"))
    with pytest.raises(InferenceServerException, match=r"'broken:1' is not loaded: no class of this fleet can run it"):
        client.load_model("broken")
    with pytest.raises(InferenceServerException, match="unknown model 'nowhere'"):
        client.load_model("nowhere")
    with pytest.raises(InferenceServerException, match="unknown model 'nowhere'"):
        client.unload_model("nowhere")
    with pytest.raises(InferenceServerException, match=r"parameters.config: expected none"):
        client.load_model("echo", config="{}")


def test_versions_aliases_and_second_names_come_and_change_while_the_fleet_runs(
    served: Settings, client: InferenceServerClient
) -> None:
    write(served, "many", 2.0, aliases=["stable"])
    write(served, "many", 3.0, version=2, aliases=["next"], file="model-2.yaml")
    client.load_model("many")
    assert client.get_model_metadata("many")["versions"] == ["1", "2"]
    assert [scaled(client, "many", version)[0] for version in ("", "1", "2", "stable", "next")] == [2, 2, 3, 2, 3]
    second = served.models / "stand-in"
    second.mkdir()
    for version, factor in ((2, 3.0), (1, 2.0)):
        (second / "model.yaml").write_text(f"name: stand-in\nalias: many\nversion: {version}\n")
        client.load_model("stand-in")
        assert scaled(client, "stand-in")[0] == factor
        assert state(client, "stand-in", str(version)) == ("READY", "")
    with pytest.raises(InferenceServerException, match="an alias of 'many:1'"):
        client.unload_model("stand-in")
    client.unload_model("many:2")
    assert scaled(client, "many") == [2.0, 4.0]
    with pytest.raises(InferenceServerException, match="'many:2' is unloaded"):
        scaled(client, "many", "2")
    client.load_model("many")
    assert scaled(client, "many", "next") == [3.0, 6.0]


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_requests_and_answers_are_compressed_as_the_client_asks(client: InferenceServerClient, binary: bool) -> None:
    texts = np.array([f"row {index}" for index in range(900)], dtype=np.object_)
    given = InferInput("payload", texts.shape, "BYTES")
    given.set_data_from_numpy(texts, binary_data=binary)
    for coding in ("gzip", "deflate"):
        answer = client.infer(
            "echo",
            [given],
            outputs=[InferRequestedOutput("payload", binary_data=binary)],
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        got = [text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("payload")]
        assert got[:2] == ["row 0", "row 1"] or got[0] == "cm93IDA="
        assert len(got) == 900


def test_no_request_is_lost_while_its_model_yaml_is_edited_broken_and_repaired(
    served: Settings, router: RouterProcess, client: InferenceServerClient
) -> None:
    def answers(factor: float) -> bool:
        return bool(seen) and seen[-1] == factor

    write(served, "edited", 2.0)
    client.load_model("edited")
    seen: list[float] = []
    faults: list[BaseException] = []
    over = threading.Event()

    def ask() -> None:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
        with httpx.Client(base_url=router.http, timeout=30) as http:
            while not over.is_set():
                answer = http.post("/v2/models/edited/infer", json=body)
                try:
                    seen.append(answer.raise_for_status().json()["outputs"][0]["data"][0])
                except BaseException as error:
                    faults.append(error)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    try:
        for factor in (3.0, 4.0, 5.0):
            write(served, "edited", factor)
            assert until(partial(answers, factor))
            (served.models / "edited" / "model.yaml").write_text("name: edited\nversion: none\n")
            assert until(lambda: (state(client, "edited") or ("", ""))[1] != "")
        before = len(seen)
        assert until(lambda: len(seen) > before + 50)
    finally:
        over.set()
        for thread in asking:
            thread.join()
    assert not faults
    assert sorted(set(seen)) == [2.0, 3.0, 4.0, 5.0]
    assert set(seen[-20:]) == {5.0}
