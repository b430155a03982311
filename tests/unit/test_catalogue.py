from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.catalogue import Catalogue, Model, ModelError, Profile, load_catalogue, parse_model
from tasks.settings import TREE
from taxiway.errors import UnknownModelError
from tests.unit.strategies import json_values
from tests.unit.test_topology import paths

SHA = "0" * 64


def document(**fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": "sentiment",
        "version": 1,
        "summary": "Positive or negative.",
        "licence": "MIT",
        "pipeline": "text",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [-1]}],
        "reference": "onnx",
        "artefacts": {"graph": {"kind": "file", "path": "graph.onnx", "sha256": SHA}},
        "variants": {
            "onnx": {
                "runtime": "onnx",
                "memory": "1MiB",
                "artefacts": {"graph": "graph"},
                "profiles": {"cpu": {"base": 0.1, "slope": 0}},
            }
        },
    }
    return given | fields


def model(**fields: Any) -> Model:
    return parse_model(yaml.safe_dump(document(**fields)), "model.yaml")


def derived(**inputs: str) -> dict[str, Any]:
    return {"kind": "derived", "recipe": "onnx-int8", "inputs": inputs}


def file(path: str) -> dict[str, Any]:
    return {"graph": {"kind": "file", "path": path, "sha256": SHA}}


def variants(**changes: Any) -> dict[str, Any]:
    return {"onnx": document()["variants"]["onnx"] | changes}


def tensor(shape: list[int], batch_axis: int | None) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": shape, "batch_axis": batch_axis}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Sentiment"}, "name: expected text matching"),
        ({"reference": "torch"}, "reference: expected one of the variants ['onnx'], got 'torch'"),
        ({"inputs": []}, "inputs: expected a list with at least 1 in it, got []"),
        (
            {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [3]}]},
            "inputs.0.shape: expected -1 first: the batch axis, got [3]",
        ),
        ({"inputs": [{"name": "text", "datatype": "FP32", "shape": [-1, 0]}]}, "inputs.0.shape: expected sizes >= 1"),
        ({"inputs": [tensor([2, 3], 1)]}, "inputs.0.shape: expected -1 at position 1: the batch axis, got [2, 3]"),
        ({"inputs": [tensor([], None)], "pipeline": "tensors"}, "inputs: expected one with a batch axis"),
        ({"outputs": [tensor([3], None)]}, "outputs.0.batch_axis: expected a batch axis: each row has an answer"),
        ({"inputs": [tensor([2, -1], 1)]}, "inputs.0.batch_axis: expected 0, as the pipeline text batches its tensors"),
        (
            {"inputs": [tensor([2, -1], 1)], "pipeline": "tensors", "variants": variants(runtime="jax", entry="e")},
            "inputs.0.batch_axis: expected 0, as the jax runtime takes no other, got 1",
        ),
        ({"outputs": document()["outputs"] * 2}, "outputs.1.name: expected a name that no tensor before it has"),
        ({"inputs": [{"name": "x", "datatype": "FP8", "shape": [-1]}]}, "inputs.0.datatype: expected one of ['BOOL'"),
        ({"buckets": [32, 16]}, "buckets: expected sizes that grow, got [32, 16]"),
        ({"parameters": {"deadline": {"type": "number"}}}, "parameters.deadline: expected a name that is none of"),
        (
            {"parameters": {"k": {"type": "number", "minimum": 2, "maximum": 1}}},
            "parameters.k.minimum: expected at",
        ),
        ({"artefacts": file("/etc/passwd")}, "artefacts.graph.path: expected a relative path that stays inside"),
        ({"artefacts": file("../other/graph.onnx")}, "artefacts.graph.path: expected a relative path"),
        ({"artefacts": file("a/../../graph.onnx")}, "artefacts.graph.path: expected a relative path"),
        ({"artefacts": file("")}, "artefacts.graph.path: expected a relative path"),
        (
            {"artefacts": {"graph": {"kind": "ftp"}}},
            "artefacts.graph.kind: expected one of ['derived', 'file'",
        ),
        (
            {"artefacts": {"graph": {"kind": "file", "path": "x", "sha256": "0"}}},
            "artefacts.graph.sha256: expected",
        ),
        (
            {"artefacts": {"graph": derived(weights="w")}},
            "artefacts.graph.inputs.weights: expected one of",
        ),
        (
            {"artefacts": {"graph": derived(graph="graph")}},
            "artefacts.graph.inputs: expected artefacts that are not made",
        ),
        (
            {"artefacts": {"graph": derived(a="other"), "other": derived(a="graph")}},
            "artefacts.graph.inputs: expected artefacts that are not made from it",
        ),
        ({"artefacts": {}}, "variants.onnx.artefacts.graph: expected one of the artefacts [], got 'graph'"),
        ({"variants": variants(runtime="torch")}, "variants.onnx.entry: expected what the torch runtime shall run"),
        (
            {"variants": variants(profiles={})},
            "variants.onnx.profiles: expected a mapping with at least 1 in it, got {}",
        ),
        ({"variants": variants(profiles={"npu": {}})}, "variants.onnx.profiles.npu: expected a key that is one of"),
    ],
)
def test_a_wrong_model_says_where_and_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        model(**fields)
    assert f"model.yaml: {message}" in str(caught.value)


def catalogue() -> Catalogue:
    versions = [model(version=1), model(version=2, aliases=["stable"]), model(version=3, aliases=["next"])]
    return Catalogue({m.id: m for m in [*versions, model(name="embed"), model(name="embed", version=2)]})


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("sentiment:1", "sentiment:1"),
        ("sentiment@stable", "sentiment:2"),
        ("sentiment@next", "sentiment:3"),
        ("sentiment", "sentiment:2"),
        ("embed", "embed:2"),
    ],
)
def test_a_reference_is_a_name_a_version_or_an_alias(reference: str, expected: str) -> None:
    assert catalogue().resolve(reference).id == expected


@pytest.mark.parametrize(
    ("reference", "near"),
    [("sentimant", "sentiment"), ("embed:9", "embed:2"), ("sentiment@stabel", "sentiment@stable")],
)
def test_an_unknown_reference_is_answered_with_near_names(reference: str, near: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalogue().resolve(reference)
    assert near in caught.value.details["near"]
    assert near in caught.value.message


@pytest.mark.parametrize("reference", ["", "@", "x" * 256, "\ud800"])
def test_a_reference_near_nothing_has_no_suggestion(reference: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalogue().resolve(reference)
    assert caught.value.details["near"] == []


def written(path: Path, **fields: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document(**fields)), encoding="utf-8")


def test_a_catalogue_holds_every_version_below_its_folder(tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model.yaml", version=2)
    written(tmp_path / "sentiment/model-1.yaml", version=1, aliases=["stable"])
    loaded = load_catalogue(tmp_path)
    assert sorted(loaded.models) == ["sentiment:1", "sentiment:2"]
    assert loaded.resolve("sentiment").folder == str(tmp_path / "sentiment")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 1}, "version: expected a version that no other file here has, got 1"),
        ({"version": 2, "aliases": ["stable"]}, "aliases: expected no alias of sentiment:1, got 'stable'"),
        ({"version": 2, "name": "other"}, "name: expected the folder's name 'sentiment', got 'other'"),
    ],
)
def test_two_files_may_not_claim_the_same(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model-1.yaml", aliases=["stable"])
    written(tmp_path / "sentiment/model.yaml", **fields)
    with pytest.raises(ModelError) as caught:
        load_catalogue(tmp_path)
    assert message in str(caught.value)


def test_a_tensor_has_the_name_that_a_graph_gives_it() -> None:
    named = model(inputs=[{"name": "Model.input_ids", "datatype": "INT64", "shape": [-1, -1]}])

    assert named.inputs[0].name == "Model.input_ids"


def test_a_file_that_is_no_text_is_a_model_error(tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model.yaml")
    (tmp_path / "sentiment" / "model.yaml").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="expected a readable file of UTF-8 text"):
        load_catalogue(tmp_path)


def test_every_shipped_model_is_read() -> None:
    assert load_catalogue(TREE / "models").models


def test_a_profile_gives_the_latency_of_a_batch_and_never_less_than_its_floor() -> None:
    profile = Profile(base=0.1, slope=0.01, floor=0.3)
    assert (profile.latency(4, 10), profile.latency(1, 1)) == (pytest.approx(0.5), 0.3)


SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((TREE / "models").glob("*/model.yaml"))]


@settings(max_examples=50)
@given(data=st.data())
def test_any_change_to_a_shipped_model_is_a_model_or_a_model_error(data: st.DataObject) -> None:
    described = yaml.safe_load(data.draw(st.sampled_from(SHIPPED)))
    *above, last = data.draw(st.sampled_from([path for path in paths(described) if path]))
    place = described
    for step in above:
        place = place[step]
    place[last] = data.draw(json_values)
    returns_or_refuses(yaml.safe_dump(described))


@settings(max_examples=100)
@given(text=st.sampled_from(SHIPPED), data=st.data())
def test_any_slip_of_the_pen_is_a_model_or_a_model_error(text: str, data: st.DataObject) -> None:
    start, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 40))
    returns_or_refuses(text[:start] + data.draw(st.text(max_size=10)) + text[start + length :])


def returns_or_refuses(text: str) -> None:
    with suppress(ModelError):
        assert parse_model(text, "model.yaml").variants
