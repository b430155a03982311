"""The one subscription on which a client hears all its results."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from weakref import WeakValueDictionary

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from taxiway.client.valkey_link import AWAY, ValkeyLink
from taxiway.errors import BrokerUnavailableError, ResultTimeoutError
from taxiway.keys import result_key

_PINGS = 3
"""A silent server is asked for a sign of life this many times within the link's patience."""

_PAUSE = 0.1
"""Seconds between two attempts to subscribe."""

_MOST_KEYS = 256
"""Results read by one MGET."""


class _Addressed(msgspec.Struct):
    task_id: str


_read_address = msgspec.json.Decoder(_Addressed).decode


class Replies:
    """Resolves a future for each job when its result is announced.

    A job that nobody holds a future of any more is forgotten. Whenever a channel is subscribed, the stored results of
    the jobs that might have been announced before are read: so nothing is missed, at the start or after a cut.
    """

    def __init__(self, link: ValkeyLink, channel: str) -> None:
        self._link = link
        self._channel = channel
        self._waiting: WeakValueDictionary[str, asyncio.Future[bytes]] = WeakValueDictionary()
        self._watched: Counter[str] = Counter()
        self._unsure: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._checking: asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None
        self._heard = 0.0
        self._away = False
        self._pinged = 0.0  # when the unanswered ping was sent; 0 = none is
        self._limit: asyncio.Timeout | None = None

    def expect(self, job: str) -> asyncio.Future[bytes]:
        """The future of a job's stored result, announced on the client's own channel."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._ping())]
        future = self._waiting.get(job)
        if future is None:
            future = self._waiting[job] = asyncio.get_running_loop().create_future()
        return future

    async def watch(self, job: str, timeout: float | None) -> bytes:
        """The stored result of a job that another client submitted, heard on the job's own channel.

        Raises as `wait` does.
        """
        future = self.expect(job)
        self._watched[job] += 1
        try:
            await self._send("SUBSCRIBE", result_key(job))
            return await self.wait(future, timeout)
        finally:
            self._watched[job] -= 1
            if not self._watched[job]:
                del self._watched[job]
                await self._send("UNSUBSCRIBE", result_key(job))

    async def wait(self, future: asyncio.Future[bytes], timeout: float | None) -> bytes:
        """The future's value; the future stays good when this gives up.

        Raises:
            ResultTimeoutError: `timeout` seconds passed.
            BrokerUnavailableError: the server was silent for the link's patience (without `timeout`), or is away when
                `timeout` ends.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        while not future.done():
            until = started + timeout if timeout is not None else max(started, self._heard) + self._link.patience
            if clock() >= until:
                raise self._too_long(timeout)
            await asyncio.wait((future,), timeout=until - clock())
        if future.cancelled():
            raise RuntimeError("this client was closed while it waited")
        return future.result()

    async def close(self) -> None:
        """Stop listening."""
        tasks = [*self._tasks, *([self._checking] if self._checking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        for future in list(self._waiting.values()):
            future.cancel()

    def _too_long(self, timeout: float | None) -> BrokerUnavailableError | ResultTimeoutError:
        if timeout is None or self._away:
            return BrokerUnavailableError("the broker does not answer; the job goes on where it is")
        return ResultTimeoutError(f"no result within {timeout:g} s; the job goes on", timeout=timeout)

    async def _listen(self) -> None:
        while True:
            try:
                connection = await self._link.dial()
                try:
                    await self._read(connection)
                finally:
                    self._connection = None
                    await connection.disconnect(nowait=True)
            except (*AWAY, RedisError):
                self._away = True
                await asyncio.sleep(_PAUSE)

    async def _read(self, connection: AbstractConnection) -> None:
        """Hear until the connection is lost, or `_limit` is brought forward; raises one of `AWAY`."""
        channels = [self._channel, *(result_key(job) for job in self._watched)]
        await connection.send_command("SUBSCRIBE", *channels)
        self._connection, self._pinged, self._away = connection, 0.0, False
        async with asyncio.timeout(None) as self._limit:
            while True:
                kind, *rest = await connection.read_response()
                self._heard, self._pinged = asyncio.get_running_loop().time(), 0.0
                if kind == b"message":
                    self._resolve(rest[1])
                elif kind == b"subscribe":
                    self._check_again(rest[0].decode())

    def _resolve(self, meta: bytes) -> None:
        future = self._waiting.get(_read_address(meta).task_id)
        if future is not None and not future.done():
            future.set_result(meta)

    def _check_again(self, channel: str) -> None:
        mine = channel == self._channel
        self._unsure.update(job for job in list(self._waiting) if mine or result_key(job) == channel)
        if self._unsure and (self._checking is None or self._checking.done()):
            self._checking = asyncio.create_task(self._read_stored())

    async def _read_stored(self) -> None:
        while self._unsure:
            jobs = [self._unsure.pop() for _ in range(min(_MOST_KEYS, len(self._unsure)))]
            try:
                stored = await self._link.call("MGET", *map(result_key, jobs))
            except BrokerUnavailableError:
                self._give_up()  # the next subscription checks again
                return
            for meta in filter(None, stored):
                self._resolve(meta)

    async def _ping(self) -> None:
        """Ask a silent server for a sign of life while anybody waits, and give the connection up when none comes."""
        clock = asyncio.get_running_loop().time
        step = self._link.patience / _PINGS
        while True:
            await asyncio.sleep(step)
            if self._connection is None or not len(self._waiting):
                continue
            if not self._pinged and clock() - self._heard >= step:
                self._pinged = clock()
                await self._send("PING")
            elif self._pinged and clock() - self._pinged >= self._link.patience - step:
                self._give_up()

    def _give_up(self) -> None:
        if self._connection is not None and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def _send(self, *command: str) -> None:
        """Send on the subscription; without a connection there is nothing to do, for the next one subscribes to all."""
        if self._connection is not None:
            with contextlib.suppress(*AWAY):
                await self._connection.send_command(*command, check_health=False)
