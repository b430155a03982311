import asyncio
import time
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.harness.bars import Bar, Panel, page
from benchmarks.harness.measure import percentile
from benchmarks.suite.__main__ import Results, absence
from benchmarks.suite.installing import AbsentError
from benchmarks.suite.load import Request, UnreliableError, Window, arriving, saturated
from benchmarks.suite.panels import panels_of
from benchmarks.suite.ratios import RATIOS, Ratio
from benchmarks.suite.workloads import WORKLOADS, Plan


def test_a_window_counts_a_request_by_the_share_of_it_that_lies_inside() -> None:
    requests = [Request(0, 2, 10), Request(1, 3, 4), Request(5, 6, 100)]
    assert Window(1, 3).items(requests) == 9


def test_a_saturated_loop_measures_what_the_server_served_in_its_window() -> None:
    device, marks, served = asyncio.Semaphore(2), [], []

    async def ask(number: int) -> float:
        async with device:
            await asyncio.sleep(0.01)
        served.append(time.perf_counter())
        return 1.0

    requests, window = asyncio.run(
        saturated(ask, outstanding=8, seconds=0.5, mark=lambda: marks.append(time.perf_counter()))
    )
    inside = sum(window.opens < at <= window.closes for at in served)
    assert window.items(requests) == pytest.approx(inside, abs=8)  # those under way at either end
    assert len(marks) == 2 and marks[1] - marks[0] >= 0.5


def test_arrivals_do_not_wait_for_answers_and_count_from_when_they_were_due() -> None:
    async def ask(number: int) -> float:
        if number == 0:
            time.sleep(0.2)  # a client that hangs: those due meanwhile have waited
        return 1.0

    requests = asyncio.run(arriving(ask, rate=200, seconds=0.3, seed=7))
    assert len(requests) > 30
    assert percentile([request.seconds for request in requests], 50) > 0.02


def test_a_loop_whose_requests_fail_gives_no_figures() -> None:
    async def ask(number: int) -> float:
        raise OSError("refused")

    with pytest.raises(UnreliableError, match="requests failed, the first with OSError: refused"):
        asyncio.run(arriving(ask, rate=200, seconds=0.1, seed=7))


def test_a_ratio_is_of_the_best_of_the_others_in_the_same_round() -> None:
    figures = {("a", "rate"): [30.0, 20.0], ("b", "rate"): [10.0, 1.0], ("c", "rate"): [2.0, 5.0]}
    ratio = Ratio("a", "rate", 3.5, against=("b", "c", "absent"))
    assert ratio.rounds(figures) == [3.0, 4.0]
    assert ratio.holds([3.0, 4.0])
    assert Ratio("a", "rate", 1.0, against=("absent",)).rounds(figures) == []
    assert RATIOS.keys() == WORKLOADS.keys()


@pytest.mark.parametrize("limit", [(200.0, "the limit"), None])
def test_the_chart_is_one_page_that_asks_for_nothing(limit: Any) -> None:
    drawn = page("A & B", "2 cores", [Panel("rate", "items/s", [Bar("<x>", [1.0, 3.0], own=True)], limit=limit)])
    svg = drawn[drawn.index("<svg") : drawn.index("</svg>") + 6]
    assert ElementTree.fromstring(svg) is not None
    assert "http" not in drawn and "&lt;x&gt;" in drawn


def test_the_fastest_contestant_comes_first_and_the_limit_is_a_mark() -> None:
    figures = {("limit", "saturated"): [100.0], ("slow", "saturated"): [10.0], ("taxiway", "saturated"): [90.0]}
    (panel,) = panels_of(WORKLOADS["W1"], figures)
    assert [bar.name for bar in panel.bars] == ["taxiway", "slow"]
    assert panel.limit == (100.0, "the limit, in process")


def test_the_suite_names_each_absent_contestant_with_its_reason_and_none_if_all_ran() -> None:
    ran, failed = (Results(Plan(WORKLOADS["W1"], {}, photos=[], workers=1, port=7)) for _ in range(2))
    ran.add("mosec", "saturated", "items/s", 100.0)
    failed.leave_out("ray", AbsentError("no such package"))
    assert absence([ran]) == ""
    assert "ray: no such package" in absence([ran, failed]) and "mosec" not in absence([ran, failed])
