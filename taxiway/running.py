"""Work that runs beside other work on the event loop: large bodies on a thread, and tasks that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from taxiway.contract.limits import LARGE

P = ParamSpec("P")
T = TypeVar("T")

_thread = ThreadPoolExecutor(1, "large bodies")


async def beside(size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The value of `call`, run on a thread if `size`, in bytes, is large. Raises what it raises.

    There is one thread, so that the event loop competes with one. Python's interpreter lock is released every 5 ms, but
    not during a call into C; inputs are bounded so that no such call takes over 100 ms (`limits.ELEMENTS`).
    """
    if size <= LARGE:
        return call(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_thread, lambda: call(*args, **kwargs))


async def end(running: Iterable[asyncio.Future[Any] | None]) -> None:
    """Cancel tasks, and wait until they have ended in any way. None stands for one that was not begun."""
    left = [one for one in running if one is not None]
    for one in left:
        one.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def check_loop(begun: asyncio.Task[Any] | None) -> None:
    """Check that what was begun on an event loop, by this task, is used on that loop: another would wait forever.

    Raises:
        RuntimeError: another loop runs.
    """
    if begun is not None and begun.get_loop() is not asyncio.get_running_loop():
        raise RuntimeError("a client serves one event loop: make another AsyncClient on this one, or use Client")


async def first_of(*work: Awaitable[T]) -> T:
    """The value or error of what ends first, by the order given if several do; the rest is cancelled."""
    running = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return next(one for one in running if one.done()).result()
    finally:
        await end(running)
