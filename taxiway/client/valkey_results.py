"""How results and generated text reach a client of a Valkey or Redis server.

One subscription delivers the results of all jobs; missed announcements are recovered by polling the store in rounds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from taxiway.connection import AsyncConnection, settle
from taxiway.contract.job import FINAL, expired, job_in, result_in, unknown
from taxiway.contract.keys import job_key, result_key, stream_key
from taxiway.contract.stream import StreamEntry, read_entries
from taxiway.errors import BrokerUnavailableError, ResultTimeoutError, TaxiwayError
from taxiway.running import check_loop, end
from taxiway.valkey import Calls, ServerError

POLL_PAUSE = 3.0
"""Seconds between passes. With few waiters, a missed announcement is recovered after 3 to 6 s."""

MOST_PER_PASS = 2048
"""Most results read in one pass: 0.8 ms of CPU time at the reader, 0.2 ms at the store."""

_PINGS = 3
"""Pings sent to a silent server within the link's `connect_timeout`."""

_IDLE = 60.0
"""Seconds of silence after which a server is pinged although nothing waits: networks forget idle connections."""

_CHECKS = 12
"""Checks per `connect_timeout`: a caller learns that it has run out at most this fraction late."""

_MOST_RESULTS = 256
"""Results per MGET."""

UNKNOWN_AFTER = 2.5
"""Seconds for which a job without a record may still be in transit from another client."""

_MOST_PIECES = 256
"""Pieces per read."""

_BLOCK = 5.0
"""Seconds for which the server blocks waiting for a piece."""

_RETRY_PAUSE = 0.1
"""Seconds between two attempts to connect or to subscribe."""


def next_pass(left: Sequence[str], waiting: Collection[str]) -> tuple[list[str], list[str]]:
    """The jobs of those `left` by earlier passes to read now, and those left for later ones.

    Each of the `waiting` is read only after it has waited for a pass, and none twice before all others.
    """
    still = [job for job in left if job in waiting]
    return still[:MOST_PER_PASS], still[MOST_PER_PASS:] or list(waiting)


async def read_pieces(connection: AsyncConnection, job: str, after: str) -> list[tuple[str, StreamEntry]]:
    """The pieces of a job's stream after an entry, each with its id; empty if none came in some seconds.

    Each read blocks on the server until the next piece, so the `connection` is for this job alone. Waits out an outage.
    """
    wait = int(_BLOCK * 1000)
    command = ("XREAD", "COUNT", _MOST_PIECES, "BLOCK", wait, "STREAMS", stream_key(job), after)
    while True:
        try:
            async with asyncio.timeout(_BLOCK + connection.connect_timeout):
                streams = await connection.call(*command)
            return read_entries(streams[0][1] if streams else [])
        except (ServerError, OSError):
            connection.close()
            await asyncio.sleep(_RETRY_PAUSE)


class Reply:
    """A job's stored result, for any number of callers that wait for it."""

    __slots__ = ("__weakref__", "_waiters", "absent_since", "answer", "recorded", "submitted")

    def __init__(self) -> None:
        self.answer: bytes | Exception | None = None
        self.submitted = False  # by this client: it exists, even if it has no record yet
        self.recorded = False  # it has a record or is missing, so that is read, too
        self.absent_since = 0.0  # when it was first seen to have none; 0 = never
        self._waiters: list[asyncio.Future[bytes]] = []

    def wait(self) -> asyncio.Future[bytes]:
        """The result for one caller, who may end this future."""
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.answer is None:
            self._waiters = [*(one for one in self._waiters if not one.done()), waiter]
        else:
            settle(waiter, self.answer)
        return waiter

    def settle(self, answer: bytes | Exception) -> None:
        """Give all that wait the result or an error, unless they have one."""
        if self.answer is None:
            self.answer = answer
            for waiter in self._waiters:
                settle(waiter, answer)


class Replies:
    """Has a reply for each job, settled when its result is announced; a job is dropped when its reply is collected.

    Jobs are announced on one channel, and those that are watched on their own. After each subscribe, and every `pause`
    seconds, the stored results of waiting jobs are read, so none is missed at the start or after a disconnection. With
    them are read the records of watched jobs, and of others that must have one: a job may have ended so long ago that
    its result is gone, or may be missing. `read` gives the answers to commands that are sent together. `lost` is called
    with each failure of the subscription, and `again` when the channel is subscribed to after that.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        read: Calls,
        channel: str,
        *,
        pause: float = POLL_PAUSE,
        missing: Callable[[str], TaxiwayError] = unknown,
        lost: Callable[[Exception], object] = lambda _: None,
        again: Callable[[], object] = lambda: None,
    ) -> None:
        self._connection = connection
        self._read = read
        self._channel = channel
        self._pause = pause
        self._missing, self._lost, self._again = missing, lost, again
        self._waiting: WeakValueDictionary[str, Reply] = WeakValueDictionary()
        self._watches: Counter[str] = Counter()
        self._to_check: set[str] = set()
        self._listening: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._unlimited: dict[asyncio.Future[bytes], float] = {}  # waits without a timeout: when each began
        self._closed = False
        self._last_received = 0.0
        self._unavailable = False
        self._pinged = 0.0  # when the unanswered ping was sent; 0 = none is

    def expect(self, job: str, *, recorded: bool = False) -> Reply:
        """The reply to a job submitted here, announced on the own channel.

        With `recorded`, the job has a record within `UNKNOWN_AFTER` seconds, or is missing.
        """
        reply = self._reply(job)
        reply.recorded, reply.submitted = reply.recorded or recorded, reply.submitted or not recorded
        return reply

    def _reply(self, job: str) -> Reply:
        self.start()
        reply = self._waiting.get(job)
        if reply is None:
            reply = self._waiting[job] = Reply()
        return reply

    def expects(self, job: str) -> bool:
        """Whether a reply is expected for a job that was submitted here."""
        return (reply := self._waiting.get(job)) is not None and reply.submitted

    async def watch(self, job: str, timeout: float | None, *, submitted: bool = False) -> bytes:
        """The stored result of a job that another client may have submitted, announced on the job's own channel.

        Raises as `wait` does, and:
            ResultExpiredError: the job ended and its result has expired.
            UnknownJobError: it was not `submitted` here, and no router recorded it within `UNKNOWN_AFTER`.
        """
        started = asyncio.get_running_loop().time()
        reply = self.expect(job) if submitted else self._reply(job)
        reply.recorded = True
        self._watches[job] += 1
        try:
            self._connection.send(("SUBSCRIBE", result_key(job)))
            self._check([job])  # once, however short the timeout, within the link's `connect_timeout`
            while reply.answer is None and self._checking is not None and not self._checking.done():
                await asyncio.wait((self._checking, reply.wait()), return_when=asyncio.FIRST_COMPLETED)
            return await self.wait(reply, timeout, started)
        finally:
            self._watches[job] -= 1
            if not self._watches[job]:
                del self._watches[job]
                self._connection.send(("UNSUBSCRIBE", result_key(job)))

    async def wait(self, reply: Reply, timeout: float | None, started: float | None = None) -> bytes:
        """The stored result; a failed wait leaves the reply valid. `timeout` counts from `started`, or from now.

        Raises:
            ResultTimeoutError: `timeout` seconds passed.
            BrokerUnavailableError: the server was silent for the `connect_timeout` (without `timeout`), or is
                unavailable when `timeout` ends.
        """
        if reply.answer is None:
            check_loop(self._listening)
        loop, timer, waiter = asyncio.get_running_loop(), None, reply.wait()
        started = loop.time() if started is None else started
        if timeout is None:
            self._unlimited[waiter] = started
        else:  # `asyncio.timeout` takes 2 µs more
            timer = loop.call_at(started + timeout, lambda: settle(waiter, self._timeout_error(timeout)))
        try:
            return await waiter
        finally:
            self._unlimited.pop(waiter, None)
            if timer is not None:
                timer.cancel()

    def start(self) -> asyncio.Task[None]:
        """Listen until closed, from the first call on; the task that does."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._run())
        check_loop(self._listening)
        return self._listening

    async def close(self) -> None:
        """Stop listening."""
        self._closed = True
        for reply in list(self._waiting.values()):
            reply.settle(RuntimeError("this client was closed while it waited"))
        await end((self._listening, self._checking))

    def _timeout_error(self, timeout: float | None) -> BrokerUnavailableError | ResultTimeoutError:
        if timeout is None or self._unavailable:
            return BrokerUnavailableError("the state store does not answer; the job continues")
        return ResultTimeoutError(f"no result within {timeout:g} s; the job continues", timeout=timeout)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as together:
            for one in (self._listen(), self._ping(), self._poll()):
                together.create_task(one)

    async def _listen(self) -> None:
        """Read announcements; reconnects when the connection is lost or given up."""
        while True:
            try:
                await self._connection.connect()
                self._pinged = 0.0
                channels = (self._channel, *map(result_key, self._watches))
                await self._connection.listen([("SUBSCRIBE", *channels)], self._receive)
            except (ServerError, OSError) as error:
                self._unavailable = True
                self._lost(error)
                await asyncio.sleep(_RETRY_PAUSE)

    def _receive(self, answer: Any) -> None:
        if isinstance(answer, Exception):  # the server's error reply
            self._connection.close(answer)
            return
        self._last_received, self._pinged = asyncio.get_running_loop().time(), 0.0
        if answer[0] == b"message":
            with suppress(msgspec.MsgspecError):  # others may publish there
                self._resolve(answer[2])
        elif answer[0] == b"subscribe":
            self._check_again(answer[1].decode())

    def _resolve(self, meta: bytes) -> None:
        reply = self._waiting.get(job_in(meta))
        if reply is not None:
            reply.settle(meta)

    def _check_again(self, channel: str) -> None:
        if channel != self._channel:
            self._check([channel.removeprefix(result_key(""))])
            return
        if self._unavailable:
            self._unavailable = False
            self._again()
        self._check(list(self._waiting))

    async def _poll(self) -> None:
        """Periodically read the stored results of jobs that have waited since the previous pass."""
        left: Sequence[str] = ()
        while True:
            await asyncio.sleep(self._pause)
            jobs, left = next_pass(left, self._waiting)
            self._check(jobs)

    def _check(self, jobs: Sequence[str]) -> None:
        """Add these jobs to those whose stored results are being read."""
        self._to_check.update(jobs)
        if self._to_check and not self._closed and (self._checking is None or self._checking.done()):
            self._checking = asyncio.create_task(self._read_stored())

    async def _read_stored(self) -> None:
        while self._to_check:
            jobs = [self._to_check.pop() for _ in range(min(_MOST_RESULTS, len(self._to_check)))]
            recorded = [job for job in jobs if (reply := self._waiting.get(job)) is not None and reply.recorded]
            # States first: a final one is written together with the result, so if that is missing, it has expired
            reads = [("HGET", job_key(job), "state") for job in recorded]
            try:
                *states, stored = await self._read(*reads, ("MGET", *map(result_key, jobs)))
            except BrokerUnavailableError:
                self._connection.close()  # the next subscription checks again
                return
            for meta in filter(None, map(result_in, stored)):
                self._resolve(meta)
            for job, state in zip(recorded, states, strict=True):
                self._judge(job, state)

    def _judge(self, job: str, state: bytes | None) -> None:
        """End the wait for a job that has no result: because it has expired, or because the job is missing twice."""
        reply, loop = self._waiting.get(job), asyncio.get_running_loop()
        if reply is None or reply.answer is not None:
            return
        if state is not None:
            if state.decode() in FINAL:
                reply.settle(expired(job))
        elif not reply.submitted and not reply.absent_since:
            reply.absent_since = loop.time()
            loop.call_later(UNKNOWN_AFTER + _RETRY_PAUSE, self._check, [job])
        elif not reply.submitted and loop.time() - reply.absent_since >= UNKNOWN_AFTER:
            reply.settle(self._missing(job))

    async def _ping(self) -> None:
        """Ping a silent server, often while calls wait, and drop the connection if it does not answer.

        Time for which the event loop stood still does not count.
        """
        clock = asyncio.get_running_loop().time
        step = self._connection.connect_timeout / _PINGS
        while True:
            due = clock() + self._connection.connect_timeout / _CHECKS
            await asyncio.sleep(due - clock())
            now = clock()
            self._last_received += max(now - due, 0.0)
            for waiter, started in list(self._unlimited.items()):
                if now >= max(started, self._last_received) + self._connection.connect_timeout:
                    settle(waiter, self._timeout_error(None))
            if not self._connection.connected:
                continue
            if not self._pinged and now - self._last_received >= (step if len(self._waiting) else _IDLE):
                self._pinged = now
                self._connection.send(("PING",))
            elif self._pinged and now - self._pinged >= self._connection.connect_timeout - step:
                self._connection.close()
