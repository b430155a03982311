import base64
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import Decision, Order, Rules, admit, decide, rows_of, size_of
from router.explain import read_explanation
from router.fleet import FleetSnapshot
from router.outlook import Outlook
from tasks.catalogue import load_catalogue
from tasks.facts import DeviceFacts
from tasks.settings import TREE
from tasks.ticket import read_ticket
from tasks.topology import load_topology
from tasks.transport import Arrival
from taxiway.errors import DeadlineExceededError, InvalidRequestError, NoDeviceError, RequestTooLargeError
from taxiway.job import JobState, read_meta, read_result, record_from
from taxiway.keys import CANCEL, INFER
from taxiway.request import Request, job_id
from taxiway.wire import HEADER, Envelope, cancel_message, decode_envelope, infer_message, request_body, task_envelope

RULES = Rules(load_topology(TREE / "queues.yaml"), load_catalogue(TREE / "models"), secret=b"0123456789abcdef")
NOW = 1_700_000_000.0


def device(hardware_class="cpu.batch", runtimes=("echo", "onnx")):
    return DeviceFacts(
        worker=f"{hardware_class}.a",
        hardware_class=hardware_class,
        device="cpu:0",
        kind="cpu",
        emulated=hardware_class != "cpu.batch",
        name="test",
        memory_total=2**34,
        memory_free=2**34,
        runtimes=runtimes,
        warm=("echo:1/echo",),
    )


FLEET = FleetSnapshot(devices=(device(), device("gpu.realtime")))


def seen(fleet):
    return Outlook(RULES.topology, RULES.book, fleet)


def arrival(raw):
    return Arrival("7.1", raw, decode_envelope(raw))


def decision(fleet=FLEET, *, headers=None, job="j1", **fields):
    request = Request(**{"model": "echo", "inputs": "hello", **fields})
    envelope = task_envelope(INFER, job, request_body(request), header={"reply": "c1"}, origin="test")
    envelope.headers.update(headers or {})
    return decide(Arrival("7.1", b"raw", envelope), RULES, seen(fleet), NOW)


def error_of(decided: Decision):
    assert decided.ending is not None
    with pytest.raises(Exception) as caught:
        read_result(read_meta(decided.ending.meta))
    return caught.value


def test_an_arrival_is_forwarded_with_its_body_untouched_and_a_ticket_that_a_worker_accepts():
    raw = infer_message("j1", Request(model="echo", inputs="hello", deadline=5), reply="c1", origin="test")
    body = decode_envelope(raw).payload()

    admitted = decide(arrival(raw), RULES, seen(FLEET), NOW).admitted

    assert admitted.outgoing.envelope.payload() == body
    ticket = read_ticket(admitted.outgoing.envelope.headers[HEADER], body, RULES.secret)
    assert (ticket.job, ticket.model, ticket.reply) == ("j1", "echo:1", "c1")
    assert (ticket.accepted, ticket.deadline_at) == (NOW, NOW + 5)
    assert ticket.variants["cpu.batch"] == "echo"
    assert admitted.outgoing.queue in ticket.variants


def test_the_record_tells_where_the_job_is_and_why():
    outgoing = decision(deadline=5).admitted.outgoing

    record = record_from("j1", outgoing.fields)

    assert record.state is JobState.QUEUED
    assert (record.model, record.hardware_class, record.variant) == ("echo:1", "cpu.batch", "echo")
    assert record.reason and record.reason in outgoing.envelope.headers["kwargsrepr"]
    table = read_explanation(outgoing.fields["explanation"])
    assert table.considered[0].hardware_class == "cpu.batch"


def test_a_job_without_a_deadline_has_none_in_its_ticket():
    rules = Rules(
        msgspec.structs.replace(
            RULES.topology,
            service={n: msgspec.structs.replace(s, deadline=None) for n, s in RULES.topology.service.items()},
        ),
        RULES.catalogue,
        RULES.secret,
    )
    request = Request(model="echo", inputs="x")
    body = request_body(request)
    order = Order("j1", request, task_envelope(INFER, "j1", body, header={}, origin="t"), body, accepted=NOW)

    assert admit(order, rules, seen(FLEET)).ticket.deadline_at == 0


def test_celerys_expires_shortens_the_deadline():
    expires = datetime.fromtimestamp(NOW + 2, UTC).isoformat()

    assert decision(deadline=30, headers={"expires": expires}).admitted.ticket.deadline_at == NOW + 2
    assert decision(deadline=1, headers={"expires": expires}).admitted.ticket.deadline_at == NOW + 1


def test_a_message_that_expired_before_it_was_placed_ends_as_expired():
    expires = datetime.fromtimestamp(NOW - 1, UTC).isoformat()

    decided = decision(headers={"expires": expires})

    assert decided.ending.state is JobState.EXPIRED
    assert isinstance(error_of(decided), DeadlineExceededError)


@pytest.mark.parametrize("expires", ["soon", 7, ["x"]])
def test_an_expires_that_is_no_date_is_named(expires):
    assert error_of(decision(headers={"expires": expires})).details["field"] == "expires"


def test_an_idempotency_key_must_give_the_messages_id():
    refused = decision(idempotency_key="k1", job="other")
    agreed = decision(idempotency_key="k1", job=job_id(Request(model="echo", inputs="hello", idempotency_key="k1")))

    assert error_of(refused).details["field"] == "idempotency_key"
    assert agreed.admitted is not None


def test_a_refusal_goes_to_the_client_that_asked():
    decided = decision(model="ecko")

    assert decided.ending.reply == "c1"
    assert error_of(decided).details["near"]


def test_a_body_over_the_limit_is_refused():
    limits = msgspec.structs.replace(RULES.topology.limits, payload=100)
    rules = Rules(msgspec.structs.replace(RULES.topology, limits=limits), RULES.catalogue, RULES.secret)
    raw = infer_message("j1", Request(model="echo", inputs="x" * 200), reply="", origin="t")

    error = error_of(decide(arrival(raw), rules, FLEET, NOW))

    assert isinstance(error, RequestTooLargeError)
    assert error.details["limit"] == "payload"


def test_without_a_live_device_the_job_fails_as_the_fleets_fault():
    assert isinstance(error_of(decision(FleetSnapshot())), NoDeviceError)


def test_a_stale_fleet_still_places_and_says_so():
    admitted = decision(FleetSnapshot(stale=True)).admitted

    assert "queues.yaml alone" in admitted.placement.reason


def test_a_cancel_message_names_the_job_to_cancel():
    decided = decide(arrival(cancel_message("j9", origin="t")), RULES, seen(FLEET), NOW)

    assert decided == Decision("7.1", cancel="j9")


def test_a_cancel_message_without_an_id_ends_itself():
    envelope = task_envelope(CANCEL, "c1", b"[[],{},{}]", header={}, origin="t")

    assert isinstance(error_of(decide(Arrival("1", b"", envelope), RULES, seen(FLEET), NOW)), InvalidRequestError)


def test_another_task_is_parked_and_its_producer_is_told():
    envelope = task_envelope("tasks.add", "j1", b"[[],{},{}]", header={}, origin="t")

    decided = decide(Arrival("1", b"", envelope), RULES, seen(FLEET), NOW)

    assert "tasks.add" in decided.letter
    assert error_of(decided).details["field"] == "task"


def test_what_cannot_be_read_is_parked():
    assert decide(Arrival("1", b"\x00", None, "not a message"), RULES, seen(FLEET), NOW) == Decision(
        "1", letter="not a message"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8), below, max_size=4),
    max_leaves=12,
)


@given(
    headers=st.dictionaries(st.sampled_from(["task", "id", "expires", HEADER]), json_values),
    body=st.binary(max_size=60) | json_values.map(lambda v: msgspec.json.encode([[], v, {}])),
    known=st.booleans(),
)
def test_nothing_that_a_producer_writes_makes_deciding_fail(headers, body, known):
    if known:
        headers = {**headers, "task": INFER, "id": "j1"}
    envelope = Envelope(body=base64.b64encode(body).decode(), headers=headers, properties={"body_encoding": "base64"})

    decided = decide(Arrival("1", b"raw", envelope), RULES, seen(FLEET), NOW)

    assert decided.admitted or decided.ending or decided.letter or decided.cancel


@pytest.mark.parametrize(
    ("model", "inputs", "rows"),
    [
        ("echo", "one", 1),
        ("echo", ["a", "b", "c"], 3),
        ("echo", {"payload": ["a", "b"]}, 2),
        ("echo", [{"name": "payload", "shape": [4], "datatype": "BYTES", "data": list("abcd")}], 4),
        ("classify-image", {"shape": [2, 3, 224, 224], "datatype": "FP32", "data": []}, 1),
        ("sentiment", [], 1),
        ("sentiment", None, 1),
    ],
)
def test_rows_are_counted_without_reading_values(model, inputs, rows):
    assert rows_of(RULES.catalogue.resolve(model), inputs) == rows


def test_a_longer_text_is_a_larger_row_up_to_where_it_is_cut():
    model = RULES.catalogue.resolve("sentiment")

    def size(text):
        return size_of(model, Request(model="sentiment", inputs=text))

    assert size("short") < size("a longer text " * 10) < size("x" * 10_000)
    assert size("x" * 10_000) == model.buckets[-1]
