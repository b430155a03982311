import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from tasks.models.folder import CatalogueReport, ModelsFolder, Reporter, Watched, changes
from tasks.queues.queues_file import QueuesFile
from tasks.topology import Topology
from tests.builders import recorded
from tests.graphs import SCALE_SPECS, scale_graph, write_model

QUEUES = recorded("documents/endpoint.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> ModelsFolder:
    write_model(tmp_path / "models", "scale", scale_graph(2.0), **SCALE_SPECS)
    (tmp_path / "queues.yaml").write_text(QUEUES)
    return ModelsFolder(tmp_path / "models", QueuesFile(tmp_path / "queues.yaml"))


def base(folder: ModelsFolder) -> float:
    return folder.book.lookup(folder.catalogue.resolve("scale"), "onnx", "cpu", "Some CPU").profile.base


def test_a_new_model_is_there_with_the_next_check_and_followers_are_notified(folder: ModelsFolder) -> None:
    received: list[set[str]] = []
    folder.follow(lambda catalogue, book: received.append(set(catalogue.models)))
    write_model(folder.root, "other", scale_graph(2.0), **SCALE_SPECS)
    assert folder.look()
    assert received == [{"scale:1", "other:1"}]
    assert set(folder.digests) == {"scale:1", "other:1"}


def test_a_folder_whose_link_is_swapped_counts_as_changed_as_a_mounted_one_is(folder: ModelsFolder) -> None:
    """As Kubernetes swaps a ConfigMap: the model's folder leads to `..data`, and that to the present state."""
    root = folder.root
    for name, factor in (("..first", 2.0), ("..second", 3.0)):
        write_model(root / name, "scale", scale_graph(factor), **SCALE_SPECS)
    shutil.rmtree(root / "scale")
    (root / "..data").symlink_to("..first")
    (root / "scale").symlink_to("..data/scale")
    folder.look()
    first = folder.digests
    assert set(first) == {"scale:1"}
    (root / "..new").symlink_to("..second")
    (root / "..new").replace(root / "..data")
    assert folder.look()
    assert changes(first, folder.digests)["replaced"] == ["scale:1"]


def test_a_file_that_keeps_its_size_and_time_is_read_on_a_requested_reload(folder: ModelsFolder) -> None:
    path = folder.root / "scale" / "graph.onnx"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not folder.look()
    assert folder.look(closely=True)
    assert "artefacts.graph.sha256" in folder.catalogue.outdated["scale:1"]


def test_a_folder_that_is_away_for_a_moment_takes_no_models_with_it(folder: ModelsFolder) -> None:
    folder.root.rename(folder.root.parent / "away")
    assert not folder.look()
    assert folder.catalogue.serves("scale")
    (folder.root.parent / "away").rename(folder.root)
    assert not folder.look()


def test_an_artefact_that_comes_after_its_model_repairs_it(folder: ModelsFolder) -> None:
    made = write_model(folder.root, "late", scale_graph(2.0), **SCALE_SPECS)
    content = (made / "graph.onnx").read_bytes()
    (made / "graph.onnx").unlink()
    folder.look()
    assert "late" in folder.catalogue.disabled
    (made / "graph.onnx").write_bytes(content)
    assert folder.look()
    assert folder.catalogue.serves("late")


def name_it(folder: ModelsFolder, text: str, name: str = "stand-in", below: str = "") -> None:
    """Give `stand-in`, or another second name, a new meaning."""
    place = folder.root / (below or name)
    place.mkdir(exist_ok=True)
    (place / "model.yaml").write_text(f"name: {name}\n{text}\n")
    folder.look(closely=True)


def meant(folder: ModelsFolder, *references: str) -> list[str]:
    return [folder.catalogue.resolve(reference).id for reference in references]


def test_a_second_name_leads_to_a_model_or_one_version_of_it_and_changes_with_its_file(folder: ModelsFolder) -> None:
    write_model(folder.root, "other", scale_graph(2.0), **SCALE_SPECS, aliases=["stable"])
    second = (folder.root / "other" / "model.yaml").read_text().replace("version: 1", "version: 2")
    (folder.root / "other" / "model-2.yaml").write_text(second.replace("stable", "next"))
    name_it(folder, "alias: other")
    found = meant(folder, "stand-in", "stand-in:2", "stand-in@next", "other")
    assert found == ["other:1", "other:2", "other:2", "other:1"]
    assert folder.digests["stand-in"] == "other:1"
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


def test_a_report_is_sent_when_it_changes_or_was_lost_and_asked_looks_once(folder: ModelsFolder) -> None:
    reporter = Reporter(folder, "worker", "w")
    name, raw = reporter.arguments()
    assert (name, set(msgspec.json.decode(raw, type=CatalogueReport).models)) == ("w", {"scale:1"})
    reporter.apply(Watched(3, True, time.time()))
    assert not reporter.requested  # that was before it began, and it has read the folder since
    assert msgspec.json.decode(reporter.arguments()[1], type=CatalogueReport).reload == 3
    reporter.apply(Watched(3, True, time.time()))
    assert reporter.arguments()[1] == b""
    reporter.apply(Watched(4, False, time.time()))
    assert reporter.requested
    assert reporter.arguments()[1]
    reporter.looked()
    assert not reporter.requested
    assert msgspec.json.decode(reporter.arguments()[1], type=CatalogueReport).reload == 4
