import base64
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.port import Arrival
from broker.valkey.forwarding import forward_call
from router.decide.basis import read_basis
from router.decide.fairness import Tenants, day_of
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import TOLERANCE, WorkingSnapshot
from router.service.admission import Order, Place, Rules, admit, sizes_of
from router.service.decision import Cancel, Decision, End, GiveUp, end_of, undecidable
from tasks.heartbeat import DeviceFacts
from tasks.models.folder import load_catalogue
from tasks.models.profiles import bin_of
from tasks.models.sizes import facts_of, rows_of
from tasks.settings import TREE
from tasks.ticket import job_id
from tasks.topology import Tenant, load_topology
from taxiway import errors
from taxiway.contract import wire
from taxiway.contract.job import JobState, read_accepted, read_meta, read_result, record_from
from taxiway.contract.keys import CANCEL, INFER, flow, spent_key
from taxiway.contract.request import Request, Terms
from tests.builders import a_device, nested
from tests.narrowing import present
from tests.unit.router.service.deciding import decide
from tests.unit.strategies import json_values

RULES = Rules(load_topology(TREE / "queues.yaml"), load_catalogue(TREE / "models"), secret=(b"0123456789abcdef",))
NOW = 1_700_000_000.0


def device(hardware_class: str = "cpu.batch", runtimes: tuple[str, ...] = ("echo", "onnx")) -> DeviceFacts:
    emulated = hardware_class != "cpu.batch"
    return a_device(hardware_class, emulated=emulated, runtimes=runtimes, warm=("echo:1/echo",))


FLEET = FleetSnapshot(devices=(device(), device("gpu.realtime")))
SIMULATING = FleetSnapshot(devices=(device(runtimes=("python", "echo", "onnx")),))


def seen(fleet: FleetSnapshot) -> WorkingSnapshot:
    return WorkingSnapshot(RULES.topology, RULES.book, fleet)


def arrival(raw: bytes) -> Arrival:
    return Arrival("7.1", raw, wire.decode_envelope(raw))


def decision(
    fleet: FleetSnapshot = FLEET,
    *,
    rules: Rules = RULES,
    headers: dict[str, Any] | None = None,
    job: str = "j1",
    **fields: Any,
) -> Decision:
    request = Request(**{"model": "echo", "inputs": "hello", **fields})
    envelope = wire.task_envelope(INFER, job, wire.request_body(request), header={"reply": "c1"}, origin="test")
    envelope.headers.update(headers or {})
    return decide(Arrival("7.1", b"raw", envelope), rules, WorkingSnapshot(rules.topology, rules.book, fleet), NOW)


def placed(decided: Decision) -> Place:
    assert isinstance(decided, Place), decided
    return decided


def ended(decided: Decision) -> End:
    return present(end_of(decided))


def error_of(decided: Decision) -> errors.TaxiwayError:
    with pytest.raises(errors.TaxiwayError) as caught:
        read_result(read_meta(ended(decided).ending.meta))
    return caught.value


def alike(working: WorkingSnapshot, jobs: list[str], **fields: Any) -> list[Place]:
    """What becomes of arrivals that ask for the same, each counted before the next."""
    admitted = []
    for job in jobs:
        request = Request(**{"model": "echo", "inputs": "hello", **fields})
        raw = wire.infer_message(job, request, reply=f"c-{job}", origin="test")
        admitted.append(placed(decide(arrival(raw), RULES, working, NOW)))
        working.count(admitted[-1].placement, "default")
    return admitted


def test_a_burst_shares_choices_while_they_hold_and_each_promise_counts_the_work_before_it() -> None:
    working = seen(replace(FLEET, rates={flow("cpu.batch", "paced:1"): 3000.0}))
    admitted = alike(working, [f"j{n}" for n in range(300)], model="paced")
    choices = {one.outgoing.fields["basis"] for one in admitted}
    assert 1 < len(choices) <= 300 / 64
    work, promises = admitted[0].placement.work, [one.ticket.promise for one in admitted]
    for n, promise in enumerate(promises):
        assert promise is not None
        due = present(promises[0]).expected + n * work
        assert promise.expected == pytest.approx(due, abs=2 * TOLERANCE, rel=0.01)
        assert promise.at_most >= promise.expected


def test_requests_of_about_the_same_size_are_placed_alike() -> None:
    working = seen(FLEET)
    texts = ("x" * 1000, "x" * 1010, "x" * 4000)
    one, longer, longest = (alike(working, [f"j{n}"], inputs=text)[0] for n, text in enumerate(texts))
    assert one.outgoing.fields is longer.outgoing.fields
    assert one.outgoing.fields is not longest.outgoing.fields
    simulating, asked = seen(SIMULATING), {"model": "ising", "deadline": 600}
    inputs = [simulation(sweeps) for sweeps in (100_000, 100_010, 900_000)]
    needs = [alike(simulating, [f"j{n}"], inputs=each, **asked)[0].placement.needs for n, each in enumerate(inputs)]
    assert needs[0] == needs[1] != needs[2]


def test_the_record_has_where_the_job_is_and_why() -> None:
    outgoing = placed(decision(deadline=5)).outgoing
    record = record_from("j1", outgoing.fields)
    assert record.state is JobState.QUEUED
    assert (record.model, record.hardware_class, record.variant) == ("echo:1", "cpu.batch", "echo")
    assert record.reason and record.reason in outgoing.envelope.headers["kwargsrepr"]
    assert present(read_basis(outgoing.fields["basis"])).needs.deadline == 5


def test_a_job_without_a_deadline_has_none_in_its_ticket() -> None:
    services = {n: msgspec.structs.replace(s, deadline=None) for n, s in RULES.topology.service.items()}
    rules = replace(RULES, topology=msgspec.structs.replace(RULES.topology, service=services))
    request = Request(model="echo", inputs="x")
    body = wire.request_body(request)
    order = Order("j1", request, wire.task_envelope(INFER, "j1", body, header={}, origin="t"), body, accepted=NOW)

    admitted = admit(order, rules, seen(FLEET))
    keep = RULES.topology.limits.keep_record
    assert admitted.outgoing.fields["deadline_at"] == "0.0"
    assert admitted.ticket.deadline_at == NOW + keep
    group = msgspec.msgpack.decode(forward_call([admitted.outgoing], keep=keep).args[-1])
    assert group["deadline"] == NOW + keep  # the time by which it is ended


def at(seconds: float) -> str:
    return datetime.fromtimestamp(NOW + seconds, UTC).isoformat()


def test_celerys_expires_shortens_the_deadline() -> None:
    due = [placed(decision(deadline=own, headers={"expires": at(2)})).ticket.deadline_at for own in (30, 1)]
    assert due == [NOW + 2, NOW + 1]
    assert "30 days" in error_of(decision(headers={"expires": at(31 * 86400)})).message
    decided = decision(headers={"expires": at(-1)})
    assert ended(decided).ending.state is JobState.EXPIRED
    assert isinstance(error_of(decided), errors.DeadlineExceededError)
    assert error_of(decided).message == "deadline exceeded: it passed 1 s before the job was accepted"
    assert "it passed 0 s before" in error_of(decision(headers={"expires": at(0)})).message


def test_a_message_under_a_key_becomes_the_job_that_the_key_and_the_secret_give() -> None:
    terms = Terms(tenant="default", idempotency_key="k1")
    own = job_id(terms, RULES.secret[0])
    stated = decision(idempotency_key="k1", job="other", headers={wire.HEADER: {"reply": "me", "submission": "s"}})
    again = decision(idempotency_key="k1", job=own)
    refused = decision(idempotency_key="k1", job="other")
    for one in (stated, again):
        outgoing = placed(one).outgoing
        assert (outgoing.job, outgoing.envelope.headers["id"]) == (own, own)
    assert read_accepted(present(placed(stated).outgoing.use).same.encode()) == own
    assert error_of(refused).details["field"] == "idempotency_key"


def test_a_body_over_the_limit_is_refused() -> None:
    limits = msgspec.structs.replace(RULES.topology.limits, payload=100)
    rules = replace(RULES, topology=msgspec.structs.replace(RULES.topology, limits=limits))
    error = error_of(decision(rules=rules, inputs="x" * 200))
    assert isinstance(error, errors.RequestTooLargeError)
    assert error.details["limit"] == "payload"


def decided_of(task: str, body: bytes, job: str = "j1") -> Decision:
    """What becomes of a message of this task with this body."""
    message = wire.task_envelope(task, job, body, header={}, origin="t")
    return decide(Arrival("1", b"raw", message), RULES, seen(FLEET), NOW)


def test_a_cancellation_names_its_job_and_what_is_no_request_is_a_dead_letter() -> None:
    assert decide(arrival(wire.cancel_message("j9", origin="t")), RULES, seen(FLEET), NOW) == Cancel("j9")
    assert isinstance(error_of(decided_of(CANCEL, b"[[],{},{}]")), errors.InvalidRequestError)
    assert decide(Arrival("1", b"\x00", None, "no message"), RULES, seen(FLEET), NOW) == GiveUp("no message")
    other = decided_of("tasks.add", b"[[],{},{}]")
    assert isinstance(other, GiveUp) and "tasks.add" in other.reason
    assert error_of(other).details["field"] == "task"


@pytest.mark.parametrize(("length", "answered"), [(256, False), (257, True), (4096, True), (4097, False)])
def test_the_producer_of_an_id_that_is_too_long_is_notified_under_that_id(length: int, answered: bool) -> None:
    job = "x" * length
    decided = decided_of(INFER, wire.request_body(Request(model="echo", inputs="hello")), job)
    assert isinstance(decided, End if answered else GiveUp if length > 4096 else Place)
    if answered:
        assert f"id: expected a task_id of at most 256 characters, got {length}" in error_of(decided).message
        assert ended(decided).ending.job == job


def test_the_waiter_of_a_message_that_a_router_fails_to_decide_is_notified() -> None:
    message = wire.infer_message("j1", Request(model="echo", inputs="hello"), reply="c1", origin="test")
    decided = undecidable(arrival(message), KeyError("a fault of ours"))
    assert "a fault of ours" in decided.reason
    ending = ended(decided).ending
    assert (ending.job, ending.state, ending.reply) == ("j1", JobState.DEAD, "c1")
    assert undecidable(Arrival("7.1", b"{", None, "no message"), KeyError()).end is None


@given(
    headers=st.dictionaries(st.sampled_from(["task", "id", "expires", wire.HEADER]), json_values),
    body=st.binary(max_size=60) | json_values.map(lambda v: msgspec.json.encode([[], v, {}])),
    known=st.booleans(),
)
def test_nothing_that_a_producer_writes_makes_deciding_fail(headers: dict[str, Any], body: bytes, known: bool) -> None:
    if known:
        headers = {**headers, "task": INFER, "id": "j1"}
    envelope = wire.Envelope(
        body=base64.b64encode(body).decode(), headers=headers, properties={"body_encoding": "base64"}
    )
    decided = decide(Arrival("1", b"raw", envelope), RULES, seen(FLEET), NOW)
    assert isinstance(decided, Decision)


@pytest.mark.cases("model, inputs, rows")
def test_rows_are_counted_without_reading_values(model: str, inputs: Any, rows: int) -> None:
    assert rows_of(RULES.catalogue.resolve(model), inputs) == rows


def simulation(sweeps: object) -> dict[str, object]:
    others = {"seed": 1, "size": 16, "temperature": 2.0}
    rows = len(sweeps) if isinstance(sweeps, list) else 0
    return {"sweeps": sweeps} | {name: [value] * rows if rows else value for name, value in others.items()}


def simulated(sweeps: object, **terms: Any) -> Decision:
    """What becomes of a simulation of so many sweeps."""
    return decision(SIMULATING, model="ising", inputs=simulation(sweeps), **terms)


@pytest.mark.parametrize("sweeps", [10_000_001, 10**300])
def test_a_row_over_its_models_limit_is_refused_from_the_arrivals_too(sweeps: int) -> None:
    error = error_of(simulated(sweeps))
    assert isinstance(error, (errors.RequestTooLargeError, errors.InvalidRequestError))
    assert len(error.message) < 200


def generation(lengths: dict[int, float], **parameters: object) -> int:
    """The size of a prompt of forty characters, answers before it having been as `lengths` say."""
    request = Request(model="generate", inputs="x" * 40, parameters=parameters)
    model = RULES.catalogue.resolve("generate")
    return sizes_of(model, facts_of(model, request), lengths)[0]


def test_a_generation_is_as_large_as_its_prompt_and_the_answer_that_earlier_ones_let_expect() -> None:
    chat = generation({}, max_tokens=0)
    assert generation({}, max_tokens=64) == chat + 32
    assert generation({bin_of(16): 100.0}, max_tokens=64) == chat + 16
    assert generation({bin_of(512): 100.0}, max_tokens=64) == chat + 64


def ruled(tenants: Tenants | None = None, **rules: Any) -> tuple[Decision, WorkingSnapshot]:
    """What becomes of a request of the tenant `lab` under these rules."""
    topology = msgspec.structs.replace(RULES.topology, tenants={"lab": Tenant(**rules)})
    raw = wire.infer_message("j1", Request(model="echo", inputs="hello", tenant="lab"), reply="c1", origin="test")
    working = WorkingSnapshot(topology, RULES.book, FLEET, tenants=tenants)
    return decide(arrival(raw), replace(RULES, topology=topology), working, NOW), working


def test_what_a_tenants_request_costs_is_recorded_and_counted_where_it_has_a_budget() -> None:
    decided, working = ruled(Tenants({}, day_of(NOW), {"lab": 0.5}), usd_per_day=1.0)
    admitted = placed(decided)
    placement, fields = admitted.placement, admitted.outgoing.fields
    working.count(placement, "lab")
    assert fields["spent"] == spent_key("2023-11-14")
    assert float(fields["cost"]) == placement.cost > 0
    again, _ = ruled(working.tenants, usd_per_day=1.0)
    assert present(placed(again).placement.needs.allowance).left == 0.5 - placement.cost
    assert not {"spent", "cost"} & set(placed(decision()).outgoing.fields)


ECHO = b'[[], {"model": "echo", "inputs": %b}, {}]'


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (msgspec.json.encode(nested(520, "a")), "inputs: expected at most 64 levels"),
        (b"[" * 200_000 + b"]" * 200_000, "body: expected "),
        (b'"\\ud800"', "needs its pair"),
        (b"9" * 5000, "body: expected "),
        (b"[" + b"[]," * 200_001 + b"[]]", "at most 500000 values in JSON"),
        (b"[" + b"0," * 1_000_001 + b"0]", "at most 500000 values in JSON"),
    ],
    ids=["levels", "depth", "surrogate", "digits", "lists", "numbers"],
)
def test_a_body_that_a_part_of_the_fleet_cannot_take_is_refused(inputs: bytes, expected: str) -> None:
    decided = decided_of(INFER, ECHO % inputs)
    assert isinstance(error_of(decided), errors.InvalidRequestError | errors.RequestTooLargeError)
    assert expected in error_of(decided).message
    assert isinstance(decided, End)


@pytest.mark.cases(
    "headers, expected",
    [
        ({"argsrepr": "x" * 70_000}, "headers: expected at most 65536 bytes, got 70"),
        ({"other": {1, 2}.__iter__()}, "headers: expected values that JSON can hold"),
    ],
)
def test_headers_that_celery_could_not_read_end_their_job_as_refused(headers: dict[str, Any], expected: str) -> None:
    error = error_of(decision(headers=headers))
    assert isinstance(error, errors.InvalidRequestError | errors.RequestTooLargeError)
    assert expected in error.message


@pytest.mark.parametrize(
    ("encoding", "fine"), [("utf-8", True), ("US-ASCII", True), ("binary", True), ("klingon", False), ("\0", False)]
)
def test_an_encoding_that_is_not_utf_8_is_refused(encoding: str, fine: bool) -> None:
    envelope = wire.decode_envelope(
        wire.infer_message("j1", Request(model="echo", inputs="hello"), reply="c1", origin="test")
    )
    raw = msgspec.json.encode(msgspec.structs.replace(envelope, content_encoding=encoding))
    decided = decide(arrival(raw), RULES, seen(FLEET), NOW)
    assert isinstance(decided, Place) == fine
    assert fine or "content-encoding: expected utf-8" in error_of(decided).message


@pytest.mark.cases(
    "embed, expected",
    [({"callbacks": [{"task": "t", "kwargs": {"a": nested(100)}}]}, "embed: expected at most 64 levels")],
)
def test_what_follows_from_a_task_and_cannot_be_sent_ends_its_job_as_refused(embed: object, expected: str) -> None:
    error = error_of(decided_of(INFER, msgspec.json.encode([[], {"model": "echo", "inputs": "hello"}, embed])))
    assert isinstance(error, errors.InvalidRequestError)
    assert expected in error.message


ODD_IDS = {"chain": [{"task": "t", "options": {"task_id": "x" * 257}}, {"task": "t", "options": {"task_id": 5}}]}


@pytest.mark.cases("embed, ids", [(ODD_IDS, [])])
def test_what_was_to_follow_a_refused_request_ends_with_its_error(embed: object, ids: list[str]) -> None:
    decided = decided_of(INFER, msgspec.json.encode([[], {"model": "ehco", "inputs": "hello"}, embed]))
    assert [one.job for one in ended(decided).after.endings] == ids
    for one in ended(decided).after.endings:
        with pytest.raises(errors.UnknownModelError):
            read_result(read_meta(one.meta))


def calls_of(*errbacks: object) -> list[tuple[str, list[Any]]]:
    """The queue and the positional arguments of each call of a refused request's error links."""
    decided = decided_of(INFER, msgspec.json.encode([[], {"model": "ehco", "inputs": "x"}, {"errbacks": errbacks}]))
    return [(queue, msgspec.json.decode(call.payload())[0]) for queue, call in ended(decided).after.calls]


def test_the_error_links_of_a_refused_request_are_called_with_its_id() -> None:
    link = {"task": "lab.failed", "args": ["more"], "kwargs": {}, "options": {"queue": "lab"}, "immutable": False}
    assert calls_of(link) == [("lab", ["j1", "more"])]
    assert calls_of(link | {"immutable": True}, link | {"options": {}}) == [
        ("lab", ["more"]),
        ("celery", ["j1", "more"]),
    ]


@pytest.mark.cases("link")
def test_an_error_link_to_a_queue_of_the_fleets_own_or_of_no_form_is_not_called(link: dict[str, Any]) -> None:
    assert calls_of(link) == []


@pytest.mark.parametrize("terms", [{"deadline": 5}, {}])
def test_a_job_that_is_to_begin_after_its_deadline_is_refused(terms: dict[str, Any]) -> None:
    assert isinstance(decision(headers={"eta": at(3)}, **terms), Place)
    error = error_of(decision(headers={"eta": at(60)}, **terms))
    assert isinstance(error, errors.InvalidRequestError)
    assert "eta: expected a time before the job's deadline, got one 55 s after it" in error.message
