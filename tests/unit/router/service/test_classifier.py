import runpy
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import msgspec
import pytest

from router.decide.snapshot import FleetSnapshot
from router.service import classifier
from router.service.admission import Place, Rules
from router.service.classifier import load_classifier
from router.service.decision import Decision
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.queues.locality import Locality
from tasks.settings import TREE, SettingsError
from tasks.topology import Tenant
from tests.builders import a_class, a_device, a_topology
from tests.unit.router.service.test_admission import decision, error_of

TOPOLOGY = msgspec.structs.replace(
    a_topology(**{"home.cpu": a_class(runtimes=("echo",), labels=("ward",)), "cloud.cpu": a_class(runtimes=("echo",))}),
    tenants={"clinic": Tenant(locality="ward")},
)
FLEET = FleetSnapshot(devices=tuple(a_device(name, runtimes=("echo",)) for name in TOPOLOGY.hardware))
GROUP = "taxiway.classifiers"
CATALOGUE = load_catalogue(TREE / "models")


def rules(*, locality: Locality | None = None, classify: classifier.Classifier | None = None) -> Rules:
    topology = msgspec.structs.replace(TOPOLOGY, locality=locality or Locality())
    return Rules(topology, CATALOGUE, (b"0123456789abcdef",), classify=classify)


def where(found: Decision) -> list[str]:
    """The classes on which the job may run."""
    assert isinstance(found, Place), found
    return list(found.ticket.variants)


def refusal(found: Decision) -> str:
    return str(error_of(found))


def private(model: str, inputs: Any, parameters: Mapping[str, Any]) -> str | None:
    return "ward" if "patient" in str([inputs, parameters]) else None


def faulty(model: str, inputs: Any, parameters: Mapping[str, Any]) -> str | None:
    raise ValueError(f"cannot read {inputs}")


def test_labels_of_request_tenant_content_fleet_and_model_keep_work_at_home() -> None:
    assert where(decision(FLEET, rules=rules())) == ["cloud.cpu", "home.cpu"]
    assert where(decision(FLEET, rules=rules(), locality="ward")) == ["home.cpu"]
    assert where(decision(FLEET, rules=rules(), tenant="clinic")) == ["home.cpu"]
    assert where(decision(FLEET, rules=rules(locality=Locality(default="ward")))) == ["home.cpu"]
    assert where(decision(FLEET, rules=rules(classify=private), inputs="a patient")) == ["home.cpu"]
    assert where(decision(FLEET, rules=rules(classify=private))) == ["cloud.cpu", "home.cpu"]
    models = {name: msgspec.structs.replace(one, locality="ward") for name, one in CATALOGUE.models.items()}
    assert where(decision(FLEET, rules=replace(rules(), catalogue=Catalogue(models)))) == ["home.cpu"]


def test_a_request_cannot_undo_the_label_of_its_tenant() -> None:
    text = refusal(decision(FLEET, rules=rules(), tenant="clinic", locality="cloud"))
    assert "cloud.cpu/echo: the data must stay on 'cloud+ward', which the class is not" in text


def test_a_fleet_can_refuse_work_that_may_go_anywhere() -> None:
    strict = rules(locality=Locality(required=True), classify=private)
    assert "locality: expected a label, as this fleet refuses work that may go anywhere" in refusal(
        decision(FLEET, rules=strict)
    )
    assert where(decision(FLEET, rules=strict, inputs="a patient")) == ["home.cpu"]


def test_work_that_a_classifier_cannot_read_is_refused_and_nothing_of_it_is_told() -> None:
    text = refusal(decision(FLEET, rules=rules(classify=faulty), inputs="SECRET"))
    assert "the classifier failed with ValueError" in text and "SECRET" not in text
    assert "the classifier returned int" in refusal(decision(FLEET, rules=rules(classify=lambda *_: 3)))  # type: ignore[arg-type]


def test_values_beside_their_message_need_a_label() -> None:
    beside = {"ref": "b" * 32, "bytes": 9, "datatype": "BYTES", "digest": "0" * 64}
    text = refusal(decision(FLEET, rules=rules(classify=private), inputs=beside))
    assert "locality: expected a label with values that are stored beside their message" in text
    assert where(decision(FLEET, rules=rules(classify=private), inputs=beside, tenant="clinic")) == ["home.cpu"]


@pytest.mark.parametrize(
    ("inputs", "label"),
    [
        ("The PATIENT sleeps.", "ward"),
        ({"text": ["well", b"MRN: 1234567"]}, "ward"),
        ([{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["MRN 12345678 is back"]}], "ward"),
        ([1.0, None, {"text": "MRN 123"}], None),
    ],
)
def test_the_example_labels_texts_that_match_a_pattern(inputs: Any, label: str | None) -> None:
    folder = TREE / "examples" / "classifier"
    described = tomllib.loads((folder / "pyproject.toml").read_text())
    module, _, function = described["project"]["entry-points"][GROUP]["patterns"].partition(":")
    example = runpy.run_path(str(folder / f"{module}.py"))[function]
    assert example("sentiment", inputs, {}) == label
    assert example("sentiment", "", {"about": inputs}) == label


def test_a_classifier_that_is_not_installed_keeps_a_router_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"patterns": EntryPoint("patterns", "gone:classify", GROUP)}
    monkeypatch.setattr(classifier, "registered", lambda kind: points)
    assert load_classifier(None) is None
    with pytest.raises(SettingsError, match=r"entry point of the group taxiway.classifiers \(patterns\), got 'other'"):
        load_classifier("other")
    with pytest.raises(SettingsError, match=r"a function that can be imported, got .*ModuleNotFoundError"):
        load_classifier("patterns")
