"""Whom a router believes, where it lets data go, and that no secret stands in what it writes."""

import base64
import logging
import runpy
import secrets
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import body_of
from broker.port import Arrival
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from router.service import classifier
from router.service.admission import Place, Rules
from router.service.classifier import load_classifier
from router.service.decision import Cancel, Decision, End, GiveUp
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.queues.locality import Locality
from tasks.settings import TREE, SettingsError, settings_from
from tasks.telemetry import JsonLines, redacted
from tasks.topology import Tenant, load_topology
from taxiway import Client, TaxiwayError
from taxiway.contract.request import Request
from taxiway.contract.wire import HEADER, cancel_message, check_signed, decode_envelope, infer_message
from taxiway.errors import BrokerUnavailableError, InvalidRequestError
from tests.builders import a_class, a_device, a_topology
from tests.unit.router.service.deciding import decide
from tests.unit.router.service.test_admission import decision, error_of
from tests.unit.strategies import json_values

OLD, NEW, OTHER = b"o" * 16, b"n" * 16, b"x" * 16
RULES = Rules(load_topology(TREE / "queues.yaml"), load_catalogue(TREE / "models"), (b"s" * 16,), producers=(OLD, NEW))
DAY = RULES.topology.limits.keep_record
REQUEST = Request(model="echo", inputs="hällo", deadline=0.5)


def asked(key: bytes | None = NEW) -> bytes:
    return infer_message("j1", REQUEST, reply="c1", origin="test", key=key, trace={"traceparent": "00-1-2-01"})


def decided(raw: bytes, *, tag: str = "7.1", later: float = 0.0, rules: Rules = RULES) -> Decision:
    working = WorkingSnapshot(rules.topology, rules.book, FleetSnapshot())
    return decide(Arrival(tag, raw, decode_envelope(raw)), rules, working, time.time() + later)


@pytest.mark.parametrize("key", [OLD, NEW])
def test_what_a_producer_signed_with_any_key_that_is_known_is_believed(key: bytes) -> None:
    assert isinstance(decided(asked(key)), End)  # no device is live
    assert decided(cancel_message("j1", origin="test", key=key)) == Cancel("j1")


@pytest.mark.parametrize("raw", [asked(None), asked(OTHER), cancel_message("j1", origin="test")])
def test_what_none_of_them_signed_is_parked_and_ends_and_cancels_nothing(raw: bytes) -> None:
    dead_lettered = decided(raw)
    assert (
        isinstance(dead_lettered, GiveUp)
        and "signed by a producer" in dead_lettered.reason
        and dead_lettered.end is None
    )


@pytest.mark.parametrize("later", [DAY + 60, -DAY - 60])
def test_what_was_signed_when_copies_are_not_known_any_more_is_parked(later: float) -> None:
    dead_lettered = decided(asked(), later=later)
    assert isinstance(dead_lettered, GiveUp) and "signed within" in dead_lettered.reason
    assert isinstance(decided(asked(), later=later * 0.99), End)


def test_what_an_operator_replays_needs_no_signature() -> None:
    assert isinstance(decided(asked(None), tag=""), End)


NAMES = st.sampled_from([*sorted(decode_envelope(asked()).headers), "reply", "signed_at", "signature"]) | st.text()


@given(name=NAMES, value=json_values, own=st.booleans())
def test_no_header_can_be_changed_or_added_also_in_the_producers_own(name: str, value: Any, own: bool) -> None:
    envelope = decode_envelope(asked())
    headers = envelope.headers[HEADER] if own else envelope.headers
    value = msgspec.json.decode(msgspec.json.encode(value))  # as a message has it: infinity is null there
    was, headers[name] = headers.get(name, msgspec.UNSET), value
    if value != was:
        with pytest.raises(InvalidRequestError):
            check_signed(envelope, [NEW], now=time.time(), longest=DAY)


@given(place=st.integers(0, len(decode_envelope(asked()).payload()) - 1), byte=st.integers(0, 255))
def test_no_byte_of_the_body_can_be_changed(place: int, byte: int) -> None:
    envelope = decode_envelope(asked())
    body = bytearray(envelope.payload())
    changed, body[place] = body[place] != byte, byte
    envelope.body = base64.b64encode(body).decode()
    if changed:
        with pytest.raises(InvalidRequestError):
            check_signed(envelope, [NEW], now=time.time(), longest=DAY)


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


@pytest.mark.cases("inputs, label")
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


PASSWORD = "hush-hush"
KEY = f"taxiway_{secrets.token_urlsafe(32)}"
SECRET = "ab" * 32


def logged(message: str, *args: object, **extra: str) -> str:
    try:
        raise OSError(f"no way to amqp://me:{PASSWORD}@host/vhost for {KEY}")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, message, args, sys.exc_info())
    for name, value in extra.items():
        setattr(record, name, value)
    return JsonLines().format(record)


def test_what_is_logged_holds_no_password_and_no_key() -> None:
    line = logged(f"at redis://:{PASSWORD}@host:1/0", url=f"rediss://me:{PASSWORD}@host", header=f"Bearer {PASSWORD}")
    assert PASSWORD not in line
    assert KEY not in line
    assert "amqp://…@host/vhost" in line
    assert "rediss://…@host" in line


@pytest.mark.parametrize("text", ["http://host/a@b", "mail me@host", "taxiway_short", "a: //b", "10:00 // x @ y"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_no_answer_of_the_http_api_reveals_the_brokers_address_or_password() -> None:
    assert PASSWORD.encode() not in body_of(BrokerUnavailableError(f"redis://:{PASSWORD}@host did not answer"))


@pytest.mark.parametrize(
    "url", [f"redis://me:{PASSWORD}/@host", f"http://me:{PASSWORD}@", f"http://me:{PASSWORD}/@host"]
)
def test_a_wrong_address_is_reported_without_its_password(url: str) -> None:
    with pytest.raises(TaxiwayError) as caught:
        Client(url)
    assert PASSWORD not in str(caught.value)


def test_a_key_that_cannot_be_one_is_not_shown_and_one_for_a_broker_is_refused() -> None:
    for url, key in (("http://host", f"{PASSWORD}\r\nx: y"), ("redis://host", PASSWORD)):
        with pytest.raises(TaxiwayError) as caught:
            Client(url, key=key)
        assert PASSWORD not in str(caught.value)


def test_settings_and_rules_show_no_secret(tmp_path: Path) -> None:
    settings = settings_from({"TAXIWAY_BROKER": f"redis://:{PASSWORD}@host", "TAXIWAY_SECRET": SECRET})
    rules = Rules(load_topology(settings.queues), Catalogue({}), settings.secret)
    shown = f"{settings!r} {rules!r}"
    assert PASSWORD not in shown
    assert repr(settings.secret) not in shown
    with pytest.raises(SettingsError) as caught:
        settings_from({"TAXIWAY_BROKER": f"ftp://me:{PASSWORD}@host", "TAXIWAY_SECRET": SECRET})
    assert PASSWORD not in str(caught.value)
