from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context

from tasks.settings import SettingsError
from tasks.telemetry import begin, mark, parent_of, start_tracing
from taxiway.contract.wire import TRACEPARENT, TRACESTATE, submitting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "parent", [PARENT[:-1] + "0", "00-" + "0" * 32 + PARENT[35:], "nothing", "", 7, None, [PARENT]]
)
def test_what_is_not_sampled_or_no_trace_at_all_has_no_parent(parent: Any) -> None:
    start_tracing("router", {"OTEL_TRACES_EXPORTER": "none"})
    assert parent_of({TRACEPARENT: parent}) is parent_of({}) is None
    with submitting("echo") as carried:
        assert carried == {}, "the producer is in no trace"


@given(st.fixed_dictionaries({TRACEPARENT: st.just(PARENT), TRACESTATE: st.text() | st.integers() | st.none()}))
def test_no_tracestate_keeps_a_message_from_being_traced(headers: dict[str, Any]) -> None:
    parent = parent_of(headers)
    assert parent is not None
    assert parent.since >= 0


def test_a_message_goes_on_with_the_time_and_with_what_others_put_into_its_tracestate() -> None:
    headers: dict[str, Any] = {TRACEPARENT: PARENT, TRACESTATE: "shop=a,taxiway=5,lab=b"}
    parent = parent_of(headers)
    assert parent is not None
    assert parent.since == 5e-6
    mark(headers, begin("place", parent, 10.0, {}), 12.0)
    assert headers == {TRACEPARENT: PARENT, TRACESTATE: "taxiway=12000002,shop=a,lab=b"}  # no SDK: its own span


def test_an_exporter_that_is_not_installed_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match=r"expected an installed exporter \(.*console.*\), got 'pigeon'"):
        start_tracing("router", {"OTEL_TRACES_EXPORTER": "pigeon"})


def installed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, "opentelemetry_traces_exporter")
    monkeypatch.setattr("tasks.telemetry.entry_points", lambda group: [point])


@pytest.mark.parametrize(("protocol", "named"), [("", "otlp_proto_http"), ("grpc", "otlp_proto_grpc")])
def test_otlp_is_the_exporter_of_its_protocol(monkeypatch: pytest.MonkeyPatch, protocol: str, named: str) -> None:
    installed(monkeypatch, named, "no_such_package:Exporter")
    with pytest.raises(SettingsError, match="otlp: No module named"):
        start_tracing("router", {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})


def test_a_producers_own_trace_is_carried_whatever_sdk_it_has() -> None:
    parent = parent_of({TRACEPARENT: PARENT, TRACESTATE: "shop=a"})
    assert parent is not None
    token = context.attach(parent.context)
    try:
        with submitting("echo", "1") as carried:
            assert carried == {TRACEPARENT: PARENT, TRACESTATE: "shop=a"}
    finally:
        context.detach(token)
