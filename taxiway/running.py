"""Work that runs beside other work, and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def end(running: Iterable[asyncio.Future[Any] | None]) -> None:
    """Cancel tasks, and wait until they have ended in any way. None stands for one that was not begun."""
    left = [one for one in running if one is not None]
    for one in left:
        one.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def first_of(*work: Awaitable[T]) -> T:
    """The value or error of what ends first, by the order given if several do; the rest is cancelled."""
    running = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return next(one for one in running if one.done()).result()
    finally:
        await end(running)
