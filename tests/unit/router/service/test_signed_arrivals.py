"""Where producers sign, a router believes what one of them wrote lately, and parks all else."""

import base64
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.port import Arrival
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import Rules
from router.service.decision import Cancel, Decision, End, GiveUp
from tasks.models.folder import load_catalogue
from tasks.settings import TREE
from tasks.topology import load_topology
from taxiway.contract.request import Request
from taxiway.contract.wire import HEADER, cancel_message, check_signed, decode_envelope, infer_message
from taxiway.errors import InvalidRequestError
from tests.unit.router.service.deciding import decide
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
