"""A client's commands to a Valkey or Redis server: pipelined on one connection, and retried during outages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from taxiway.backoff import Backoff
from taxiway.connection import AsyncConnection, settle
from taxiway.contract.keys import ARRIVALS, blob_key
from taxiway.contract.limits import Buffer
from taxiway.contract.values import BLOB_KEPT
from taxiway.contract.wire import check_confirmed, confirming, refusal
from taxiway.errors import FleetUnavailable, invalid
from taxiway.valkey import Command, ServerError, stored

_MOST_MESSAGES = 512
"""Arrivals per LPUSH: small enough not to delay the server's other clients (about 0.3 ms)."""

_BACKOFF = Backoff(0.02, 0.5)  # before reconnecting

_CONFIRMED_WITHIN = 0.8
"""Fraction of a call's `connect_timeout` within which a replica must confirm."""

_NO_BLOBS: Mapping[str, Buffer] = {}

Settle = Callable[[Any], None]
"""Called with a command's answer or its error."""

_Waiting = tuple[Any, Settle]


class ValkeyLink:
    """Commands to one server. Commands issued while a pipeline is in flight are sent together in the next one."""

    def __init__(self, url: str, connect_timeout: float, confirmed_by: int = 0) -> None:
        try:
            self._connection = AsyncConnection(url, answer=None, connect_timeout=connect_timeout)
        except ValueError:  # its text may quote part of a password
            wanted = "redis://NAME:PASSWORD@HOST:PORT/DATABASE, with / and # in a password as %2F and %23"
            raise invalid("url", wanted) from None
        self._url = url
        self.connect_timeout = connect_timeout
        self._confirmed_by = confirmed_by  # replicas
        self._confirming = confirming(confirmed_by, connect_timeout * _CONFIRMED_WITHIN)
        self._arrivals: list[_Waiting] = []
        self._commands: list[_Waiting] = []
        self._flushing: asyncio.Task[None] | None = None

    async def call(self, *command: str | bytes | int) -> Any:
        """The server's answer to one command.

        Raises:
            BrokerUnavailableError: the server does not answer, or refuses.
        """
        return await self._queued(self._commands, command)

    async def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands that are sent together. Raises as `call` does."""
        return await asyncio.gather(*(self.call(*command) for command in commands))

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
        return AsyncConnection(self._url, answer=None, connect_timeout=self.connect_timeout)

    async def close(self) -> None:
        """Disconnect after all pending commands have been answered or refused."""
        if self._flushing is not None:
            await self._flushing
        self._connection.close()

    async def _queued(self, queue: list[_Waiting], item: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue.append((item, partial(settle, answer)))
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
                blobs = chain.from_iterable(blobs.items() for (_, blobs), _ in messages)
                pipeline += chain.from_iterable(stored(blob_key(ref), content, BLOB_KEPT) for ref, content in blobs)
                pipeline.append(("LPUSH", ARRIVALS, *(message for (message, _), _ in messages)))
                pipeline += self._confirming
            try:
                answers = await self._with_retries(pipeline)
            except (ServerError, OSError) as error:
                later = [*self._take(self._arrivals), *self._take(self._commands)]
                for _, settle in (*commands, *messages, *later):
                    settle(refusal("state store", error))
            else:
                for (_, settle), answer in zip(commands, answers, strict=False):
                    settle(refusal("state store", answer) if isinstance(answer, Exception) else answer)
                pushed = self._pushed(answers[len(commands) :]) if messages else None
                for _, settle in messages:
                    settle(pushed)

    def _pushed(self, answers: Sequence[Any]) -> FleetUnavailable | None:
        """Why messages were not accepted; None if they were."""
        written = answers[: len(answers) - len(self._confirming)]
        refused = next((answer for answer in written if isinstance(answer, Exception)), None)
        if refused is not None:
            return refusal("state store", refused)
        try:
            check_confirmed(answers[len(written) :], self._confirmed_by)
        except FleetUnavailable as error:
            return error
        return None

    @staticmethod
    def _take(queue: list[_Waiting]) -> list[_Waiting]:
        taken = queue[:_MOST_MESSAGES]
        del queue[:_MOST_MESSAGES]
        return taken

    async def _with_retries(self, pipeline: Sequence[Sequence[Any]]) -> list[Any]:
        clock = asyncio.get_running_loop().time
        until, failures = clock() + self.connect_timeout, 0
        while True:
            try:
                async with asyncio.timeout_at(until):
                    return await self._connection.ask(pipeline)
            except OSError as error:
                failures += 1
                pause = _BACKOFF.pause(failures)
                if clock() + pause >= until:
                    raise ConnectionError(str(error) or f"no answer within {self.connect_timeout:g} s") from error
            await asyncio.sleep(pause)
