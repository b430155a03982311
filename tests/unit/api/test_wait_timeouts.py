"""Waits that end when their time is over, in one event loop."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from api.routing.results import CHECK_EVERY, WaitTimeouts

SOON = 20.0


async def ended(waits: Sequence[Awaitable[Any]]) -> list[Any]:
    """What each gave."""
    return await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), SOON)


async def test_a_wait_gives_what_came_and_ends_when_its_time_is_over() -> None:
    timeout, loop = WaitTimeouts(), asyncio.get_running_loop()
    came, late, never = (loop.create_future() for _ in range(3))
    waits = [timeout.wait(came, SOON), timeout.wait(late, 2 * SOON), timeout.wait(never, 0.1)]
    first = asyncio.ensure_future(ended(waits))
    loop.call_soon(came.set_result, "came")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(never), SOON)
    assert not late.done()
    late.set_result("late")
    came, late, never = await first
    assert (came, late, type(never)) == ("came", "late", TimeoutError)


async def test_time_for_which_the_event_loop_stood_still_is_not_counted() -> None:
    timeout, loop = WaitTimeouts(), asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    waiting = asyncio.ensure_future(timeout.wait(future, 0.5))
    await asyncio.sleep(0)
    time.sleep(0.7)
    loop.call_later(2 * CHECK_EVERY, future.set_result, "came")
    assert await ended([waiting]) == ["came"]


async def test_a_wait_that_is_cancelled_is_forgotten() -> None:
    timeout, loop = WaitTimeouts(), asyncio.get_running_loop()
    given_up = asyncio.ensure_future(timeout.wait(loop.create_future(), SOON))
    await asyncio.sleep(0)
    given_up.cancel()
    (answer,) = await ended([given_up])
    (after,) = await ended([timeout.wait(loop.create_future(), 0.0)])
    assert (type(answer), type(after)) == (asyncio.CancelledError, TimeoutError)
