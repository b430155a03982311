"""A client's connections to a Valkey or Redis server: for commands, for results, and for generated text.

Commands are pipelined on one connection and retried during outages. One subscription delivers the results of all jobs;
missed announcements are recovered by polling the store in rounds.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from taxiway.connection import AsyncConnection, settle
from taxiway.contract.job import FINAL, Piece, expired, read_piece, unknown
from taxiway.contract.keys import ARRIVALS, blob_key, job_key, result_key, stream_key
from taxiway.contract.limits import Buffer
from taxiway.contract.values import KEPT
from taxiway.contract.wire import Durability, check_confirmed, confirming, refusal
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, ResultTimeoutError
from taxiway.valkey import ServerError

PAUSE = 3.0
"""Seconds between passes. With few waiters, a missed announcement is recovered after 3 to 6 s."""

AT_ONCE = 2048
"""Most results read in one pass: 0.8 ms of CPU time at the reader, 0.2 ms at the store."""


class Rounds:
    """Polls waiters in turn: each only after it has waited for a pass, and none twice before all others."""

    def __init__(self) -> None:
        self._left: deque[str] = deque()

    def take(self, waiting: Collection[str]) -> Sequence[str]:
        """The jobs to read in this pass, out of `waiting`."""
        taken: list[str] = []
        while self._left and len(taken) < AT_ONCE:
            job = self._left.popleft()
            if job in waiting:
                taken.append(job)
        if not self._left:
            self._left.extend(waiting)
        return taken


_MOST_MESSAGES = 512
"""Arrivals per LPUSH: small enough not to delay the server's other clients (about 0.3 ms)."""

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5
"""Seconds before reconnecting; doubled each time."""

_CONFIRMED_WITHIN = 0.8
"""Fraction of a call's `patience` within which a replica must confirm."""

_NO_BLOBS: Mapping[str, Buffer] = {}

Settle = Callable[[Any], None]
"""Called with a command's answer or its error."""

_Waiting = tuple[Any, Settle]


class ValkeyLink:
    """Commands to one server. Commands issued while a pipeline is in flight are sent together in the next one."""

    def __init__(self, url: str, patience: float, durability: Durability = "written") -> None:
        try:
            self._connection = AsyncConnection(url, answer=None, patience=patience)
        except ValueError:  # its text may quote part of a password
            wanted = "redis://NAME:PASSWORD@HOST:PORT/DATABASE, with / and # in a password as %2F and %23"
            raise InvalidRequestError(f"url: expected {wanted}", field="url") from None
        self._url = url
        self.patience = patience
        self._confirming = confirming(durability, patience * _CONFIRMED_WITHIN)
        self._arrivals: list[_Waiting] = []
        self._commands: list[_Waiting] = []
        self._flushing: asyncio.Task[None] | None = None

    async def call(self, *command: str | bytes | int) -> Any:
        """The server's answer to one command.

        Raises:
            BrokerUnavailableError: the server does not answer, or refuses.
        """
        return await self._queued(self._commands, command)

    async def push(self, message: bytes, blobs: Mapping[str, Buffer] = _NO_BLOBS) -> None:
        """Push a message to the arrivals queue, after the blobs that it references.

        They are as durable as the server's append-only log when this returns. A push without an answer is repeated: a
        router drops the second copy of a job. Raises as `call` does.
        """
        await self._queued(self._arrivals, (message, blobs))

    def post(self, message: bytes, blobs: Mapping[str, Buffer], settle: Settle) -> None:
        """Push without waiting; `settle` is called with the outcome."""
        self._arrivals.append(((message, blobs), settle))
        self._start()

    def connection(self) -> AsyncConnection:
        """A new connection for the caller's own use."""
        return AsyncConnection(self._url, answer=None, patience=self.patience)

    async def close(self) -> None:
        """Disconnect after all pending commands have been answered or refused."""
        if self._flushing is not None:
            await self._flushing
        self._connection.close()

    async def _queued(self, line: list[_Waiting], item: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        line.append((item, partial(settle, answer)))
        self._start()
        return await answer

    def _start(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        while self._arrivals or self._commands:
            messages, commands = self._take(self._arrivals), self._take(self._commands)
            pipeline = [command for command, _ in commands]
            if messages:
                pipeline += [
                    ("SET", blob_key(ref), content, "EX", KEPT)
                    for (_, blobs), _ in messages
                    for ref, content in blobs.items()
                ]
                pipeline.append(("LPUSH", ARRIVALS, *(message for (message, _), _ in messages)))
                pipeline += self._confirming
            try:
                answers = await self._patiently(pipeline)
            except (ServerError, OSError) as error:
                later = [*self._take(self._arrivals), *self._take(self._commands)]
                self._refuse([*commands, *messages, *later], str(error))
            else:
                for (_, tell), answer in zip(commands, answers, strict=False):
                    tell(_plainly(answer))
                pushed = self._pushed(answers[len(commands) :]) if messages else None
                for _, tell in messages:
                    tell(pushed)

    def _pushed(self, answers: Sequence[Any]) -> FleetUnavailable | None:
        """Why messages were not accepted; None if they were."""
        written = answers[: len(answers) - len(self._confirming)]
        refused = next((answer for answer in written if isinstance(answer, Exception)), None)
        if refused is not None:
            return refusal("broker", refused)
        try:
            check_confirmed(answers[len(written) :])
        except FleetUnavailable as error:
            return error
        return None

    @staticmethod
    def _take(line: list[_Waiting]) -> list[_Waiting]:
        taken = line[:_MOST_MESSAGES]
        del line[:_MOST_MESSAGES]
        return taken

    @staticmethod
    def _refuse(waiting: Sequence[_Waiting], why: str) -> None:
        for _, tell in waiting:
            tell(_plainly(ConnectionError(why)))

    async def _patiently(self, pipeline: Sequence[Sequence[Any]]) -> list[Any]:
        clock = asyncio.get_running_loop().time
        until, pause = clock() + self.patience, _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout_at(until):
                    return await self._connection.ask(pipeline)
            except OSError as error:
                if clock() + pause >= until:
                    raise ConnectionError(str(error) or f"no answer within {self.patience:g} s") from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)


def _plainly(answer: Any) -> Any:
    """The answer; a server's error becomes taxiway's."""
    return refusal("broker", answer) if isinstance(answer, Exception) else answer


_MOST = 256
"""Pieces per read."""

_WAIT = 5.0
"""Seconds for which the server blocks waiting for a piece."""

_PAUSE = 0.1
"""Seconds between two attempts to connect or to subscribe."""


class PieceReader:
    """One reader on its own connection, since each read blocks on the server until the next piece."""

    def __init__(self, link: ValkeyLink, job: str) -> None:
        self._connection = link.connection()
        self._patience = link.patience
        self._key = stream_key(job)

    async def read(self, after: str) -> list[tuple[str, Piece]]:
        """The pieces after an entry, each with its id; empty if none came in some seconds. Waits out an outage."""
        while True:
            try:
                return await self._ask(after)
            except (ServerError, OSError):
                await self.aclose()
                await asyncio.sleep(_PAUSE)

    async def aclose(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def _ask(self, after: str) -> list[tuple[str, Piece]]:
        wait = int(_WAIT * 1000)
        command = ("XREAD", "COUNT", _MOST, "BLOCK", wait, "STREAMS", self._key, after)
        async with asyncio.timeout(_WAIT + self._patience):
            streams = await self._connection.call(*command)
        entries = streams[0][1] if streams else []
        return [(entry.decode(), read_piece(dict(zip(flat[::2], flat[1::2], strict=True)))) for entry, flat in entries]


_PINGS = 3
"""Pings sent to a silent server within the link's `patience`."""

_LOOKS = 12
"""Checks per `patience` whether it has run out: a caller learns of it at most that fraction late."""

_MOST_KEYS = 256
"""Results per MGET."""

UNKNOWN_AFTER = PAUSE
"""Seconds for which a job without a record may still be in transit from another client."""


class _Addressed(msgspec.Struct):
    task_id: str


_read_address = msgspec.json.Decoder(_Addressed).decode


def _nothing() -> None:
    """The default `reconnected` callback: does nothing."""


class Replies:
    """Resolves a future for each job when its result is announced.

    A job is dropped when its future is garbage-collected. After each subscribe, the stored results of jobs that may
    have been announced earlier are read, so none is missed at the start or after a disconnection. Every `pause` seconds
    the stored results of waiting jobs are read again. For watched jobs the records are read too: a job may have ended
    so long ago that its result is gone, or may not exist. `reconnected` is called each time the client's channel is
    resubscribed.
    """

    def __init__(
        self, link: ValkeyLink, channel: str, *, pause: float = PAUSE, reconnected: Callable[[], None] = _nothing
    ) -> None:
        self._link = link
        self._reconnected = reconnected
        self._connection = link.connection()
        self._channel = channel
        self._pause = pause
        self._waiting: WeakValueDictionary[str, asyncio.Future[bytes]] = WeakValueDictionary()
        self._own: WeakValueDictionary[str, asyncio.Future[bytes]] = WeakValueDictionary()
        self._watched: Counter[str] = Counter()
        self._strange: dict[str, float] = {}  # jobs not submitted here: when each was first watched
        self._unsure: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._checking: asyncio.Task[None] | None = None
        self._owned: dict[asyncio.Future[bytes], float] = {}
        self._closed = False
        self._heard = 0.0
        self._subscribed = False
        self._away = False
        self._pinged = 0.0  # when the unanswered ping was sent; 0 = none is

    def expect(self, job: str) -> asyncio.Future[bytes]:
        """The future of the stored result of a job submitted here, announced on the client's own channel."""
        future = self._own[job] = self._future(job)
        return future

    def _future(self, job: str) -> asyncio.Future[bytes]:
        if not self._tasks:
            forever = (self._listen(), self._ping(), self._look())
            self._tasks = [asyncio.create_task(task) for task in forever]
        future = self._waiting.get(job)
        if future is None:
            future = self._waiting[job] = asyncio.get_running_loop().create_future()
        return future

    def expects(self, job: str) -> bool:
        """Whether a future exists for a job that was submitted here."""
        return job in self._own

    async def watch(self, job: str, timeout: float | None, *, submitted: bool = False) -> bytes:
        """The stored result of a job that another client may have submitted, announced on the job's own channel.

        Raises as `wait` does, and:
            ResultExpiredError: the job ended and its result has expired.
            UnknownJobError: it was not `submitted` here, and no router recorded it within `UNKNOWN_AFTER`.
        """
        started = asyncio.get_running_loop().time()
        if not submitted and not self.expects(job):
            self._strange.setdefault(job, started)
        future = self._future(job)
        self._watched[job] += 1
        try:
            self._connection.send(("SUBSCRIBE", result_key(job)))
            await self._look_once(future, job)
            return await self.wait(future, timeout, started)
        finally:
            self._watched[job] -= 1
            if not self._watched[job]:
                del self._watched[job]
                self._strange.pop(job, None)
                self._connection.send(("UNSUBSCRIBE", result_key(job)))

    async def wait(self, future: asyncio.Future[bytes], timeout: float | None, started: float | None = None) -> bytes:
        """The future's value; a failed wait leaves the future valid. `timeout` counts from `started`, or from now.

        Raises:
            ResultTimeoutError: `timeout` seconds passed.
            BrokerUnavailableError: the server was silent for the link's `patience` (without `timeout`), or is
                unavailable when `timeout` ends.
        """
        clock = asyncio.get_running_loop().time
        started = clock() if started is None else started
        while not future.done():
            until = started + timeout if timeout is not None else max(started, self._heard) + self._link.patience
            if clock() >= until:
                raise self._too_long(timeout)
            await asyncio.wait((future,), timeout=until - clock())
        if future.cancelled():
            raise RuntimeError("this client was closed while it waited")
        return future.result()

    async def own(self, future: asyncio.Future[bytes], timeout: float | None) -> bytes:
        """The value of a future with no other waiter; a wait that fails ends the future. Raises as `wait` does."""
        loop, timer = asyncio.get_running_loop(), None
        if timeout is None:
            self._owned[future] = loop.time()
        else:  # `asyncio.timeout` takes 2 µs more
            timer = loop.call_later(timeout, self._run_out, future, timeout)
        try:
            return await future
        except asyncio.CancelledError:
            if self._closed:
                raise RuntimeError("this client was closed while it waited") from None
            raise
        finally:
            self._owned.pop(future, None)
            if timer is not None:
                timer.cancel()

    async def close(self) -> None:
        """Stop listening."""
        self._closed = True
        tasks = [*self._tasks, *([self._checking] if self._checking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        for future in list(self._waiting.values()):
            future.cancel()

    def _run_out(self, future: asyncio.Future[bytes], timeout: float) -> None:
        settle(future, self._too_long(timeout))

    def _too_long(self, timeout: float | None) -> BrokerUnavailableError | ResultTimeoutError:
        if timeout is None or self._away:
            return BrokerUnavailableError("the broker does not answer; the job continues")
        return ResultTimeoutError(f"no result within {timeout:g} s; the job continues", timeout=timeout)

    async def _listen(self) -> None:
        while True:
            try:
                await self._read()
            except (ServerError, OSError):
                self._away = True
                await asyncio.sleep(_PAUSE)

    async def _read(self) -> None:
        """Read announcements until the connection is lost or given up, then raise."""
        await self._connection.connect()
        self._pinged, self._away = 0.0, False
        await self._connection.listen([("SUBSCRIBE", self._channel, *map(result_key, self._watched))], self._hear)

    def _hear(self, answer: Any) -> None:
        if isinstance(answer, Exception):  # the server's error reply
            self._connection.close(answer)
            return
        self._heard, self._pinged = asyncio.get_running_loop().time(), 0.0
        if answer[0] == b"message":
            self._resolve(answer[2])
        elif answer[0] == b"subscribe":
            self._check_again(answer[1].decode())

    def _resolve(self, meta: bytes) -> None:
        future = self._waiting.get(_read_address(meta).task_id)
        if future is not None and not future.done():
            future.set_result(meta)

    def _check_again(self, channel: str) -> None:
        mine = channel == self._channel
        if mine and self._subscribed:
            self._reconnected()
        self._subscribed |= mine
        self._check([job for job in list(self._waiting) if mine or result_key(job) == channel])

    async def _look(self) -> None:
        """Periodically read the stored results of jobs that have waited since the previous pass."""
        rounds = Rounds()
        while True:
            await asyncio.sleep(self._pause)
            self._check(rounds.take(self._waiting))

    async def _look_once(self, future: asyncio.Future[bytes], job: str) -> None:
        """Read a job's stored result once, however short the caller's timeout, for up to the link's `patience`."""
        self._check([job])
        while not future.done() and self._checking is not None and not self._checking.done():
            await asyncio.wait((self._checking, future), return_when=asyncio.FIRST_COMPLETED)

    def _check(self, jobs: Sequence[str]) -> None:
        """Add these jobs to those whose stored results are being read."""
        self._unsure.update(jobs)
        if self._unsure and (self._checking is None or self._checking.done()):
            self._checking = asyncio.create_task(self._read_stored())

    async def _read_stored(self) -> None:
        while self._unsure:
            jobs = [self._unsure.pop() for _ in range(min(_MOST_KEYS, len(self._unsure)))]
            try:
                stored = await self._link.call("MGET", *map(result_key, jobs))
                for meta in filter(None, stored):
                    self._resolve(meta)
                watched = [job for job, meta in zip(jobs, stored, strict=True) if meta is None and job in self._watched]
                await asyncio.gather(*map(self._look_into, watched))
            except BrokerUnavailableError:
                self._connection.close()  # the next subscription checks again
                return

    async def _look_into(self, job: str) -> None:
        """Fail the wait for a job whose result has expired, or that is unknown."""
        # One pipeline, in this order: a final state is written together with the result. If the state is final and the
        # result is missing, the result has expired.
        state, meta = await asyncio.gather(
            self._link.call("HGET", job_key(job), "state"), self._link.call("GET", result_key(job))
        )
        future, now = self._waiting.get(job), asyncio.get_running_loop().time()
        if meta is not None:
            self._resolve(meta)
        elif future is None:
            return
        elif state is not None and state.decode() in FINAL:
            settle(future, expired(job))
        elif state is None and now - self._strange.get(job, now) >= UNKNOWN_AFTER:
            settle(future, unknown(job))

    async def _ping(self) -> None:
        """Ping a silent server while calls wait, and drop the connection if it does not answer."""
        clock = asyncio.get_running_loop().time
        step = self._link.patience / _PINGS
        while True:
            await asyncio.sleep(self._link.patience / _LOOKS)
            now = clock()
            for future, started in list(self._owned.items()):
                if now >= max(started, self._heard) + self._link.patience:
                    settle(future, self._too_long(None))
            if not self._connection.connected or not len(self._waiting):
                continue
            if not self._pinged and now - self._heard >= step:
                self._pinged = now
                self._connection.send(("PING",))
            elif self._pinged and now - self._pinged >= self._link.patience - step:
                self._connection.close()
