"""Many requests at a time: a window of them under way, answers in order or as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from taxiway.contract.job import Result

Ask = Callable[[Any], Coroutine[Any, Any, Result]]
"""Asks for one input's answer."""

Progress = Callable[[int], None]
"""Is told how many requests were answered so far."""


def unheard(_: int) -> None:
    """The progress that nobody wants to hear of."""


async def in_order(
    ask: Ask, inputs: Iterable[Any] | AsyncIterable[Any], window: int, progress: Progress
) -> AsyncGenerator[Result, None]:
    """The answer to each input in their order; the first that fails raises in its turn."""
    running: deque[asyncio.Task[Result]] = deque()
    told = 0
    try:
        async for one in _each(inputs):
            running.append(asyncio.create_task(ask(one)))
            if len(running) >= window:
                yield await running.popleft()
                progress(told := told + 1)
        while running:
            yield await running.popleft()
            progress(told := told + 1)
    finally:
        await _cancel(running)


async def as_they_come(
    ask: Ask, inputs: Iterable[Any] | AsyncIterable[Any], window: int, progress: Progress
) -> AsyncGenerator[tuple[int, Result], None]:
    """Each input's place, from 0, with its answer, as soon as that is there; the first that fails raises."""
    places: dict[asyncio.Task[Result], int] = {}
    ended: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()
    room = asyncio.Semaphore(window)

    async def feed() -> None:
        place = 0
        async for one in _each(inputs):
            await room.acquire()
            task = asyncio.create_task(ask(one))
            places[task], place = place, place + 1
            task.add_done_callback(ended.put_nowait)

    feeding = asyncio.create_task(feed())
    feeding.add_done_callback(ended.put_nowait)
    told = 0
    try:
        while places or not feeding.done():
            task = await ended.get()
            if task is feeding:
                feeding.result()
                continue
            room.release()
            yield places.pop(task), task.result()
            progress(told := told + 1)
    finally:
        await _cancel([feeding, *places])


async def _each(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(inputs, AsyncIterable):
        async for one in inputs:
            yield one
    else:
        for one in inputs:
            yield one


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
