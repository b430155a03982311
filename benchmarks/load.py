"""Load on one contestant: requests one after the other, a constant number outstanding, or arrivals that do not wait.

Every loop gives the requests that it made; rates and latencies are read off these.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

Ask = Callable[[int], Awaitable[float]]
"""Makes the request of that number, and gives the items in its answer: 1, or tokens."""

MOST_FAILURES = 0.01
"""Share of requests that may fail in a loop before its figures say nothing."""


class UnreliableError(Exception):
    """Too many requests failed; the text has the first failure."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One answered request: when it was due and when its answer was there, by `time.perf_counter`, and its items.

    Python's collector does not look at it: of 100,000 it would look for 0.1 s at a time, in the midst of a loop.
    """

    began: float
    ended: float
    items: float

    @property
    def seconds(self) -> float:
        """How long its caller waited."""
        return self.ended - self.began


@dataclass(slots=True)
class Window:
    """Between which instants a saturated loop counts."""

    opens: float
    closes: float

    def items(self, requests: Sequence[Request]) -> float:
        """The items served between them.

        A request counts by the share of its time that lies inside, so that a window needs no whole number of batches.
        """
        inside = ((max(self.opens, r.began), min(self.closes, r.ended), r) for r in requests)
        return sum(r.items * (end - begin) / r.seconds for begin, end, r in inside if end > begin)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.closes - self.opens


class Recorder:
    """Asks, and keeps what was answered."""

    def __init__(self, ask: Ask) -> None:
        self.requests: list[Request] = []
        self._ask = ask
        self._failures: list[Exception] = []

    async def request(self, number: int, began: float) -> None:
        """Ask; a failure is counted, not raised."""
        try:
            items = await self._ask(number)
        except (OSError, ValueError, RuntimeError) as error:
            self._failures.append(error)
            await asyncio.sleep(0.01)  # a refused connection answers at once: do not spin
        else:
            self.requests.append(Request(began, time.perf_counter(), items))

    def checked(self) -> list[Request]:
        """The requests.

        Raises:
            UnreliableError: more than `MOST_FAILURES` of them failed.
        """
        failed = len(self._failures)
        if failed > MOST_FAILURES * (failed + len(self.requests)):
            first = f"{type(self._failures[0]).__name__}: {self._failures[0]}"
            raise UnreliableError(f"{failed} of {failed + len(self.requests)} requests failed, the first with {first}")
        return self.requests


async def one_by_one(ask: Ask, *, seconds: float, least: int) -> list[Request]:
    """Requests one after the other for `seconds`, and at least so many."""
    recorder, ends, number = Recorder(ask), time.perf_counter() + seconds, 0
    while number < least or time.perf_counter() < ends:
        await recorder.request(number, time.perf_counter())
        number += 1
    return recorder.checked()


async def saturated(
    ask: Ask, *, outstanding: int, seconds: float, mark: Callable[[], None]
) -> tuple[list[Request], Window]:
    """A constant number outstanding; the window opens when each caller has been answered once, and stays `seconds`.

    `mark` is called as it opens and as it closes. What is outstanding then is waited for.
    """
    recorder, window = Recorder(ask), Window(0.0, float("inf"))
    fresh = outstanding

    async def caller(number: int) -> None:
        nonlocal fresh
        await recorder.request(number, time.perf_counter())
        fresh -= 1
        if not fresh:
            mark()
            window.opens = time.perf_counter()
            window.closes = window.opens + seconds
        while (now := time.perf_counter()) < window.closes:
            number += outstanding
            await recorder.request(number, now)
        if fresh == 0:
            fresh = -1
            mark()

    await asyncio.gather(*(caller(number) for number in range(outstanding)))
    return recorder.checked(), window


async def arriving(ask: Ask, *, rate: float, seconds: float, seed: int) -> list[Request]:
    """Poisson arrivals of `rate` a second, whether or not earlier ones are answered.

    A request's time counts from when it was due, so that a client that falls behind hides nothing.
    """
    draw, recorder = random.Random(seed), Recorder(ask)
    began = time.perf_counter()
    due, ends, numbers, running = began, began + seconds, itertools.count(), set[asyncio.Task[None]]()
    while (due := due + draw.expovariate(rate)) < ends:
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        task = asyncio.create_task(recorder.request(next(numbers), due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return recorder.checked()
