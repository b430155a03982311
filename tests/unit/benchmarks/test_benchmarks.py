import asyncio
import time

import pytest

from benchmarks.harness.measure import percentile
from benchmarks.suite.load import Request, UnreliableError, Window, arriving, saturated
from benchmarks.suite.ratios import RATIOS, Ratio
from benchmarks.suite.workloads import WORKLOADS


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
