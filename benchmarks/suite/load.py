"""Load on one contestant: sequential requests, a constant number outstanding, or open-loop arrivals.

Every loop returns its requests; rates and latencies are computed from these.
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
"""Sends the request of that number; returns the items in its answer."""

MOST_FAILURES = 0.01
"""Largest share of failed requests with which a loop's figures are valid."""


class UnreliableError(Exception):
    """Too many requests failed; the text has the first failure."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One answered request: its due time, its completion time (`time.perf_counter`), and its items.

    It is excluded from garbage collection, which would take 0.1 s at a time for 100,000 of them during a loop.
    """

    began: float
    ended: float
    items: float

    @property
    def seconds(self) -> float:
        """The caller's latency in seconds."""
        return self.ended - self.began


@dataclass(slots=True)
class Window:
    """The measurement window of a saturated loop."""

    opens: float
    closes: float

    def items(self, requests: Sequence[Request]) -> float:
        """The items served in the window.

        A request counts by the share of its time inside the window, which therefore need not hold whole batches.
        """
        inside = ((max(self.opens, r.began), min(self.closes, r.ended), r) for r in requests)
        return sum(r.items * (end - begin) / r.seconds for begin, end, r in inside if end > begin)

    @property
    def seconds(self) -> float:
        """The window's length in seconds."""
        return self.closes - self.opens


class Recorder:
    """Sends requests and keeps the answered ones."""

    def __init__(self, ask: Ask) -> None:
        self.requests: list[Request] = []
        self._ask = ask
        self._failures: list[Exception] = []

    async def request(self, number: int, began: float) -> None:
        """Send a request; a failure is counted, not raised."""
        try:
            items = await self._ask(number)
        except (OSError, ValueError, RuntimeError) as error:
            self._failures.append(error)
            await asyncio.sleep(0.01)  # a refused connection fails at once: do not spin
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
    """Sequential requests for `seconds`, and at least the given number."""
    recorder, ends, number = Recorder(ask), time.perf_counter() + seconds, 0
    while number < least or time.perf_counter() < ends:
        await recorder.request(number, time.perf_counter())
        number += 1
    return recorder.checked()


async def saturated(
    ask: Ask, *, outstanding: int, seconds: float, mark: Callable[[], None]
) -> tuple[list[Request], Window]:
    """A constant number of outstanding requests. The window opens once each caller was answered, and lasts `seconds`.

    `mark` is called when it opens and when it closes. Requests outstanding at the end are awaited.
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
    """Open-loop Poisson arrivals of `rate` per second.

    Latency counts from the due time, so a client that falls behind does not hide latency.
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
