"""Receives results: one subscription per router notifies every waiting request; one periodic check bounds the waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, TypeVar

import msgspec

from api.routing.stores import StoredJobs
from taxiway.backoff import Outage
from taxiway.client.valkey_results import POLL_PAUSE, Rounds
from taxiway.connection import AsyncConnection
from taxiway.contract.job import job_in
from taxiway.contract.keys import reply_channel, result_key
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey import ServerError

logger = logging.getLogger(__name__)

CHECK_EVERY = 0.05
"""Seconds between two checks: a wait ends up to this much late."""

_MOST_KEYS = 256  # results or records per command

_Value = TypeVar("_Value")


class WaitTimeouts:
    """Bounds waits with one periodic check: setting and cancelling a timer for each costs a tenth of a request.

    Time for which the event loop stood still does not count: what is waited for could not be sent or read.
    """

    def __init__(self) -> None:
        self._until: dict[asyncio.Future[Any], float] = {}
        self._due = 0.0  # when the next check is due; 0 = none is
        self._lost = 0.0  # seconds for which the loop stood still

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
            if now >= until:
                give_up(future)
        self._due = 0.0
        if self._until:
            self._check_later(loop)

    def _check_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + CHECK_EVERY
        loop.call_at(self._due, self._check, loop)


class Expected:
    """A `future` of a job's stored result among those `waiting`, until it is closed."""

    __slots__ = ("_job", "_waiting", "future")

    def __init__(self, waiting: dict[str, set[asyncio.Future[bytes]]], job: str) -> None:
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting = waiting
        self._job = job
        waiting.setdefault(job, set()).add(self.future)

    def close(self) -> None:
        """Stop waiting."""
        others = self._waiting[self._job]
        others.discard(self.future)
        if not others:
            del self._waiting[self._job]


class Results:
    """The results that callers of this router wait for, as they are announced.

    Results of jobs that this router forwarded for its own callers arrive on the router's reply channel. For other jobs,
    the job's own channel is subscribed to while a caller waits. After each subscription, results that may have been
    announced before it are read from the store. Every `pause` seconds, all results still awaited are read too. A job
    that has neither a result nor a record, twice in a row, was lost by the store: its waits fail.
    """

    def __init__(self, url: str, jobs: StoredJobs, name: str, *, pause: float = POLL_PAUSE) -> None:
        self._connection = AsyncConnection(url)
        self._outage = Outage(logger, "result subscription lost; reading results from the store")
        self._jobs = jobs
        self._own = reply_channel(name)
        self._pause = pause
        self._waiting: dict[str, set[asyncio.Future[bytes]]] = {}
        self._others: dict[str, int] = {}
        self._absent: set[str] = set()  # had neither result nor record when last looked up
        self._alive = False  # anything received on the present connection since the last round
        self._lookups: set[asyncio.Task[None]] = set()
        self.hurried = asyncio.Event()

    def hurry(self) -> None:
        """End all waits, present and future, as if they had timed out."""
        self.hurried.set()
        for future in [future for waiting in self._waiting.values() for future in waiting]:
            give_up(future)

    def expect(self, job: str) -> Expected:
        """The result of a job. Call it before the job is forwarded, so no announcement is missed, and `close` it."""
        expected = Expected(self._waiting, job)
        if self.hurried.is_set():
            give_up(expected.future)
        return expected

    async def wait(self, job: str, longest: float) -> bytes | None:
        """The result of any job, within `longest` seconds; None if it did not arrive.

        Raises:
            BrokerUnavailableError: the state store does not answer, or has lost the job.
        """
        with closing(self.expect(job)) as expected:
            meta = await self._jobs.result(job)
            if meta is not None or longest <= 0:
                return meta
            self._follow(job)
            try:
                return await asyncio.wait_for(expected.future, longest)
            except TimeoutError:
                return await self._jobs.result(job)
            finally:
                self._leave(job)

    async def run(self) -> None:
        """Listen indefinitely; results whose announcement was missed are read from the store."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._stay_subscribed())
            both.create_task(self._poll_store())

    async def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def _stay_subscribed(self) -> None:
        while True:
            try:
                await self._listen()
            except (ServerError, OSError) as error:
                await asyncio.sleep(self._outage.pause(error))

    async def _poll_store(self) -> None:
        """Read results awaited since the previous round, and drop a subscription that has become silent."""
        rounds = Rounds()
        while True:
            await asyncio.sleep(self._pause)
            await self._check(rounds.take(self._waiting))
            if self._alive:
                self._alive = False
                self._connection.send(("PING",))
            else:
                self._connection.close(ConnectionError(f"silent for {self._pause:g} s"))

    async def _listen(self) -> None:
        await self._connection.connect()
        self._alive = True
        await self._connection.listen([("SUBSCRIBE", self._own, *map(result_key, self._others))], self._on_message)

    def _on_message(self, answer: Any) -> None:
        self._alive = True
        if isinstance(answer, Exception):  # the server refuses
            self._connection.close(answer)
        elif answer[0] == b"subscribe":
            self._outage.over()
            channel = answer[1].decode()
            jobs = [job for job in self._waiting if channel in (self._own, result_key(job))]
            task = asyncio.create_task(self._look_up(jobs))
            self._lookups.add(task)
            task.add_done_callback(self._lookups.discard)
        elif answer[0] == b"message":
            with suppress(msgspec.MsgspecError):  # other clients may publish there
                self._resolve(job_in(answer[2]), answer[2])

    def _resolve(self, job: str, meta: bytes) -> None:
        for future in self._waiting.get(job, ()):
            if not future.done():
                future.set_result(meta)

    async def _look_up(self, jobs: Sequence[str]) -> None:
        """Resolve those of these jobs whose results are stored."""
        with suppress(BrokerUnavailableError):  # the next round finds them
            for some in _slices(jobs):
                await self._find(some)

    async def _find(self, jobs: Sequence[str]) -> None:
        for job, meta in zip(jobs, await self._jobs.results(jobs), strict=True):
            if meta is not None:
                self._resolve(job, meta)

    async def _check(self, jobs: Sequence[str]) -> None:
        """Look up these jobs, which have been waited for since the previous round, and fail the waits for lost ones."""
        await self._look_up(jobs)
        absent = set[str]()
        with suppress(BrokerUnavailableError):
            waited = [job for job in jobs if not all(future.done() for future in self._waiting.get(job, ()))]
            for some in _slices(waited):
                absent |= await self._jobs.without_record(some)
        for job in absent & self._absent:
            self._fail(job)
        self._absent = absent | (self._absent.difference(jobs) & self._waiting.keys())

    def _fail(self, job: str) -> None:
        text = f"the state store lost job {job} when it was stopped: send the request again"
        for future in self._waiting.get(job, ()):
            if not future.done():
                future.set_exception(BrokerUnavailableError(text, retry_after=1.0))

    def _follow(self, job: str) -> None:
        self._others[job] = self._others.get(job, 0) + 1
        if self._others[job] == 1:
            self._connection.send(("SUBSCRIBE", result_key(job)))

    def _leave(self, job: str) -> None:
        self._others[job] -= 1
        if self._others[job] == 0:
            del self._others[job]
            self._connection.send(("UNSUBSCRIBE", result_key(job)))


def _slices(jobs: Sequence[str]) -> Iterator[Sequence[str]]:
    return (jobs[start : start + _MOST_KEYS] for start in range(0, len(jobs), _MOST_KEYS))


def give_up(future: asyncio.Future[bytes]) -> None:
    """End the wait for a result as if it had timed out."""
    if not future.done():
        future.set_exception(TimeoutError())
        future.exception()  # avoids asyncio's warning if nothing awaits it
