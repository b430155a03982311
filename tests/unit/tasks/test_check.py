from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.check import QUEUES, CheckVerdict, check_configuration
from tasks.settings import TREE
from tests.builders import recorded
from tests.graphs import SCALE_SPECS, scale_graph, write_model

TOPOLOGY: dict[str, Any] = yaml.safe_load(recorded("documents/checked.yaml"))


def checked(folder: Path, **hardware: Any) -> list[CheckVerdict]:
    """What the check says that is not ok, with a class of these fields."""
    described = {**TOPOLOGY, "hardware": {"cpu.batch": {**TOPOLOGY["hardware"]["cpu.batch"], **hardware}}}
    (folder / "queues.yaml").write_text(yaml.safe_dump(described))
    found = check_configuration(folder / "queues.yaml", folder / "models")
    assert found[0].subject == QUEUES
    return [verdict for verdict in found if verdict.level != "ok"]


def checked_with_engine(folder: Path, **fields: Any) -> Sequence[CheckVerdict]:
    """What the check says with a class of an engine, too."""
    endpoint = {"protocol": "openai", "url": "http://engine/v1", "slots": 4, **fields}
    engine = {"device": "endpoint", "endpoint": endpoint, "price": {"usd_per_hour": 1}}
    described = {**TOPOLOGY, "hardware": {**TOPOLOGY["hardware"], "engine": engine}}
    (folder / "queues.yaml").write_text(yaml.safe_dump(described))
    return check_configuration(folder / "queues.yaml", folder / "models")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "models", "embed", scale_graph(2.0), **SCALE_SPECS)
    return tmp_path


def test_a_warm_model_that_does_not_exist_is_an_error_with_the_name_that_was_meant(folder: Path) -> None:
    (found,) = checked(folder, warm=["embedd"])
    assert (found.subject, found.level, found.hint) == (QUEUES, "error", "did you mean embed?")
    assert found.text == "hardware.cpu.batch.warm.0: expected a model of the catalogue, got 'embedd'"


def test_a_second_name_that_leads_nowhere_is_an_error_unless_an_endpoint_may_announce_its_model(folder: Path) -> None:
    (folder / "models" / "stand-in").mkdir()
    (folder / "models" / "stand-in" / "model.yaml").write_text("name: stand-in\nalias: elsewhere\n")
    (found,) = checked(folder)
    assert (found.subject, found.level) == ("stand-in", "error")
    verdicts = checked_with_engine(folder, discover=True)
    assert [one.level for one in verdicts if one.subject == "stand-in"] == ["warning"]
    assert [one.level for one in verdicts if one.subject == QUEUES] == ["ok"]  # a protocol is no runtime to look for


def test_what_an_engine_serves_or_starts_with_and_no_model_has_is_an_error(folder: Path) -> None:
    start = {"llama": {"model": "embed", "artefact": "weights"}}
    served = {"embed": {"server": "e-q4", "variant": "q4"}}
    errors = [one for one in checked_with_engine(folder, models=served, start=start) if one.level == "error"]
    where = "hardware.engine.endpoint"
    assert [(one.text, one.hint) for one in errors] == [
        (f"{where}.models.embed.variant: expected a variant of embed:1, got 'q4'", "did you mean onnx?"),
        (f"{where}.start.llama.artefact: expected an artefact of embed:1, got 'weights'", "did you mean graph?"),
    ]
    odd = {"command": "serve {prot} --port {port}", "ready": "http://{host}:{Port}/${HOME}"}
    warned = [one.text for one in checked_with_engine(folder, discover=True, start=odd) if one.level == "warning"]
    assert [text.partition("got ")[2].partition(",")[0] for text in warned] == ["{Port}", "{prot}"]
    (unclosed,) = checked_with_engine(folder, discover=True, start={"command": "serve 'it"})[:1]
    assert unclosed.text == 'hardware.engine.endpoint.start.command: expected quotes that close, got "serve \'it"'


def test_a_class_that_cannot_run_what_it_keeps_warm_is_warned_of(folder: Path) -> None:
    found = checked(folder, runtimes=["python"])
    assert [verdict.level for verdict in found] == ["warning"] * 2
    assert found[0].text == "hardware.cpu.batch.warm.0: the class runs python, and no variant of embed:1 does"
    assert found[1].text == "no class of queues.yaml runs onnx"


def test_a_wrong_queues_yaml_leaves_the_models_checked(folder: Path) -> None:
    (folder / "models" / "embed" / "graph.onnx").unlink()
    found = checked(folder, max_batch=0)
    assert [(verdict.subject, verdict.level) for verdict in found] == [(QUEUES, "error"), ("embed", "error")]
    assert "hardware.cpu.batch.max_batch: expected `int` >= 1, got 0" in found[0].text
    assert "artefacts.graph.path: expected a file in embed/, got 'graph.onnx'" in found[1].text


def test_an_empty_folder_of_models_is_named_before_the_models_that_it_lacks(tmp_path: Path) -> None:
    errors = [verdict.text for verdict in checked(tmp_path, warm=["embed"]) if verdict.level == "error"]
    assert errors[0] == "expected model folders, found none"
    assert "expected a model of the catalogue, got 'embed'" in errors[1]


def test_code_that_a_variant_names_and_that_does_not_exist_is_an_error(folder: Path) -> None:
    torch = {"runtime": "torch", "entry": "minilmm", "artefacts": {"weights": "w"}, "memory": 0}
    write_model(
        folder / "models",
        "embed",
        b"",
        **SCALE_SPECS,
        artefacts={"w": {"kind": "derived", "recipe": "alchemy", "inputs": {}}},
        reference="torch",
        variants={"torch": {**torch, "profiles": {"cpu": {"base": 1, "slope": 0}}}},
    )
    network, recipe = checked(folder, runtimes=["torch"])
    assert network.text.startswith("entry: no architecture 'minilmm_torch': expected one of minilm_torch")
    assert recipe.text.startswith("artefacts.w: no recipe 'alchemy': expected one of ")


def test_every_shipped_model_and_queues_yaml_pass() -> None:
    found = check_configuration(TREE / "queues.yaml", TREE / "models")
    assert [verdict for verdict in found if verdict.level != "ok"] == []
