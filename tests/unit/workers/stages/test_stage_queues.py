from taxiway.contract.stream import Piece
from tests.unit.workers.parts import a_delivery
from tests.waiting import in_thread
from workers.stages.job import Dropped
from workers.stages.queues import MAX_UNWRITTEN, AdmitQueue, EndingQueue, PieceQueue


def endings(number: int) -> list[Dropped]:
    return [Dropped(a_delivery())] * number


def test_what_was_put_is_taken_together_and_in_order_also_with_the_end() -> None:
    queue, some = EndingQueue(), [endings(1), endings(2), endings(1)]
    queue.put(some[0])
    queue.put(some[1])
    assert queue.take() == ([*some[0], *some[1]], False)
    queue.wake()
    assert queue.take() == ([], False)
    queue.put(some[2])
    queue.close()
    assert queue.take() == (some[2], True)


def test_an_ending_queue_stays_long_until_enough_is_written_not_only_taken() -> None:
    queue = EndingQueue()
    queue.put(endings(MAX_UNWRITTEN))
    queue.take()
    assert not queue.wait_until_short(0.0)
    queue.wrote(1)
    assert queue.wait_until_short(0.0)


def test_a_write_wakes_the_waiter_for_a_short_queue() -> None:
    queue, received = EndingQueue(), []
    queue.put(endings(MAX_UNWRITTEN))
    with in_thread(lambda: received.append(queue.wait_until_short(20.0))):
        queue.wrote(MAX_UNWRITTEN)
    assert received == [True]


def test_deliveries_are_taken_when_they_are_due_and_the_rest_is_left_in_order() -> None:
    queue, now, late, latest = AdmitQueue(), a_delivery(), a_delivery(), a_delivery()
    queue.put(latest, pause=3600.0)
    queue.put(late, pause=60.0)
    queue.put(now)
    assert queue.take() == [now]
    queue.close()
    assert queue.take() == []
    assert queue.rest() == [late, latest]


def test_pieces_that_follow_each_other_are_joined_and_what_is_beside_a_text_stays_in_its_place() -> None:
    thinks, calls = {"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}
    queue = PieceQueue()
    queue.put(
        [("j", Piece(1, 0, beside=[thinks])), ("j", Piece(1, 0, "one ", sent=1)), ("j", Piece(1, 4, "two", sent=1))]
    )
    queue.put([("j", Piece(1, 7, sent=1, beside=[calls])), ("j", Piece(2, 0, "again")), ("other", Piece(1, 0, "x"))])
    queue.put([("j", Piece(2, 0, "uno", row=1)), ("j", Piece(2, 5, " three"))])
    assert queue.take() == [
        ("j", Piece(1, 0, beside=[thinks])),
        ("j", Piece(1, 0, "one two", sent=1, beside=(calls,))),
        ("j", Piece(2, 0, "again three")),
        ("other", Piece(1, 0, "x")),
        ("j", Piece(2, 0, "uno", row=1)),
    ]


def test_pieces_that_were_not_written_come_before_those_that_came_since_and_before_the_end() -> None:
    queue = PieceQueue()
    queue.put([("j", Piece(1, 4, "two"))])
    queue.put_back([("j", Piece(1, 0, "one "))], pause=0.0)
    queue.close()
    assert [queue.take(), queue.take()] == [[("j", Piece(1, 0, "one two"))], []]
