"""Timeouts for waits, checked together."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from router.service.results import give_up

CHECK_EVERY = 0.05
"""Seconds between two checks: a wait ends up to this much late."""

_Value = TypeVar("_Value")


class WaitTimeouts:
    """Bounds waits with one periodic check: setting and cancelling a timer for each costs a tenth of a request."""

    def __init__(self) -> None:
        self._until: dict[asyncio.Future[Any], float] = {}
        self._checking = False

    async def wait(self, future: asyncio.Future[_Value], longest: float) -> _Value:
        """The result of `future`, within `longest` seconds plus `CHECK_EVERY`.

        Raises:
            TimeoutError: no result in time; the future has failed with this error.
        """
        loop = future.get_loop()
        self._until[future] = loop.time() + longest
        if not self._checking:
            self._checking = True
            loop.call_later(CHECK_EVERY, self._check, loop)
        try:
            return await future
        finally:
            del self._until[future]

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for future, until in self._until.items():
            if now >= until:
                give_up(future)
        self._checking = bool(self._until)
        if self._checking:
            loop.call_later(CHECK_EVERY, self._check, loop)
