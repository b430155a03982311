"""What travels with a job: its ticket and its trace."""

import uuid
from importlib.metadata import EntryPoint
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context

from tasks.settings import SettingsError
from tasks.telemetry import begin, mark, parent_of, start_tracing
from tasks.ticket import Ticket, TicketError, job_id, read_ticket, sign
from taxiway.contract.request import Terms
from taxiway.contract.wire import TRACEPARENT, TRACESTATE, key_id, submitting
from tests.builders import a_ticket
from tests.unit.strategies import json_values

KEY, BODY = (b"k" * 32,), b"[[], {}, {}]"
TICKET = a_ticket(
    "job-1",
    "sentiment:1",
    variants={"cpu.batch": "onnx-int8"},
    prices={"cpu.batch": 0.05},
    accepted=1000.5,
    deadline_at=1005.5,
    reason="cheapest – “surely”",
    reply="client-1",
)
HEADER = sign(TICKET, BODY, KEY)


@given(data=st.data())
def test_a_header_that_was_changed_or_cut_is_refused(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(HEADER) - 1))
    changed = HEADER[:place] + data.draw(st.characters()) + HEADER[place + 1 :]
    for header in {changed, HEADER[:place]} - {HEADER}:
        with pytest.raises(TicketError):
            read_ticket(header, BODY, KEY)


@given(body=st.binary().filter(lambda body: body != BODY))
def test_another_body_is_refused(body: bytes) -> None:
    with pytest.raises(TicketError, match="for this body"):
        read_ticket(HEADER, body, KEY)


@given(keys=st.lists(st.binary(min_size=16).filter(lambda key: key.rstrip(b"\0") != KEY[0]), min_size=1, max_size=3))
def test_other_keys_refuse_it_and_say_which_they_are(keys: list[bytes]) -> None:
    with pytest.raises(TicketError, match="signed by a router of this fleet") as caught:
        read_ticket(HEADER, BODY, keys)
    assert key_id(keys[-1]) in str(caught.value)
    assert keys[-1].hex() not in str(caught.value)


def test_a_key_is_replaced_step_by_step_while_everything_in_flight_stays_good() -> None:
    old, new = KEY[0], b"n" * 32
    steps = [(old,), (old, new), (new, old), (new,)]
    for before, after in pairwise(steps):
        for signing, reading in ((before, after), (after, before)):  # some processes are a step behind
            assert read_ticket(sign(TICKET, BODY, signing), BODY, reading) == TICKET
    with pytest.raises(TicketError):
        read_ticket(HEADER, BODY, (new,))


@given(header=st.none() | st.binary() | st.text() | json_values)
def test_a_header_that_is_no_ticket_is_refused(header: Any) -> None:
    with pytest.raises(TicketError):
        read_ticket(header, BODY, KEY)


def test_what_a_router_of_another_release_signed_is_refused() -> None:
    class Other(Ticket, frozen=True, kw_only=True):
        admin: bool

    other = Other(**msgspec.structs.asdict(TICKET), admin=True)
    with pytest.raises(TicketError, match="admin"):
        read_ticket(sign(other, BODY, KEY), BODY, KEY)


names = st.text(min_size=1, max_size=5).filter(str.isprintable)


def test_the_id_under_a_key_stays_the_same_in_all_releases_whatever_the_other_terms() -> None:
    for deadline in (None, 5.0):
        terms = Terms(tenant="tower", idempotency_key="flight-17", deadline=deadline)
        assert job_id(terms, b"s" * 32) == "c4c505e1-2d5d-84c8-a171-75e74bbbeb69"


def test_an_id_without_a_key_is_a_random_uuid() -> None:
    ids = {job_id(Terms(), KEY[0]) for _ in range(2)}
    assert [uuid.UUID(one).version for one in ids] == [4, 4]


@given(first=st.tuples(names, names), second=st.tuples(names, names))
def test_another_tenant_key_or_secret_gives_another_id(first: tuple[str, str], second: tuple[str, str]) -> None:
    one, other = (Terms(tenant=tenant, idempotency_key=key) for tenant, key in (first, second))
    assert (job_id(one, KEY[0]) == job_id(other, KEY[0])) == (first == second)
    assert job_id(one, KEY[0]) != job_id(one, b"b" * 32)


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
