"""What waits in Valkey, and which versions of it need their file rewritten."""

from dataclasses import replace

import msgspec
import pytest

from broker.port import Peeked
from router.decide.moves.waiting import abandoned, backlogged
from router.decide.snapshot import FleetSnapshot
from router.service.append_only_file import leaves_holes
from router.upkeep.waiting import WaitingJob, moves_of_abandoned
from tests.unit.router.service.test_admission import FLEET, RULES, decision, device, placed, seen

PLACED = placed(decision(deadline=600))
HERE = PLACED.outgoing.queue
PEEKED = Peeked(HERE, 1, b"raw", PLACED.outgoing.envelope)


def test_a_class_is_abandoned_if_queues_yaml_lacks_it_and_no_device_serves_what_waits_there() -> None:
    work = {"gone": (0.0, 1.0, 0.0, 0.0), "empty": (0.0,) * 4, "served": (1.0,) * 4, HERE: (1.0,) * 4}
    devices = (*FLEET.devices, device("served"))
    assert abandoned(seen(FleetSnapshot(devices=devices, work=work))) == ["gone"]


def test_a_site_that_drains_hands_on_also_what_should_be_done_by_now() -> None:
    work, devices = {HERE: (0.0, 0.0, 0.002, 0.0)}, (*FLEET.devices, device("gpu.realtime"))
    stays, drains = (seen(FleetSnapshot(devices=devices, work=work, draining=drains)) for drains in (False, True))
    for working in (stays, drains):
        working.advance(1.0)  # a long job may be before it all the same
    assert (backlogged(stays, 1.0), backlogged(drains, 1.0)) == ([], [HERE])


def waiting(count: int) -> list[WaitingJob]:
    """Jobs that wait for a class that is gone, as `peek` gives them: those served last first."""
    placement = PLACED.placement
    order = [msgspec.structs.replace(PEEKED.envelope, headers={"id": str(job)}) for job in reversed(range(count))]
    peeked = [Peeked("gone", 1, b"raw", envelope) for envelope in order]
    return [WaitingJob.of(one, placement.table.model, placement.needs, "echo", 1.0, ()) for one in peeked]


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


@pytest.mark.cases("said, holes")
def test_only_versions_with_holes_in_their_file_need_a_rewrite(said: dict[str, str], holes: bool) -> None:
    assert leaves_holes(said) is holes
