"""queues.yaml: what is refused by name, what it means, and the hours of a class."""

import copy
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from docs.schema import schemas
from tasks.queues.endpoints import Tariff
from tasks.queues.hours import Hours, closes_in, flaw, opens_in, serves_in
from tasks.settings import TREE
from tasks.topology import Topology, TopologyError, parse_topology
from tests.unit.strategies import json_values

TEXT = (TREE / "queues.yaml").read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = yaml.safe_load(TEXT)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for step, v in below for p in paths(v, (*path, step)))]


PATHS = [path for path in paths(DOCUMENT) if path]
MISSING = "nothing there"


def changed(path: tuple[Any, ...], value: Any) -> str:
    """The shipped document with another value, or none, at `path`."""
    document = copy.deepcopy(DOCUMENT)
    parent = document
    for step in path[:-1]:
        parent = parent.setdefault(step, {}) if isinstance(parent, dict) else parent[step]
    if value == MISSING:
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


@given(path=st.sampled_from(PATHS), value=json_values | st.just(MISSING) | st.floats() | st.dates())
def test_any_change_to_the_shipped_file_is_a_topology_or_a_topology_error(path: tuple[Any, ...], value: Any) -> None:
    returns_or_refuses(changed(path, value))


@given(start=st.integers(0, len(TEXT)), length=st.integers(0, 40), text=st.text(max_size=10))
def test_any_slip_of_the_pen_is_a_topology_or_a_topology_error(start: int, length: int, text: str) -> None:
    returns_or_refuses(TEXT[:start] + text + TEXT[start + length :])


@pytest.mark.cases("path, value, message")
def test_a_wrong_topology_says_where_and_what_was_expected(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        parse_topology(changed(path, value))
    assert message in str(caught.value)


def test_a_batch_may_take_a_quarter_of_the_tightest_deadline_that_its_class_may_serve() -> None:
    text = (TREE / "queues.yaml").read_text()
    spot = "capacity: spot\n    max_batch: 16"
    bounded = text.replace("max_wait: 0.05", "max_wait: 0.05\n    max_run: 2")
    given = parse_topology(bounded.replace("max_batch: 16", spot))
    endless = parse_topology(re.sub(r"deadline: [0-9.]+", "deadline: null", text))
    assert {one.max_run for one in parse_topology(text).hardware.values()} == {0.0625}
    assert (given.hardware["tpu.bulk"].max_run, given.hardware["cpu.batch"].max_run) == (2, 900)  # bulk alone
    assert endless.hardware["cpu.batch"].runs_at_most == math.inf


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


@pytest.mark.parametrize("file", [*sorted(schemas()), *(TREE / "charts").rglob("crds/*.yaml")], ids=lambda f: f.name)
def test_every_field_says_what_it_means(file: Path) -> None:
    assert undescribed(yaml.safe_load(schemas().get(file) or file.read_text(encoding="utf-8"))) == []


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
    engine = {**ENGINE, "endpoint": {name: value for name, value in endpoint.items() if value != MISSING}, **fields}
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


@pytest.mark.cases("path, asked")
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


@pytest.mark.cases("price, message")
def test_a_device_of_ones_own_is_paid_by_the_hour(price: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        parse_topology(changed(("hardware", "cpu.batch", "price"), price))
    assert message in str(caught.value)


@pytest.mark.cases("fields, message")
def test_a_wrong_endpoint_says_where_and_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        with_engine(**fields)
    assert message in str(caught.value)


BERLIN = "Europe/Berlin"
NIGHT = Hours(hours="22:00-07:00", zone=BERLIN)


def at(text: str, zone: str = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.cases("now, opens, closes")
def test_a_class_serves_within_its_hours(now: str, opens: float, closes: float) -> None:
    assert (opens_in(NIGHT, at(now)), closes_in(NIGHT, at(now))) == (opens, closes)
    assert (opens_in(None, at(now)), closes_in(None, at(now))) == (0.0, math.inf), "without hours it always does"


CLOCKS = st.times().map(lambda one: f"{one:%H:%M}")


@given(CLOCKS, CLOCKS, st.sampled_from([BERLIN, "UTC", "Asia/Kathmandu"]), st.floats(1.6e9, 2e9))
def test_a_class_is_open_or_opens_within_a_day(begin: str, end: str, zone: str, now: float) -> None:
    available = Hours(hours=f"{begin}-{end}", zone=zone)
    if flaw(available) is not None:
        assert begin == end
        return
    opens, closes = opens_in(available, now), closes_in(available, now)
    assert (opens == 0) != (closes == 0)
    assert 0 < opens + closes <= 25 * 3600
    if opens:
        assert closes_in(available, now + opens) > 0


def test_a_worker_that_would_have_to_leave_at_once_waits_for_the_next_hours() -> None:
    assert serves_in(NIGHT, at("2026-11-30 23:00"), 60) == 0
    assert serves_in(NIGHT, at("2026-12-01 06:59"), 60) == 60 + 15 * 3600
    assert serves_in(NIGHT, at("2026-11-30 21:00"), 60) == 3600
    assert serves_in(None, 0.0, 60) == 0


def test_hours_that_cannot_be_are_named() -> None:
    assert flaw(Hours(hours="07:00-07:00")) == ("hours", "two different times", "07:00-07:00")
    zone = "a time zone that this machine knows, such as Europe/Berlin"
    assert flaw(Hours(hours="07:00-08:00", zone="Mars/Olympus")) == ("zone", zone, "Mars/Olympus")
    with pytest.raises(msgspec.ValidationError, match="Expected `str` matching regex"):
        msgspec.convert({"hours": "24:00-07:00"}, Hours)
