"""Run many requests with a bounded window; yield results in order or as they complete."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from taxiway.contract.job import Result

Ask = Callable[[Any], Coroutine[Any, Any, Result]]
"""Infers one input."""

Progress = Callable[[int], None]
"""Called with the number of results so far."""


def no_progress(_: int) -> None:
    """The default progress callback: does nothing."""


async def in_order(
    ask: Ask, inputs: Iterable[Any] | AsyncIterable[Any], window: int, progress: Progress
) -> AsyncGenerator[Result, None]:
    """Yield the result of each input, in order; the first failed request raises in its turn."""
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
    """Yield each input's index, from 0, and result, in order of completion; the first failure raises."""
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
