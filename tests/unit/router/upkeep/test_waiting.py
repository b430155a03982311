from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from broker.port import Peeked
from router.decide.snapshot import FleetSnapshot
from router.decide.waiting import abandoned
from router.upkeep.waiting import Waiting, moves_of_abandoned, rest_of_move
from tasks.ticket import read_ticket
from taxiway.contract.job import JobState, MoveRecord
from taxiway.contract.wire import HEADER
from tests.unit.router.service.test_admission import FLEET, RULES, decision, device, placed, seen

PLACED = placed(decision(deadline=600))
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


def test_a_class_is_abandoned_if_queues_yaml_lacks_it_and_no_device_serves_what_waits_there() -> None:
    work = {"gone": (0.0, 1.0, 0.0, 0.0), "empty": (0.0,) * 4, "served": (1.0,) * 4, HERE: (1.0,) * 4}
    devices = (*FLEET.devices, device("served"))

    assert abandoned(seen(FleetSnapshot(devices=devices, work=work))) == ["gone"]


def waiting(count: int) -> list[Waiting]:
    """Jobs that wait for a class that is gone, as `QueueMover.peek` gives them: those served last first."""
    placement = PLACED.placement
    order = [msgspec.structs.replace(PEEKED.envelope, headers={"id": str(job)}) for job in reversed(range(count))]
    peeked = [Peeked("gone", 1, "handle", envelope) for envelope in order]
    return [Waiting(one, placement.table.model, placement.needs, "echo", 1.0, ()) for one in peeked]


def test_what_waits_for_an_abandoned_class_moves_in_order_to_where_it_would_be_placed_now() -> None:
    working = seen(FLEET)
    moves = moves_of_abandoned(waiting(40), working)

    assert [job for move in moves for job in move.jobs] == [str(job) for job in range(40)]
    assert {(move.source, move.target, move.variant) for move in moves} == {("gone", HERE, "echo")}
    assert moves[0].reason.startswith("rescue: gone is not in queues.yaml; ")
    assert sum(working.backlog.levels(HERE)) == pytest.approx(sum(len(move.jobs) * move.work for move in moves))


def test_nothing_moves_from_an_abandoned_class_to_full_queues_or_without_a_device() -> None:
    full = dict.fromkeys(RULES.topology.hardware, (1e4,) * 4)

    assert moves_of_abandoned(waiting(4), seen(replace(FLEET, work=full))) == []
    assert moves_of_abandoned(waiting(4), seen(FleetSnapshot())) == []
