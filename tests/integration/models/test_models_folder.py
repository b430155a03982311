"""The models folder of a running fleet: what is wrong in it, and what changes in it, at every interface."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.settings import TREE, Settings
from taxiway import Client
from taxiway.errors import FleetUnavailable, InvalidRequestError, JobError, ModelUnavailableError, UnknownModelError
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.routing import HTTP, EchoDevice, RouterProcess, router_process
from tests.stored import all_facts
from tests.waiting import until
from tests.working import QUEUES, Tower, worker_process, worker_settings

REASON = "broken/model.yaml: variants.onnx.memory: expected bytes"


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    """A models folder of its own, with echo and a model whose model.yaml is wrong."""
    models = tmp_path / "models"
    shutil.copytree(TREE / "models" / "echo", models / "echo")
    write_model(models, "broken", scale_graph(2.0), **SCALE_SPECS)
    described = models / "broken" / "model.yaml"
    described.write_text(described.read_text().replace("1MiB", "much"))
    return replace(settings, models=models)


@pytest.fixture
def router(fleet: Settings) -> Iterator[RouterProcess]:
    with router_process(fleet) as process:
        yield process


def get(router: RouterProcess, path: str) -> tuple[int, Any]:
    answer = HTTP.get(f"{router.http}{path}", timeout=60)
    return answer.status_code, json.loads(answer.content)


def test_a_broken_model_leaves_the_others_served_and_every_interface_says_why_it_is_disabled(
    fleet: Settings, router: RouterProcess
) -> None:
    with EchoDevice(fleet), Client(router.http) as http, Client(fleet.broker) as redis:
        assert http.infer("echo", "hello", deadline=30).outputs == {"payload": "hello"}
        (listed,) = [model for model in http.models() if model["name"] == "broken"]
        assert listed["disabled"].startswith(REASON)
        assert http.fleet()["disabled"]["broken"] == listed["disabled"]
        status, answer = get(router, "/v2/models/broken/ready")
        assert (status, answer) == (503, {"name": "broken", "ready": False, "reason": listed["disabled"]})
        messages = set()
        for client in (http, redis):
            with pytest.raises(ModelUnavailableError) as caught:
                client.submit("broken", [[1.0, 2.0]], deadline=30).result(timeout=60)
            messages.add(caught.value.message)
        assert messages == {f"model 'broken' is disabled: {listed['disabled']}"}


@pytest.fixture
def served(settings: Settings, tmp_path: Path) -> Settings:
    """A fleet of one class that runs graphs, with the models echo, paced and slab."""
    queues = QUEUES.replace("[python, echo]", "[python, echo, onnx]").replace("slab]", "slab, later]")
    return worker_settings(settings, tmp_path, queues)


def unavailable(tower: Tower) -> set[str]:
    """The variants that the worker's heartbeat says it cannot run."""
    (facts,) = all_facts(tower.state)
    return set(facts.unavailable)


def scaled(client: Client, model: str = "later") -> list[float]:
    numbers: list[float] = client.infer(model, [1.0, 2.0], deadline=30).outputs["y"]
    return numbers


def is_scaled(client: Client, expected: list[float]) -> bool:
    with suppress(JobError, FleetUnavailable):
        return scaled(client) == expected
    return False


def write(models: Path, factor: float, name: str = "x") -> None:
    """Put the model `later`, with an input of that name, into the folder, its model.yaml last."""
    beside = models.parent / "beside"
    specs = {**SCALE_SPECS, "inputs": [{**SCALE_SPECS["inputs"][0], "name": name}]}
    folder = write_model(beside, "later", scale_graph(factor, name=name), **specs)
    (models / "later").mkdir(exist_ok=True)
    for file in ("graph.onnx", "model.yaml"):
        (folder / file).replace(models / "later" / file)


def test_a_model_comes_changes_breaks_and_goes_while_the_fleet_runs(served: Settings) -> None:
    with worker_process(served), router_process(served) as router, Client(router.http) as client:
        with pytest.raises(UnknownModelError):
            scaled(client)
        write(served.models, 2.0)
        assert until(lambda: get(router, "/v2/models/later/ready")[0] == 200)
        assert scaled(client) == [2.0, 4.0]
        assert until(lambda: any("later:1/onnx" in device["warm"] for device in client.fleet()["devices"]))

        write(served.models, 3.0, name="z")
        assert until(lambda: get(router, "/v2/models/later")[1]["inputs"][0]["name"] == "z")
        with pytest.raises(InvalidRequestError, match=r"inputs of later:1 \(z\), got 'x'"):
            scaled(client)  # the client goes by what it knew of the model, and asks again
        assert until(lambda: is_scaled(client, [3.0, 6.0]))  # the worker may see the new model later

        (served.models / "later" / "model.yaml").write_text("name: later\nversion: one\n")
        assert until(lambda: "later:1" in client.fleet()["outdated"])
        assert scaled(client) == [3.0, 6.0]
        (listed,) = [model for model in client.models() if model["name"] == "later"]
        assert listed["problems"]["later:1"].startswith("later/model.yaml: ")

        served.queues.write_text(served.queues.read_text() + "plan: {enabled: false}\n")
        shutil.rmtree(served.models / "later")
        assert until(lambda: len(client.fleet()["restart"]) == 2)
        valid = served.queues.read_text()
        served.queues.write_text("hardware: {}\n")
        assert until(lambda: len(client.fleet()["queues_wrong"]) == 2)
        assert client.fleet()["restart"] == []
        served.queues.write_text(valid)
        with pytest.raises(UnknownModelError):
            scaled(client)
        assert until(lambda: not any("later:1/onnx" in device["warm"] for device in client.fleet()["devices"]))


def test_a_job_whose_variant_was_removed_ends_with_the_reason(served: Settings) -> None:
    write(served.models, 2.0)
    with worker_process(served), Tower(served) as tower:
        job = tower.order("later", [1.0, 2.0], variant="gone")
        with pytest.raises(ModelUnavailableError, match=r"its variant 'gone' is no longer in the catalogue \(onnx\)"):
            tower.result(job)
        unknown = tower.order("nowhere", [1.0, 2.0], variant="onnx")
        with pytest.raises(ModelUnavailableError, match=r"is not in the models folder of the worker"):
            tower.result(unknown)
        assert until(lambda: "nowhere:1/onnx" in unavailable(tower))  # so that routers ask others first
