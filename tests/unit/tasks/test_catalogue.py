import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import lacking
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.models.model import Model, ModelError, Profile, parse_model
from tasks.settings import TREE
from taxiway.errors import ModelUnavailableError, UnknownModelError
from tests.builders import recorded
from tests.unit.strategies import json_values
from tests.unit.tasks.test_topology import paths

SHA = "0" * 64


def document(**fields: Any) -> dict[str, Any]:
    return {**yaml.safe_load(recorded("documents/sentiment.yaml")), **fields}


def model(**fields: Any) -> Model:
    return parse_model(json.dumps(document(**fields)), "model.yaml")  # YAML; safe_dump quotes no 0e0


def derived(**inputs: str) -> dict[str, Any]:
    return {"kind": "derived", "recipe": "onnx-int8", "inputs": inputs}


def file(path: str) -> dict[str, Any]:
    return {"graph": {"kind": "file", "path": path, "sha256": SHA}}


def variants(**changes: Any) -> dict[str, Any]:
    return {"onnx": document()["variants"]["onnx"] | changes}


@pytest.mark.cases("fields, message")
def test_a_wrong_model_says_where_and_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        model(**fields)
    assert f"model.yaml: {message}" in str(caught.value)


def catalogue() -> Catalogue:
    versions = [model(version=1), model(version=2, aliases=["stable"]), model(version=3, aliases=["next"])]
    return Catalogue({m.id: m for m in [*versions, model(name="embed"), model(name="embed", version=2)]})


@pytest.mark.cases("reference, expected")
def test_a_reference_is_a_name_a_version_or_an_alias(reference: str, expected: str) -> None:
    assert catalogue().resolve(reference).id == expected


@pytest.mark.parametrize(
    ("reference", "near"),
    [("sentimant", "sentiment"), ("embed:9", "embed:2"), ("sentiment@stabel", "sentiment@stable")]
    + [(odd, None) for odd in ("", "@", "x" * 256, "\ud800")],
)
def test_an_unknown_reference_is_answered_with_near_names_if_there_are_any(reference: str, near: str | None) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalogue().resolve(reference)
    assert near in caught.value.details["near"] if near else caught.value.details["near"] == []
    assert (near or "") in caught.value.message


HTTPS = {"graph": {"kind": "https", "url": "https://models.example/graph.onnx", "sha256": SHA}}


def written(path: Path, **fields: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document(**{"artefacts": HTTPS, **fields})), encoding="utf-8")


@pytest.mark.cases("fields, reason")
def test_only_a_wrong_model_is_disabled_with_a_reason(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model.yaml", **fields)
    written(tmp_path / "embed/model.yaml", name="embed")
    loaded = load_catalogue(tmp_path)
    assert loaded.resolve("embed").id == "embed:1"
    assert loaded.disabled["sentiment"].startswith(f"sentiment/model.yaml: {reason}")
    for reference in ("sentiment", "sentiment:1", "sentiment@stable"):
        with pytest.raises(ModelUnavailableError, match=r"is disabled: sentiment/model\.yaml: ") as caught:
            loaded.resolve(reference)
        assert caught.value.details["reason"] == loaded.disabled["sentiment"]


@pytest.mark.cases("fields, reason")
def test_of_two_files_with_one_claim_the_current_has_it(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model.yaml", version=2, aliases=["stable"])
    written(tmp_path / "sentiment/model-1.yaml", **fields)
    loaded = load_catalogue(tmp_path)
    assert loaded.resolve("sentiment").version == 2
    assert loaded.disabled == {"sentiment:1": f"sentiment/model-1.yaml: {reason}"}


def test_an_older_version_does_not_stand_in_for_a_disabled_one_unless_it_is_the_stable_one(tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model.yaml", version="two")
    written(tmp_path / "sentiment/model-1.yaml", version=1)
    with pytest.raises(ModelUnavailableError):
        load_catalogue(tmp_path).resolve("sentiment")
    assert load_catalogue(tmp_path).resolve("sentiment:1").version == 1
    written(tmp_path / "sentiment/model-1.yaml", version=1, aliases=["stable"])
    assert load_catalogue(tmp_path).resolve("sentiment").version == 1


def test_what_did_not_change_is_the_same_object_again_and_what_is_removed_is_gone(tmp_path: Path) -> None:
    written(tmp_path / "sentiment/model.yaml")
    written(tmp_path / "embed/model.yaml", name="embed")
    first = load_catalogue(tmp_path)
    (tmp_path / "embed/model.yaml").unlink()
    second = load_catalogue(tmp_path, first)
    assert second.resolve("sentiment") is first.resolve("sentiment")
    assert sorted(second.models) == ["sentiment:1"]


def test_a_profile_gives_the_latency_of_a_batch_and_never_less_than_its_floor() -> None:
    profile = Profile(base=0.1, slope=0.01, floor=0.3)
    assert (profile.latency(4, 10), profile.latency(1, 1)) == pytest.approx((0.5, 0.3))


SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((TREE / "models").glob("*/model.yaml"))]


@given(data=st.data())
def test_any_change_to_a_shipped_model_is_a_model_or_a_model_error(data: st.DataObject) -> None:
    described = yaml.safe_load(data.draw(st.sampled_from(SHIPPED)))
    *above, last = data.draw(st.sampled_from([path for path in paths(described) if path]))
    place = described
    for step in above:
        place = place[step]
    place[last] = data.draw(json_values)
    with suppress(ModelError):
        assert parse_model(yaml.safe_dump(described), "model.yaml").variants


@pytest.mark.cases("wanted, have, missing")
def test_a_cuda_device_has_all_lower_capabilities(wanted: list[str], have: list[str], missing: list[str]) -> None:
    assert lacking(wanted, have) == missing
