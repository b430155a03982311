from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ticket import Ticket, TicketError, read_ticket, sign
from tests.unit.strategies import json_values

KEY, BODY = b"k" * 32, b"[[], {}, {}]"
TICKET = sign(
    Ticket(
        job="job-1",
        task="taxiway.infer",
        model="sentiment:1",
        variants={"cpu.batch": "onnx-int8"},
        prices={"cpu.batch": 0.05},
        accepted=1000.5,
        deadline_at=1005.5,
        level=1,
        reason="cheapest",
        reply="client-1",
    ),
    BODY,
    KEY,
)
HEADER: dict[str, Any] = msgspec.to_builtins(TICKET)


def test_a_signed_ticket_is_read_as_it_was_written() -> None:
    assert read_ticket(HEADER, BODY, KEY) == TICKET


def test_a_ticket_survives_json() -> None:
    assert read_ticket(msgspec.json.decode(msgspec.json.encode(HEADER)), BODY, KEY) == TICKET


def test_a_ticket_in_json_text_is_read_as_it_was_written() -> None:
    assert read_ticket(msgspec.json.encode(HEADER).decode(), BODY, KEY) == TICKET


def test_text_that_is_no_ticket_is_refused() -> None:
    with pytest.raises(TicketError):
        read_ticket("reply", BODY, KEY)


@given(field=st.sampled_from(sorted(HEADER)), value=json_values)
def test_a_changed_field_is_refused(field: str, value: Any) -> None:
    changed = HEADER | {field: value}
    if msgspec.json.encode(changed) != msgspec.json.encode(HEADER):
        with pytest.raises(TicketError):
            read_ticket(changed, BODY, KEY)


@pytest.mark.parametrize("field", sorted(HEADER))
def test_a_missing_field_is_refused(field: str) -> None:
    with pytest.raises(TicketError):
        read_ticket({name: value for name, value in HEADER.items() if name != field}, BODY, KEY)


@given(body=st.binary().filter(lambda body: body != BODY))
def test_another_body_is_refused(body: bytes) -> None:
    with pytest.raises(TicketError, match="the body that the ticket was signed for"):
        read_ticket(HEADER, body, KEY)


@given(key=st.binary(min_size=16).filter(lambda key: key.rstrip(b"\0") != KEY))
def test_another_key_is_refused(key: bytes) -> None:
    with pytest.raises(TicketError, match="signed by a router of this fleet"):
        read_ticket(HEADER, BODY, key)


@given(header=st.none() | json_values)
def test_a_header_that_is_no_ticket_is_refused(header: Any) -> None:
    with pytest.raises(TicketError):
        read_ticket(header, BODY, KEY)


@pytest.mark.parametrize(
    "changes",
    [{"signature": "é"}, {"signature": "\ud800"}, {"job": "\ud800"}, {"level": 2**200}, {"accepted": float("nan")}],
)
def test_a_field_that_cannot_be_signed_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TicketError):
        read_ticket(HEADER | changes, BODY, KEY)


def test_an_additional_field_is_refused() -> None:
    with pytest.raises(TicketError):
        read_ticket(HEADER | {"admin": True}, BODY, KEY)
