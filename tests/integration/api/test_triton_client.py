"""Triton's own client, unmodified, against a router before a worker: models that come, change and go."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput

from tasks.settings import Settings
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.routing import HTTP, RouterProcess, router_process
from tests.waiting import in_thread, until
from tests.working import QUEUES, empty_fleet, worker_process, worker_settings


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


def leads_to(router: RouterProcess, name: str, model: str) -> bool:
    return listed(router, name).get("alias_of") == model


def scaled(client: InferenceServerClient, name: str, version: str = "", **more: Any) -> list[float]:
    row = np.array([[1.0, 2.0]], dtype=np.float32)
    given = InferInput("x", row.shape, "FP32")
    given.set_data_from_numpy(row)
    numbers: list[float] = client.infer(name, [given], model_version=version, **more).as_numpy("y")[0].tolist()
    return numbers


def listed(router: RouterProcess, name: str) -> dict[str, Any]:
    """A model in the list of models; empty if it is not there."""
    models = HTTP.get(f"{router.http}/v2/models").json()["models"]
    return next((model for model in models if model["name"] == name), {})


def test_the_result_of_a_job_is_there_after_its_model_was_removed(
    served: Settings, router: RouterProcess, client: InferenceServerClient
) -> None:
    write(served, "removed", 2.0)
    assert until(lambda: bool(listed(router, "removed")))
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    headers = {"prefer": "respond-async"}
    job = HTTP.post(f"{router.http}/v2/models/removed/infer", json=body, headers=headers).headers["location"]
    assert HTTP.get(f"{router.http}{job}?wait=30", timeout=40).json()["state"] == "succeeded"
    shutil.rmtree(served.models / "removed")
    assert until(lambda: not listed(router, "removed"))
    result = HTTP.get(f"{router.http}{job}/result")
    assert (result.status_code, result.json()["outputs"][0]["data"]) == (200, [2.0, 4.0])


def test_versions_aliases_and_second_names_come_and_change_while_the_fleet_runs(
    served: Settings, router: RouterProcess, client: InferenceServerClient
) -> None:
    write(served, "many", 2.0, aliases=["stable"])
    write(served, "many", 3.0, version=2, aliases=["next"], file="model-2.yaml")
    assert until(lambda: listed(router, "many").get("versions") == ["1", "2"])
    assert client.get_model_metadata("many")["versions"] == ["1", "2"]
    assert [scaled(client, "many", version)[0] for version in ("", "1", "2", "stable", "next")] == [2, 2, 3, 2, 3]
    second = served.models / "stand-in"
    second.mkdir()
    for version, factor in ((2, 3.0), (1, 2.0)):
        (second / "model.yaml").write_text(f"name: stand-in\nalias: many\nversion: {version}\n")
        assert until(partial(leads_to, router, "stand-in", f"many:{version}"))
        assert scaled(client, "stand-in")[0] == factor
        assert client.is_model_ready("stand-in")


def test_no_request_is_lost_while_its_model_yaml_is_edited_broken_and_repaired(
    served: Settings, router: RouterProcess, client: InferenceServerClient
) -> None:
    def answers(factor: float) -> bool:
        return bool(seen) and seen[-1] == factor

    write(served, "edited", 2.0)
    assert until(lambda: bool(listed(router, "edited")))
    assert scaled(client, "edited") == [2.0, 4.0]
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

    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(in_thread(ask, stop=over.set))
        for factor in (3.0, 4.0, 5.0):
            write(served, "edited", factor)
            assert until(partial(answers, factor))
            (served.models / "edited" / "model.yaml").write_text("name: edited\nversion: none\n")
            assert until(lambda: "problems" in listed(router, "edited"))
        before = len(seen)
        assert until(lambda: len(seen) > before + 50)
    assert not faults
    assert {3.0, 4.0, 5.0} <= set(seen) <= {2.0, 3.0, 4.0, 5.0}
    assert set(seen[-20:]) == {5.0}
