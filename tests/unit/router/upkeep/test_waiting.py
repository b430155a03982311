from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from broker.port import Peeked
from router.upkeep.waiting import rest_of_move
from tasks.ticket import read_ticket
from taxiway.contract.job import JobState, MoveRecord
from taxiway.contract.wire import HEADER
from tests.narrowing import present
from tests.unit.router.service.test_admission import RULES, decision

PLACED = present(decision(deadline=600).admitted)
HERE = PLACED.outgoing.queue
PEEKED = Peeked(HERE, 1, "handle", PLACED.outgoing.envelope)


def moved(source: str, target: str) -> dict[str, str]:
    """The record of a job that was last moved so."""
    move = MoveRecord(at=1.0, source=source, target=target, kind="balance", reason="balance: earlier there")
    moves = msgspec.json.encode([move]).decode()
    return {**PLACED.outgoing.fields, "hardware_class": target, "variant": "echo", "moves": moves}


def test_a_move_of_which_only_the_record_was_written_is_ended() -> None:
    step = rest_of_move(PEEKED, moved(HERE, "tpu.bulk"), RULES)

    assert step is not None
    assert (step.queue, step.fields) == ("tpu.bulk", {})
    ticket = read_ticket(step.envelope.headers[HEADER], step.envelope.payload(), RULES.secret)
    assert (ticket.variants["tpu.bulk"], ticket.reason) == ("echo", "balance: earlier there")


@pytest.mark.parametrize(
    "fields",
    [
        PLACED.outgoing.fields,
        moved("tpu.bulk", HERE),
        moved("elsewhere", "tpu.bulk"),
        moved(HERE, "no.such.class"),
        {**moved(HERE, "tpu.bulk"), "state": JobState.RUNNING},
        {**moved(HERE, "tpu.bulk"), "moves": "not JSON"},
        {},
    ],
)
def test_a_message_whose_record_says_otherwise_stays_where_it_is(fields: dict[str, str]) -> None:
    assert rest_of_move(PEEKED, fields, RULES) is None


def test_a_message_that_no_router_ordered_stays_where_it_is() -> None:
    forged = msgspec.structs.replace(PEEKED.envelope, headers={**PEEKED.envelope.headers, HEADER: "forged"})

    assert rest_of_move(replace(PEEKED, envelope=forged), moved(HERE, "tpu.bulk"), RULES) is None
