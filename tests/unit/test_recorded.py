"""What earlier releases wrote is understood, and so is what the next one adds to it, where that is safe."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tests.recorded
from broker.port import Arrival, DeadLetter
from router.decide.basis import read_basis
from router.decide.facts import FleetFacts, snapshot_from
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import Rules
from router.service.decision import Cancel
from tasks.models.folder import load_catalogue
from tasks.settings import TREE
from tasks.ticket import read_ticket
from tasks.topology import load_topology
from taxiway.contract.job import JobState, read_answer, read_meta, read_result, record_from
from taxiway.contract.stream import Piece, read_piece
from taxiway.contract.wire import HEADER, decode_envelope, read_request
from taxiway.errors import UnknownModelError
from tests.narrowing import present
from tests.recorded.__main__ import INPUTS, SECRET
from tests.unit.router.service.deciding import decide

KEYS = (bytes.fromhex(SECRET),)
RELEASES = sorted(Path(tests.recorded.__file__).parent.glob("*.json"))
JSON = ("cancellation", "arrival", "order", "failure", "letter", "result", "facts")


def newer(text: str | bytes) -> str:
    """The JSON text with a field that no release knows in each of its objects but those that are an answer's values."""

    def added(value: Any, name: str = "") -> Any:
        if isinstance(value, list):
            return [added(one) for one in value]
        if not isinstance(value, dict) or name in ("outputs", "details", "latency", "outcomes", "pace", "residual"):
            return value
        named = name in ("done", "unavailable")  # by what is counted or missing there
        below = {key: added(one, key) for key, one in value.items()}
        return below if named else {**below, "of_the_future": {"more": 1}}

    return json.dumps(added(json.loads(text)))


@pytest.fixture(
    params=[(path, later) for path in RELEASES for later in (False, True)], ids=lambda p: f"{p[0].stem}{'+' * p[1]}"
)
def recorded(request: pytest.FixtureRequest) -> Any:
    """What a release wrote; with a plus as one that adds fields would."""
    path, later = request.param
    texts = json.loads(path.read_bytes())
    return texts if not later else {**texts, **{name: newer(texts[name]) for name in JSON}}


def test_the_present_release_is_among_the_recorded() -> None:
    assert (Path(tests.recorded.__file__).parent / "0.1.0.json") in RELEASES


def test_an_arrival_is_the_request_that_it_was(recorded: Any) -> None:
    envelope = decode_envelope(recorded["arrival"])
    request = read_request(envelope.payload(), envelope.content_type)
    assert (request.model, request.inputs, request.deadline) == ("echo", INPUTS, 600)
    assert (request.tenant, request.priority) == ("lab", "high")


def test_a_cancellation_names_its_job(recorded: Any) -> None:
    rules = Rules(load_topology(TREE / "queues.yaml"), load_catalogue(TREE / "models"), KEYS)
    raw = recorded["cancellation"].encode()
    working = WorkingSnapshot(rules.topology, rules.book, FleetSnapshot())
    assert decide(Arrival("", raw, decode_envelope(raw)), rules, working, 0.0) == Cancel("unknown")


def test_a_workers_order_is_signed_for_the_body_that_it_came_with(recorded: Any) -> None:
    envelope = decode_envelope(recorded["order"])
    ticket = read_ticket(envelope.headers[HEADER], envelope.payload(), KEYS)
    assert (ticket.model, ticket.variants["cpu.batch"]) == ("echo:1", "echo")
    assert ticket.deadline_at == pytest.approx(ticket.accepted + 600)


def test_a_record_describes_its_job(recorded: Any) -> None:
    later = {"of_the_future": "1"}
    record = record_from("j", {**recorded["record"], **later})
    ended = record_from("j", {**recorded["ended"], **later})
    assert (record.state, record.tenant, record.hardware_class) == (JobState.QUEUED, "lab", "cpu.batch")
    assert (ended.state, ended.attempts, ended.device) == (JobState.SUCCEEDED, 1, "cpu:0")
    assert record.accepted <= ended.started <= ended.finished
    assert present(read_basis(recorded["record"]["basis"])).needs.deadline == 600


def test_results_and_errors_are_what_they_were(recorded: Any) -> None:
    answer = read_answer(recorded["result"].encode())
    assert (answer.model, answer.outputs) == ("echo:1", {"payload": INPUTS})
    assert (answer.report.hardware_class, answer.report.batch) == ("cpu.batch", 1)
    with pytest.raises(UnknownModelError, match="nobody-has-it"):
        read_result(read_meta(recorded["failure"]))


def test_a_devices_facts_make_it_known(recorded: Any) -> None:
    facts = {"w": recorded["facts"].encode()}
    (device,) = snapshot_from(FleetFacts(now=0.0, devices=facts, heartbeats={"w": 0.0}, work={})).devices
    assert (device.hardware_class, device.device, device.draining) == ("cpu.batch", "cpu:0", False)
    assert "echo:1/echo" in device.warm
    assert device.done["cpu.batch"].outcomes["succeeded"] == 1


def test_a_dead_letter_has_its_message(recorded: Any) -> None:
    letter = msgspec.json.decode(recorded["letter"], type=DeadLetter)
    assert letter.message == b"this is no message"
    assert "expected a Celery message" in letter.reason


def test_a_piece_of_an_answer_is_in_its_place(recorded: Any) -> None:
    fields = {name.encode(): value.encode() for name, value in recorded["piece"].items()}
    assert read_piece({**fields, b"of_the_future": b"1"}) == Piece(1, 4, "two ")
