from __future__ import annotations

import threading

from tasks.ticket import Ticket
from taxiway.contract.keys import INFER
from workers.stages.backlog import MOST, Backlog
from workers.stages.job import Delivery, Dropped


def endings(number: int) -> list[Dropped]:
    ticket = Ticket(
        job="j", task=INFER, model="m:1", variants={}, prices={}, accepted=0.0, deadline_at=0.0, level=1, reason=""
    )
    return [Dropped(Delivery("j", ticket, b"", "application/json", 0.0, hardware_class="c"))] * number


def test_what_was_put_is_taken_together_and_in_order() -> None:
    backlog, [first], [second, third] = Backlog(), endings(1), endings(2)
    backlog.put([first])
    backlog.put([second, third])
    assert backlog.take() == ([first, second, third], False)


def test_nothing_put_is_news_for_the_finisher() -> None:
    backlog = Backlog()
    backlog.put([])
    assert backlog.take() == ([], False)


def test_what_was_put_before_the_end_is_taken_with_it() -> None:
    backlog, [one] = Backlog(), endings(1)
    backlog.put([one])
    backlog.close()
    assert backlog.take() == ([one], True)


def test_a_backlog_stays_long_until_enough_is_written_not_only_taken() -> None:
    backlog = Backlog()
    backlog.put(endings(MOST))
    backlog.take()
    assert not backlog.wait_until_short(0.0)
    backlog.wrote(1)
    assert backlog.wait_until_short(0.0)


def test_who_waits_for_a_short_backlog_hears_of_the_write() -> None:
    backlog, heard = Backlog(), []
    backlog.put(endings(MOST))
    waiting = threading.Thread(target=lambda: heard.append(backlog.wait_until_short(20.0)))
    waiting.start()
    backlog.wrote(MOST)
    waiting.join(20.0)
    assert heard == [True]
