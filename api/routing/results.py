"""Receives results: one subscription per router notifies every waiting request; one periodic check bounds the waits."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, TypeVar

from taxiway.backoff import Outage
from taxiway.client.valkey_results import POLL_PAUSE, Replies, Reply
from taxiway.connection import AsyncConnection, settle
from taxiway.contract.keys import reply_channel
from taxiway.errors import BrokerUnavailableError, ResultExpiredError, ResultTimeoutError
from taxiway.running import first_of
from taxiway.valkey import Calls

logger = logging.getLogger(__name__)

CHECK_EVERY = 0.05
"""Seconds between two checks: a wait ends up to this much late."""

_Value = TypeVar("_Value")


class WaitTimeouts:
    """Bounds waits with one periodic check: setting and cancelling a timer for each costs a tenth of a request.

    Time for which the event loop stood still does not count: what is waited for could not be sent or read.
    """

    def __init__(self) -> None:
        self._until: dict[asyncio.Future[Any], float] = {}
        self._due = 0.0  # when the next check is due; 0 = none is
        self._lost = 0.0  # seconds for which the loop stood still
        self.hurried = asyncio.Event()  # all waits, present and future, are to end as if they had timed out

    async def wait(self, future: asyncio.Future[_Value], longest: float) -> _Value:
        """The result of `future`, within `longest` seconds plus `CHECK_EVERY`.

        Raises:
            TimeoutError: no result in time; the future has failed with this error.
        """
        loop = future.get_loop()
        self._until[future] = loop.time() - self._lost + longest
        if not self._due:
            self._check_later(loop)
        try:
            return await future
        finally:
            del self._until[future]

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        late = loop.time() - self._due
        self._lost += late if late > CHECK_EVERY else 0.0
        now = loop.time() - self._lost
        for future, until in self._until.items():
            if now >= until or self.hurried.is_set():
                settle(future, TimeoutError())
        self._due = 0.0
        if self._until:
            self._check_later(loop)

    def _check_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + CHECK_EVERY
        loop.call_at(self._due, self._check, loop)


class Results:
    """The results that callers of this router wait for, as they are announced.

    Results of jobs that this router forwarded for its own callers arrive on its reply channel, and those of other jobs
    on their own. A job that has neither a result nor a record, at two looks, was lost by the store: its waits fail.
    """

    def __init__(self, url: str, calls: Calls, name: str, *, pause: float = POLL_PAUSE) -> None:
        outage = Outage(logger, "result subscription lost; reading results from the store")
        self._replies = Replies(
            AsyncConnection(url),
            calls,
            reply_channel(name),
            pause=pause,
            missing=_lost,
            lost=outage.pause,
            again=outage.over,
        )
        self._timeouts = WaitTimeouts()
        self.hurried = self._timeouts.hurried

    def expect(self, job: str) -> Reply:
        """The result of a job. Call it before the job is forwarded, so no announcement is missed."""
        return self._replies.expect(job, recorded=True)

    async def within(self, longest: float, expected: Reply) -> bytes:
        """The expected result. Raises `TimeoutError` after `longest` seconds."""
        return await self._timeouts.wait(expected.wait(), longest)

    async def wait(self, job: str, longest: float) -> None:
        """Wait until any job has ended, at most `longest` seconds.

        Raises:
            BrokerUnavailableError: the state store does not answer, or has lost the job.
        """
        with suppress(ResultTimeoutError, ResultExpiredError):
            await first_of(self._replies.watch(job, longest), self.hurried.wait())

    async def run(self) -> None:
        """Listen indefinitely."""
        await self._replies.start()

    async def close(self) -> None:
        """Disconnect."""
        await self._replies.close()


def _lost(job: str) -> BrokerUnavailableError:
    text = f"the state store lost job {job} when it was stopped: send the request again"
    return BrokerUnavailableError(text, retry_after=1.0)
