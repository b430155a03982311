"""How results and generated text reach a client of a Valkey or Redis server.

One subscription delivers the results of all jobs; missed announcements are recovered by polling the store in rounds.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakValueDictionary

from taxiway.client.valkey_link import ValkeyLink
from taxiway.connection import settle
from taxiway.contract.job import FINAL, expired, job_in, result_in, unknown
from taxiway.contract.keys import job_key, result_key, stream_key
from taxiway.contract.stream import StreamEntry, read_entries
from taxiway.errors import BrokerUnavailableError, ResultTimeoutError
from taxiway.running import end
from taxiway.valkey import ServerError

POLL_PAUSE = 3.0
"""Seconds between passes. With few waiters, a missed announcement is recovered after 3 to 6 s."""

MOST_PER_PASS = 2048
"""Most results read in one pass: 0.8 ms of CPU time at the reader, 0.2 ms at the store."""

_PINGS = 3
"""Pings sent to a silent server within the link's `connect_timeout`."""

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


class Rounds:
    """Polls waiters in turn: each only after it has waited for a pass, and none twice before all others."""

    def __init__(self) -> None:
        self._left: deque[str] = deque()

    def take(self, waiting: Collection[str]) -> Sequence[str]:
        """The jobs to read in this pass, out of `waiting`."""
        taken: list[str] = []
        while self._left and len(taken) < MOST_PER_PASS:
            job = self._left.popleft()
            if job in waiting:
                taken.append(job)
        if not self._left:
            self._left.extend(waiting)
        return taken


class PieceReader:
    """Reads one job's stream, on its own connection: each read blocks on the server until the next piece."""

    def __init__(self, link: ValkeyLink, job: str) -> None:
        self._connection = link.connection()
        self._connect_timeout = link.connect_timeout
        self._key = stream_key(job)

    async def read(self, after: str) -> list[tuple[str, StreamEntry]]:
        """The pieces after an entry, each with its id; empty if none came in some seconds. Waits out an outage."""
        while True:
            try:
                return await self._ask(after)
            except (ServerError, OSError):
                await self.aclose()
                await asyncio.sleep(_RETRY_PAUSE)

    async def aclose(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def _ask(self, after: str) -> list[tuple[str, StreamEntry]]:
        wait = int(_BLOCK * 1000)
        command = ("XREAD", "COUNT", _MOST_PIECES, "BLOCK", wait, "STREAMS", self._key, after)
        async with asyncio.timeout(_BLOCK + self._connect_timeout):
            streams = await self._connection.call(*command)
        return read_entries(streams[0][1] if streams else [])


class Replies:
    """Resolves a future for each job when its result is announced.

    A job is dropped when its future is garbage-collected. After each subscribe, the stored results of jobs that may
    have been announced earlier are read, so none is missed at the start or after a disconnection. Every `pause` seconds
    the stored results of waiting jobs are read again. For watched jobs the records are read too: a job may have ended
    so long ago that its result is gone, or may not exist. `reconnected` is called each time the client's channel is
    resubscribed.
    """

    def __init__(
        self,
        link: ValkeyLink,
        channel: str,
        *,
        pause: float = POLL_PAUSE,
        reconnected: Callable[[], None] = lambda: None,
    ) -> None:
        self._link = link
        self._reconnected = reconnected
        self._connection = link.connection()
        self._channel = channel
        self._pause = pause
        self._waiting: WeakValueDictionary[str, asyncio.Future[bytes]] = WeakValueDictionary()
        self._submitted: WeakValueDictionary[str, asyncio.Future[bytes]] = WeakValueDictionary()
        self._watches: Counter[str] = Counter()
        self._foreign: dict[str, float] = {}  # jobs not submitted here: when each was first watched
        self._to_check: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._checking: asyncio.Task[None] | None = None
        self._sole_waits: dict[asyncio.Future[bytes], float] = {}
        self._closed = False
        self._last_received = 0.0
        self._subscribed = False
        self._unavailable = False
        self._pinged = 0.0  # when the unanswered ping was sent; 0 = none is

    def expect(self, job: str) -> asyncio.Future[bytes]:
        """The future of the stored result of a job submitted here, announced on the client's own channel."""
        future = self._submitted[job] = self._future(job)
        return future

    def _future(self, job: str) -> asyncio.Future[bytes]:
        if not self._tasks:
            forever = (self._listen(), self._ping(), self._poll())
            self._tasks = [asyncio.create_task(task) for task in forever]
        future = self._waiting.get(job)
        if future is None:
            future = self._waiting[job] = asyncio.get_running_loop().create_future()
        return future

    def expects(self, job: str) -> bool:
        """Whether a future exists for a job that was submitted here."""
        return job in self._submitted

    async def watch(self, job: str, timeout: float | None, *, submitted: bool = False) -> bytes:
        """The stored result of a job that another client may have submitted, announced on the job's own channel.

        Raises as `wait` does, and:
            ResultExpiredError: the job ended and its result has expired.
            UnknownJobError: it was not `submitted` here, and no router recorded it within `UNKNOWN_AFTER`.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        judging: asyncio.TimerHandle | None = None
        if not submitted and not self.expects(job):
            self._foreign.setdefault(job, started)
            judging = loop.call_later(UNKNOWN_AFTER + _RETRY_PAUSE, self._check, [job])
        future = self._future(job)
        self._watches[job] += 1
        try:
            self._connection.send(("SUBSCRIBE", result_key(job)))
            await self._poll_once(future, job)
            return await self.wait(future, timeout, started)
        finally:
            if judging is not None:
                judging.cancel()
            self._watches[job] -= 1
            if not self._watches[job]:
                del self._watches[job]
                self._foreign.pop(job, None)
                self._connection.send(("UNSUBSCRIBE", result_key(job)))

    async def wait(self, future: asyncio.Future[bytes], timeout: float | None, started: float | None = None) -> bytes:
        """The future's value; a failed wait leaves the future valid. `timeout` counts from `started`, or from now.

        Raises:
            ResultTimeoutError: `timeout` seconds passed.
            BrokerUnavailableError: the server was silent for the link's `connect_timeout` (without `timeout`), or is
                unavailable when `timeout` ends.
        """
        clock = asyncio.get_running_loop().time
        started = clock() if started is None else started
        while not future.done():
            silent_since = max(started, self._last_received)
            until = silent_since + self._link.connect_timeout if timeout is None else started + timeout
            if clock() >= until:
                raise self._timeout_error(timeout)
            await asyncio.wait((future,), timeout=until - clock())
        if future.cancelled():
            raise RuntimeError("this client was closed while it waited")
        return future.result()

    async def wait_alone(self, future: asyncio.Future[bytes], timeout: float | None) -> bytes:
        """The value of a future with no other waiter; a wait that fails ends the future. Raises as `wait` does."""
        loop, timer = asyncio.get_running_loop(), None
        if timeout is None:
            self._sole_waits[future] = loop.time()
        else:  # `asyncio.timeout` takes 2 µs more
            timer = loop.call_later(timeout, lambda: settle(future, self._timeout_error(timeout)))
        try:
            return await future
        except asyncio.CancelledError:
            if self._closed:
                raise RuntimeError("this client was closed while it waited") from None
            raise
        finally:
            self._sole_waits.pop(future, None)
            if timer is not None:
                timer.cancel()

    async def close(self) -> None:
        """Stop listening."""
        self._closed = True
        for future in list(self._waiting.values()):
            future.cancel()
        await end((*self._tasks, self._checking))
        self._tasks = []

    def _timeout_error(self, timeout: float | None) -> BrokerUnavailableError | ResultTimeoutError:
        if timeout is None or self._unavailable:
            return BrokerUnavailableError("the state store does not answer; the job continues")
        return ResultTimeoutError(f"no result within {timeout:g} s; the job continues", timeout=timeout)

    async def _listen(self) -> None:
        while True:
            try:
                await self._read()
            except (ServerError, OSError):
                self._unavailable = True
                await asyncio.sleep(_RETRY_PAUSE)

    async def _read(self) -> None:
        """Read announcements until the connection is lost or given up, then raise."""
        await self._connection.connect()
        self._pinged, self._unavailable = 0.0, False
        await self._connection.listen([("SUBSCRIBE", self._channel, *map(result_key, self._watches))], self._receive)

    def _receive(self, answer: Any) -> None:
        if isinstance(answer, Exception):  # the server's error reply
            self._connection.close(answer)
            return
        self._last_received, self._pinged = asyncio.get_running_loop().time(), 0.0
        if answer[0] == b"message":
            self._resolve(answer[2])
        elif answer[0] == b"subscribe":
            self._check_again(answer[1].decode())

    def _resolve(self, meta: bytes) -> None:
        future = self._waiting.get(job_in(meta))
        if future is not None and not future.done():
            future.set_result(meta)

    def _check_again(self, channel: str) -> None:
        mine = channel == self._channel
        if mine and self._subscribed:
            self._reconnected()
        self._subscribed |= mine
        self._check([job for job in list(self._waiting) if mine or result_key(job) == channel])

    async def _poll(self) -> None:
        """Periodically read the stored results of jobs that have waited since the previous pass."""
        rounds = Rounds()
        while True:
            await asyncio.sleep(self._pause)
            self._check(rounds.take(self._waiting))

    async def _poll_once(self, future: asyncio.Future[bytes], job: str) -> None:
        """Read a job's stored result once, however short the caller's timeout, within the link's `connect_timeout`."""
        self._check([job])
        while not future.done() and self._checking is not None and not self._checking.done():
            await asyncio.wait((self._checking, future), return_when=asyncio.FIRST_COMPLETED)

    def _check(self, jobs: Sequence[str]) -> None:
        """Add these jobs to those whose stored results are being read."""
        self._to_check.update(jobs)
        if self._to_check and (self._checking is None or self._checking.done()):
            self._checking = asyncio.create_task(self._read_stored())

    async def _read_stored(self) -> None:
        while self._to_check:
            jobs = [self._to_check.pop() for _ in range(min(_MOST_RESULTS, len(self._to_check)))]
            try:
                stored = await self._link.call("MGET", *map(result_key, jobs))
                results = [result_in(raw) for raw in stored]
                for meta in filter(None, results):
                    self._resolve(meta)
                watched = [
                    job for job, meta in zip(jobs, results, strict=True) if meta is None and job in self._watches
                ]
                await asyncio.gather(*map(self._check_record, watched))
            except BrokerUnavailableError:
                self._connection.close()  # the next subscription checks again
                return

    async def _check_record(self, job: str) -> None:
        """Fail the wait for a job whose result has expired, or that is unknown."""
        # One pipeline, in this order: a final state is written together with the result. If the state is final and the
        # result is missing, the result has expired.
        state, raw = await asyncio.gather(
            self._link.call("HGET", job_key(job), "state"), self._link.call("GET", result_key(job))
        )
        meta = result_in(raw)
        future, now = self._waiting.get(job), asyncio.get_running_loop().time()
        if meta is not None:
            self._resolve(meta)
        elif future is None:
            return
        elif state is not None and state.decode() in FINAL:
            settle(future, expired(job))
        elif state is None and now - self._foreign.get(job, now) >= UNKNOWN_AFTER:
            settle(future, unknown(job))

    async def _ping(self) -> None:
        """Ping a silent server while calls wait, and drop the connection if it does not answer."""
        clock = asyncio.get_running_loop().time
        step = self._link.connect_timeout / _PINGS
        while True:
            await asyncio.sleep(self._link.connect_timeout / _CHECKS)
            now = clock()
            for future, started in list(self._sole_waits.items()):
                if now >= max(started, self._last_received) + self._link.connect_timeout:
                    settle(future, self._timeout_error(None))
            if not self._connection.connected or not len(self._waiting):
                continue
            if not self._pinged and now - self._last_received >= step:
                self._pinged = now
                self._connection.send(("PING",))
            elif self._pinged and now - self._pinged >= self._link.connect_timeout - step:
                self._connection.close()
