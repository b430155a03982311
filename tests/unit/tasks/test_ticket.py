import uuid
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ticket import Ticket, TicketError, job_id, read_ticket, sign
from taxiway.contract.request import Terms
from taxiway.contract.wire import key_id
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
