"""Work on large bodies, off the event loop of a router or of the HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

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
