from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from docs.schema import schemas
from tasks.endpoints import Tariff
from tasks.settings import TREE
from tasks.topology import Topology, TopologyError, load_topology, parse_topology
from tests.unit.strategies import json_values

TEXT = (TREE / "queues.yaml").read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = yaml.safe_load(TEXT)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for step, v in below for p in paths(v, (*path, step)))]


PATHS = [path for path in paths(DOCUMENT) if path]
MISSING = object()


def changed(path: tuple[Any, ...], value: Any) -> str:
    """The shipped document with another value, or none, at `path`."""
    document = copy.deepcopy(DOCUMENT)
    parent = document
    for step in path[:-1]:
        parent = parent.setdefault(step, {}) if isinstance(parent, dict) else parent[step]
    if value is MISSING:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return yaml.safe_dump(document)


def returns_or_refuses(text: str) -> None:
    try:
        assert isinstance(parse_topology(text), Topology)
    except TopologyError as error:
        assert str(error).startswith("queues.yaml: ")
        assert "expected" in str(error)
        assert len(str(error)) < 1000


@given(text=st.text() | st.text("[]{}:,-&*!\n a1'\"|>?%@#~.\t"))
def test_any_text_is_a_topology_or_a_topology_error(text: str) -> None:
    returns_or_refuses(text)


@given(path=st.sampled_from(PATHS), value=json_values | st.just(MISSING) | st.floats() | st.dates())
def test_any_change_to_the_shipped_file_is_a_topology_or_a_topology_error(path: tuple[Any, ...], value: Any) -> None:
    returns_or_refuses(changed(path, value))


@given(start=st.integers(0, len(TEXT)), length=st.integers(0, 40), text=st.text(max_size=10))
def test_any_slip_of_the_pen_is_a_topology_or_a_topology_error(start: int, length: int, text: str) -> None:
    returns_or_refuses(TEXT[:start] + text + TEXT[start + length :])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("hardware", "gpu.realtime", "device"),
            "npu",
            "device: expected one of ['cpu', 'cuda', 'endpoint', 'tpu'], got 'npu'",
        ),
        (("hardware", "cpu.batch", "price"), MISSING, "hardware.cpu.batch.price: expected a value, got nothing"),
        (("hardware", "cpu.batch", "max_batch"), 0, "hardware.cpu.batch.max_batch: expected `int` >= 1, got 0"),
        (
            ("hardware", "cpu.batch", "max_batch"),
            MISSING,
            "hardware.cpu.batch.max_batch: expected a value, got nothing",
        ),
        (
            ("hardware", "cpu.batch", "device"),
            "endpoint",
            "hardware.cpu.batch.endpoint: expected a value, as device is",
        ),
        (("hardware", "cpu.batch", "max_batches"), 1, "(did you mean max_batch?), got 1"),
        (("hardware", "CPU"), {}, "hardware.CPU: expected a key that is `str` matching"),
        (("hardware", "taxiway.arrivals"), DOCUMENT["hardware"]["cpu.batch"], "that is not the arrivals queue's"),
        (("hardware",), {}, "hardware: expected `object` of length >= 1, got {}"),
        (
            ("hardware", "cpu.batch", "reserve_for"),
            "vip",
            "reserve_for: expected one of ['bulk', 'interactive', 'live', ",
        ),
        (("default_service",), "vip", "default_service: expected one of ['bulk', 'interactive', 'live', "),
        (("service", "live", "deadline"), -1, "service.live.deadline: expected `float` > 0.0, got -1"),
        (
            ("tenants",),
            {"lab": {"classes": ["cpu.batch", "x"]}},
            "tenants.lab.classes.1: expected one of ['cpu.batch', ",
        ),
        (("tenants",), {"lab": {"classes": []}}, "tenants.lab.classes: expected `array` of length >= 1, got []"),
        (("tenants",), {"lab": {"usd_per_day": 0}}, "tenants.lab.usd_per_day: expected `float` > 0.0, got 0"),
        (("tenants",), {"lab": {"class": ["x"]}}, "(did you mean classes?)"),
        (("tenants",), {"": {}}, "tenants.: expected a key that is `str` of length >= 1"),
        (("limits", "payload"), "16MB", "limits.payload: expected bytes"),
        (("limits", "keep_record"), 60, "limits.keep_record: expected at least keep_result (3600), got 60"),
        (("limits", "bodies"), "1MiB", "limits.bodies: expected at least payload (16777216), got 1048576"),
        (("limits", "all_bodies"), "1MiB", "limits.all_bodies: expected at least payload (16777216), got 1048576"),
        (("tenants",), {"lab": {"bodies": "1MiB"}}, "tenants.lab.bodies: expected at least payload (16777216), got"),
    ],
)
def test_a_wrong_topology_says_where_and_what_was_expected(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        parse_topology(changed(path, value))
    assert message in str(caught.value)


def test_the_shipped_file_is_a_topology_with_the_four_classes() -> None:
    topology = load_topology(TREE / "queues.yaml")
    assert sorted(topology.hardware) == ["cpu.batch", "cpu.llama", "gpu.realtime", "tpu.bulk"]
    assert topology.hardware["gpu.realtime"].memory == 24 * 2**30


def test_a_batch_may_take_a_quarter_of_the_tightest_deadline_that_its_class_may_serve() -> None:
    text = (TREE / "queues.yaml").read_text()
    spot = "capacity: spot\n    max_batch: 16"
    given = parse_topology(
        text.replace("max_wait: 0.05", "max_wait: 0.05\n    max_run: 2").replace("max_batch: 16", spot)
    )
    endless = parse_topology(re.sub(r"deadline: [0-9.]+", "deadline: null", text))

    assert {name: one.max_run for name, one in load_topology(TREE / "queues.yaml").hardware.items()} == {
        "cpu.batch": 0.0625,
        "cpu.llama": 0.0625,
        "gpu.realtime": 0.0625,
        "tpu.bulk": 0.0625,
    }
    assert (given.hardware["tpu.bulk"].max_run, given.hardware["cpu.batch"].max_run) == (2, 900)  # bulk alone
    assert endless.hardware["cpu.batch"].runs_at_most == math.inf


def test_a_tenant_has_the_rules_that_are_written_and_no_others() -> None:
    rules = {"lab": {"classes": ["cpu.batch"]}, "shop": {"usd_per_day": 2}}
    tenants = parse_topology(changed(("tenants",), rules)).tenants
    assert (tenants["lab"].classes, tenants["lab"].usd_per_day) == (("cpu.batch",), None)
    assert (tenants["shop"].classes, tenants["shop"].usd_per_day) == (None, 2.0)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_a_topology_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "queues.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TopologyError, match="expected a readable file of UTF-8 text"):
        load_topology(path)


@pytest.mark.parametrize("file", sorted(schemas()), ids=lambda file: file.name)
def test_the_schema_in_the_tree_is_the_one_that_the_types_give(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == schemas()[file], "run: make reference"


def undescribed(schema: Any) -> list[str]:
    """The properties of a schema, at any depth, that have no description."""
    if isinstance(schema, list):
        return [name for one in schema for name in undescribed(one)]
    if not isinstance(schema, dict):
        return []
    properties = {name: one for name, one in schema.get("properties", {}).items() if isinstance(one, dict)}
    silent = [name for name, one in properties.items() if not one.get("description")]
    return silent + [name for one in schema.values() for name in undescribed(one)]


@pytest.mark.parametrize("file", sorted(schemas()), ids=lambda file: file.name)
def test_every_field_says_what_it_means(file: Path) -> None:
    assert undescribed(json.loads(schemas()[file])) == []


@pytest.mark.parametrize("file", sorted((TREE / "charts").rglob("crds/*.yaml")), ids=lambda file: file.name)
def test_every_field_of_the_operators_resources_says_what_it_means(file: Path) -> None:
    assert undescribed(yaml.safe_load(file.read_text(encoding="utf-8"))) == []


def test_helm_can_read_the_patterns_of_the_charts_values() -> None:
    (values,) = [text for file, text in schemas().items() if file.name == "values.schema.json"]
    patterns = re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', values)
    assert len(patterns) > 10
    assert [one for one in patterns if re.search(r"\(\?(?:[!=]|<[!=])", one)] == []  # Go has no lookaround


ENGINE: dict[str, Any] = {
    "device": "endpoint",
    "endpoint": {"protocol": "openai", "url": "http://engine:8000/v1/", "slots": 8, "models": {"chat": "SmolLM2"}},
    "price": {"usd_per_hour": 1},
}


def with_engine(**fields: Any) -> Topology:
    """The shipped document with a class of endpoints."""
    endpoint = ENGINE["endpoint"] | fields.pop("endpoint", {})
    engine = {**ENGINE, "endpoint": {name: value for name, value in endpoint.items() if value is not MISSING}, **fields}
    return parse_topology(yaml.safe_dump(DOCUMENT | {"hardware": DOCUMENT["hardware"] | {"engine": engine}}))


def test_a_class_of_endpoints_runs_its_protocol_in_its_slots() -> None:
    one = with_engine().hardware["engine"]
    assert (one.runtimes, one.max_batch, one.max_wait) == (("openai",), 8, 0.0)
    assert one.endpoint is not None
    assert one.endpoint.urls == ("http://engine:8000/v1",)
    assert (one.endpoint.name_of("chat", 3, "v"), one.endpoint.name_of("other", 1, "v")) == ("SmolLM2", None)
    models = {"m": "x", "m:2": "y", "q": {"server": "z", "variant": "q4"}}
    two = with_engine(endpoint={"url": ["http://a", "http://b"], "models": models}).hardware["engine"]
    assert two.endpoint is not None
    assert two.endpoint.urls == ("http://a", "http://b")
    assert (two.endpoint.name_of("m", 1, "v"), two.endpoint.name_of("m", 2, "v")) == ("x", "y")
    assert (two.endpoint.name_of("q", 1, "q4"), two.endpoint.name_of("q", 1, "fp16")) == ("z", None)
    assert two.endpoint.calls == {"m": "x", "m:2": "y", "q": "z"}


@pytest.mark.parametrize(
    ("path", "asked"),
    [(None, "/v1/models"), ("/health", "/health"), ("health", "/v1/health"), ("http://other/", "/v1/http://other/")],
)
def test_probes_go_to_the_servers_root_or_below_its_url_and_never_elsewhere(path: str | None, asked: str) -> None:
    health = {} if path is None else {"path": path}
    endpoint = with_engine(endpoint={"health": health}).hardware["engine"].endpoint
    assert endpoint is not None
    assert endpoint.health.url(endpoint.urls[0], "/models") == f"http://engine:8000{asked}"


def test_an_endpoint_may_be_paid_by_use_alone() -> None:
    price = with_engine(price={"usd_per_million_input": 2, "usd_per_million_output": 8, "usd_per_request": 0.01})
    assert price.hardware["engine"].dollars_per_hour == 0
    assert price.hardware["engine"].price.tariff == Tariff(input=2e-6, cached=2e-6, output=8e-6, request=0.01)
    cheaper = with_engine(price={"usd_per_million_input": 2, "usd_per_million_cached_input": 0.5})
    assert cheaper.hardware["engine"].price.tariff == Tariff(input=2e-6, cached=5e-7, output=0.0, request=0.0)
    assert with_engine().hardware["engine"].price.tariff is None


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ({}, "price.usd_per_hour: expected a number > 0, got 0.0"),
        (
            {"usd_per_hour": 1, "usd_per_request": 1},
            "price.usd_per_request: expected nothing, as only an endpoint has such prices, got 1.0",
        ),
    ],
)
def test_a_device_of_ones_own_is_paid_by_the_hour(price: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        parse_topology(changed(("hardware", "cpu.batch", "price"), price))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": {"protocol": "grpc"}}, "endpoint.protocol: expected one of ['oip', 'openai'], got 'grpc'"),
        ({"endpoint": {"url": "engine:8000"}}, "hardware.engine.endpoint.url: expected `str` matching regex"),
        ({"endpoint": {"url": ["http://a", "http://a/"]}}, "endpoint.url: expected each replica once"),
        ({"endpoint": {"rate": {"requests_per_minute": 0}}}, "rate.requests_per_minute: expected `float` > 0.0, got 0"),
        (
            {"endpoint": {"rate": {"tokens_per_minute": 9}, "protocol": "oip"}},
            "endpoint.rate.tokens_per_minute: expected nothing, as oip counts no tokens, got 9",
        ),
        ({"endpoint": {"health": {"path": "//other/"}}}, "endpoint.health.path: expected `str` matching regex"),
        ({"endpoint": {"start": {}}}, "endpoint.start: expected one of command, llama and deployment, got []"),
        (
            {"endpoint": {"start": {"llama": "m.gguf", "command": "serve"}}},
            "endpoint.start: expected one of command, llama and deployment, got ['command', 'llama']",
        ),
        (
            {"endpoint": {"start": {"llama": "m.gguf"}, "protocol": "oip"}},
            "endpoint.protocol: expected openai, which llama.cpp speaks, got 'oip'",
        ),
        (
            {"endpoint": {"url": "http://127.0.0.1:0/v1"}},
            "endpoint.url: expected a port other than 0, as nothing here starts the engine",
        ),
        ({"endpoint": {"slots": 0}}, "hardware.engine.endpoint.slots: expected `int` >= 1, got 0"),
        ({"endpoint": {"models": {}}}, "endpoint.models: expected a model, or discover: true, got {}"),
        (
            {"endpoint": {"models": MISSING}},
            "endpoint.models: expected a model, or discover: true, got {}",
        ),
        ({"endpoint": {"headers": {"a b": "c"}}}, "endpoint.headers.a b: expected a key that is `str` matching regex"),
        ({"endpoint": {"tls": {"authorities": "ca.pem"}}}, "endpoint.url: expected https:// where tls is given"),
        ({"endpoint": {"tls": {"key": "k.pem"}}}, "endpoint.tls.certificate: expected the certificate of the key"),
        ({"endpoint": {"key": "secret"}}, "no such field, but one of ["),
        (
            {"price": {}},
            "price.usd_per_hour: expected a number > 0, or another price, as somebody pays for the endpoint",
        ),
        ({"price": {"usd_per_million_input": -1}}, "price.usd_per_million_input: expected `float` >= 0.0, got -1"),
        (
            {"price": {"usd_per_million_output": 1}, "endpoint": {"protocol": "oip"}},
            "hardware.engine.price.usd_per_million_output: expected nothing, as oip counts no tokens, got 1",
        ),
        ({"max_batch": 4}, "hardware.engine.max_batch: expected nothing, as it follows from the endpoint, got 4"),
        ({"device": "cpu"}, "hardware.engine.runtimes: expected a value, got nothing"),
    ],
)
def test_a_wrong_endpoint_says_where_and_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        with_engine(**fields)
    assert message in str(caught.value)
