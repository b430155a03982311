"""Models as files: what they may say, their names and versions, and what a host reports of them."""

import json
import locale
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import lacking
from tasks.models.catalogue import Catalogue
from tasks.models.folder import ModelsFolder, ProcessReport, Reporter, Watched, load_catalogue
from tasks.models.model import Model, ModelError, Profile, parse_model
from tasks.queues.queues_file import QueuesFile
from tasks.settings import TREE
from tasks.topology import Topology
from taxiway.errors import ModelUnavailableError, UnknownModelError
from tests.builders import recorded
from tests.graphs import SCALE_SPECS, scale_graph, write_model
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


QUEUES = recorded("documents/endpoint.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> ModelsFolder:
    write_model(tmp_path / "models", "scale", scale_graph(2.0), **SCALE_SPECS)
    (tmp_path / "queues.yaml").write_text(QUEUES)
    return ModelsFolder(tmp_path / "models", QueuesFile(tmp_path / "queues.yaml"))


def test_queues_yaml_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path, text = tmp_path / "queues.yaml", f"# für alle\n{QUEUES}"
    path.write_text(text, encoding="utf-8")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        queues = QueuesFile(path)
        path.write_text(f"{text}# 2\n", encoding="utf-8")
        queues.look()
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert queues.text == f"{text}# 2\n"


def base(folder: ModelsFolder) -> float:
    return folder.book.lookup(folder.catalogue.resolve("scale"), "onnx", "cpu", "Some CPU").profile.base


def test_a_new_model_is_there_with_the_next_check_and_followers_are_notified(folder: ModelsFolder) -> None:
    received: list[set[str]] = []
    folder.follow(lambda catalogue, book: received.append(set(catalogue.models)))
    write_model(folder.root, "other", scale_graph(2.0), **SCALE_SPECS)
    assert folder.look()
    assert received == [{"scale:1", "other:1"}]


def test_a_folder_whose_link_is_swapped_counts_as_changed_as_a_mounted_one_is(folder: ModelsFolder) -> None:
    """As Kubernetes swaps a ConfigMap: the model's folder leads to `..data`, and that to the present state."""
    root = folder.root
    for name, factor in (("..first", 2.0), ("..second", 3.0)):
        write_model(root / name, "scale", scale_graph(factor), **SCALE_SPECS)
    shutil.rmtree(root / "scale")
    (root / "..data").symlink_to("..first")
    (root / "scale").symlink_to("..data/scale")
    folder.look()
    first = folder.catalogue.resolve("scale:1")
    (root / "..new").symlink_to("..second")
    (root / "..new").replace(root / "..data")
    assert folder.look()
    assert folder.catalogue.resolve("scale:1") != first


def test_a_folder_that_is_away_for_a_moment_takes_no_models_with_it(folder: ModelsFolder) -> None:
    folder.root.rename(folder.root.parent / "away")
    assert not folder.look()
    assert folder.catalogue.serves("scale")
    (folder.root.parent / "away").rename(folder.root)
    assert not folder.look()


def name_it(folder: ModelsFolder, text: str, name: str = "stand-in", below: str = "") -> None:
    """Give `stand-in`, or another second name, a new meaning."""
    place = folder.root / (below or name)
    place.mkdir(exist_ok=True)
    (place / "model.yaml").write_text(f"name: {name}\n{text}\n")
    folder.look()


def meant(folder: ModelsFolder, *references: str) -> list[str]:
    return [folder.catalogue.resolve(reference).id for reference in references]


def test_a_second_name_leads_to_a_model_or_one_version_of_it_and_changes_with_its_file(folder: ModelsFolder) -> None:
    write_model(folder.root, "other", scale_graph(2.0), **SCALE_SPECS, aliases=["stable"])
    second = (folder.root / "other" / "model.yaml").read_text().replace("version: 1", "version: 2")
    (folder.root / "other" / "model-2.yaml").write_text(second.replace("stable", "next"))
    name_it(folder, "alias: other")
    found = meant(folder, "stand-in", "stand-in:2", "stand-in@next", "other")
    assert found == ["other:1", "other:2", "other:2", "other:1"]
    name_it(folder, "alias: other\nversion: 2")
    assert meant(folder, "stand-in", "stand-in:2", "other") == ["other:2", "other:2", "other:1"]
    assert not folder.catalogue.serves("stand-in:1")
    name_it(folder, "alias: scale")
    assert meant(folder, "stand-in", "stand-in:1") == ["scale:1", "scale:1"]
    shutil.rmtree(folder.root / "stand-in")
    folder.look()
    assert not folder.catalogue.serves("stand-in")


@pytest.mark.cases("name, below")
def test_a_second_name_may_be_what_clients_of_openai_call_a_model(folder: ModelsFolder, name: str, below: str) -> None:
    name_it(folder, "alias: scale", name, below)
    assert meant(folder, name, f"{name}:1") == ["scale:1", "scale:1"]
    assert [model.id for model in folder.catalogue.versions(name)] == ["scale:1"]
    assert folder.catalogue.bare(f"{name}:1") == folder.catalogue.bare(f"{name}@stable") == name
    name_it(folder, "alias: nothing", name, below)
    assert meant(folder, name) == ["scale:1"]


@pytest.mark.parametrize("name", ["scale:1", "a//b", "../a", "a/../b", "/a", "a/", "a@b", "a b", "a%2Fb"])
def test_a_second_name_is_never_like_a_version_or_a_path(folder: ModelsFolder, name: str) -> None:
    name_it(folder, "alias: scale", name, "stand-in")
    assert folder.catalogue.disabled["stand-in"].startswith("stand-in/model.yaml: name: expected")


@pytest.mark.cases("text, reason")
def test_a_name_that_leads_nowhere_is_off_or_as_it_was(folder: ModelsFolder, text: str, reason: str) -> None:
    name_it(folder, text)
    assert folder.catalogue.disabled["stand-in"].startswith(f"stand-in/model.yaml: {reason}")
    name_it(folder, "alias: scale")
    assert not folder.catalogue.disabled
    name_it(folder, text)
    assert meant(folder, "stand-in") == ["scale:1"]
    assert folder.catalogue.outdated["stand-in"].startswith(f"stand-in/model.yaml: {reason}")
    assert not folder.catalogue.disabled


def test_changed_endpoints_of_queues_yaml_are_followed_and_other_changes_are_reported(folder: ModelsFolder) -> None:
    path, received = folder.queues.path, list[Topology]()
    folder.queues.follow(received.append)
    assert not folder.look()
    path.write_text(QUEUES.replace("slots: 4", "slots: 16"))
    assert folder.look()
    assert received == [folder.queues.topology]
    assert folder.queues.topology.hardware["engine"].max_batch == 16
    assert not folder.queues.differs
    path.write_text(QUEUES.replace("slots: 4", "slots: 2").replace("usd_per_hour: 1", "usd_per_hour: 3"))
    assert folder.look()
    assert folder.queues.differs
    assert folder.queues.topology.hardware["engine"].price.usd_per_hour == 1
    path.write_text("hardware: wrong")
    assert not folder.look()
    assert not folder.queues.differs  # a restart would fail
    assert "hardware" in folder.queues.wrong
    assert folder.queues.topology.hardware["engine"].max_batch == 2
    path.write_text(QUEUES)
    assert folder.look()
    assert (folder.queues.differs, folder.queues.wrong) == (False, "")


def test_a_report_is_sent_when_it_changes_or_was_lost(folder: ModelsFolder) -> None:
    reporter = Reporter(folder.queues, "worker", "w")
    name, raw = reporter.arguments()
    assert (name, msgspec.json.decode(raw, type=ProcessReport)) == ("w", ProcessReport(kind="worker"))
    reporter.apply(Watched(True, time.time()))
    assert reporter.arguments()[1] == b""
    reporter.apply(Watched(True, time.time() + 90))
    assert msgspec.json.decode(reporter.arguments()[1], type=ProcessReport).clock == -90
    reporter.apply(Watched(False, time.time() + 90))
    assert reporter.arguments()[1] != b""
