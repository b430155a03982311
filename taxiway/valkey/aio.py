"""The asyncio connection: for any number of callers, with answers parsed in C, many per iteration of the event loop.

redis-py switches coroutines for each answer, which takes 8 µs, and as long again per call. A large value is not copied:
it is sent from its own memory, and read into memory of its own.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from taxiway.contract.values import Buffer
from taxiway.valkey import (
    Address,
    Answers,
    Command,
    Place,
    Script,
    ServerError,
    checked,
    is_away,
    is_unknown_script,
    parse,
    pieces,
)

ANSWER = 1.5
"""Seconds within which a server must answer: a caller is told within two."""

Hear = Callable[[Any], None]
"""Is told an answer."""


class Connection:
    """One connection, opened with the first call and, after a failure, with the next one.

    Callers share it, and each gets its own answers; what one sends together is sent at once. It is given up once the
    server has said nothing for `answer` seconds to those who wait; where that is None, because commands block, when a
    caller no longer waits. `patience` is for connecting, with passwords and TLS. Raises `OSError` and `ServerError`.
    """

    def __init__(self, url: str, *, answer: float | None = ANSWER, patience: float = ANSWER) -> None:
        self._address = parse(url)
        self._answer = answer
        self._patience = patience
        self._wire: _Wire | None = None
        self._opening: asyncio.Task[_Wire] | None = None

    @property
    def connected(self) -> bool:
        """Whether it has a connection that has not ended."""
        return self._wire is not None and not self._wire.ended

    async def connect(self) -> None:
        """Connect, where it is not connected."""
        await self._connected()

    async def call(self, *command: Any) -> Any:
        """The server's answer to a command."""
        return (await self.calls(command))[0]

    async def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands that are sent together, as RESP 2 has them. Raises the first error among them."""
        return checked(await self.ask(commands))

    async def transaction(self, *commands: Command) -> list[Any]:
        """The answers to commands that the server runs at one instant."""
        return checked((await self.calls(("MULTI",), *commands, ("EXEC",)))[-1])

    async def run(self, script: Script) -> Any:
        """The answer of a script."""
        try:
            return await self.call(*script.command)
        except ServerError as error:
            if not is_unknown_script(error):
                raise
        return (await self.calls(("SCRIPT", "LOAD", script.text), script.command))[1]

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands that are sent together, in order; an error of the server's as a value."""
        if not commands:
            return []
        wire = await self._connected()
        try:
            return await wire.ask(commands)
        except asyncio.CancelledError:
            if self._answer is None:
                wire.end(ConnectionError("closed"))  # what blocks there would go on
            raise

    async def listen(self, commands: Sequence[Command], hear: Hear) -> None:
        """Send commands, and give `hear` all that comes until the connection ends; why it ended is raised."""
        wire = await self._connected()
        try:
            await wire.listen(commands, hear)
        finally:
            wire.end(ConnectionError("closed"))

    def send(self, *commands: Command) -> None:
        """Send commands whose answers are heard by who listens; nothing where there is no connection."""
        if self._wire is not None:
            self._wire.send(commands)

    def close(self, error: Exception | None = None) -> None:
        """Disconnect; who still asks or listens is told `error`."""
        if self._opening is not None:
            self._opening.cancel()
        if self._wire is not None:
            self._wire.end(error or ConnectionError("closed"))
            self._wire = None

    async def _connected(self) -> _Wire:
        if self._wire is not None and not self._wire.ended:
            return self._wire
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(_heed)
        wire = await asyncio.shield(self._opening)
        if wire.ended:  # since it was opened
            raise ConnectionError("closed")
        return wire

    async def _open(self) -> _Wire:
        places = self._address.places
        failed: Exception = OSError()
        for place in places:
            try:
                async with asyncio.timeout(self._patience / len(places)):
                    self._wire = await self._reach(place)  # here: who asked may have been cancelled
                    return self._wire
            except (OSError, ServerError) as error:
                failed = error if str(error) else TimeoutError(f"no connection within {self._patience:g} s")
        raise failed

    async def _reach(self, place: Place) -> _Wire:
        """A connection to the server at this place, or to the one that the sentinel there names."""
        address = self._address
        if not address.service:
            return await _open(address, place, self._answer)
        sentinel = await _open(address.sentinel(place), place, None)
        try:
            (named,) = checked(await sentinel.ask([address.question]))
        finally:
            sentinel.end(ConnectionError("closed"))
        return await _open(address, address.named(named), self._answer)


class _Asked:
    """Commands that were sent together, and those of their answers that came."""

    __slots__ = ("answers", "count", "future", "since")

    def __init__(self, count: int, future: asyncio.Future[list[Any]], since: float) -> None:
        self.count, self.future, self.since = count, future, since
        self.answers: list[Any] = []


class _Wire(asyncio.BufferedProtocol):
    """A connection from its begin to its end."""

    def __init__(self, answer: float | None) -> None:
        self._answer = answer
        self._answers = Answers()
        self._asked: deque[_Asked] = deque()
        self._hear: Hear | None = None
        self._over: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self.ended = False

    def ask(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """The answers to commands, once all have come."""
        sent = [*pieces(commands)]  # first, for one that cannot be encoded has no answer
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        self._asked.append(_Asked(len(commands), future, self._loop.time()))
        if self._watch is None and self._answer is not None:
            self._watch = self._loop.call_later(self._answer, self._look)
        self._write(sent)
        return future

    def listen(self, commands: Sequence[Command], hear: Hear) -> asyncio.Future[None]:
        """Ends with the connection; until then `hear` is told all that comes."""
        self._hear, self._over = hear, self._loop.create_future()
        self.send(commands)
        return self._over

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands."""
        self._write([*pieces(commands)])

    def end(self, error: Exception) -> None:
        """Close the connection, and tell `error` to those who wait."""
        if self.ended:
            return
        self.ended = True
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        for asked in self._asked:
            settle(asked.future, error)
        if self._over is not None:
            settle(self._over, error)

    def connection_made(self, transport: Any) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of `asyncio.BufferedProtocol`."""
        return self._answers.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Part of `asyncio.BufferedProtocol`."""
        self._heard = self._loop.time()
        try:
            for answer in self._answers.received(nbytes):
                self._receive(answer)
        except ConnectionError as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self.end(ConnectionError(str(error or "closed by the server")))

    def _write(self, sent: Sequence[Buffer]) -> None:
        if not self._transport.is_closing():  # `connection_lost` tells of it
            for piece in sent:
                self._transport.write(piece)

    def _receive(self, answer: Any) -> None:
        if self.ended:
            return
        if is_away(answer):
            raise ConnectionError(str(answer))
        if self._hear is not None:
            self._hear(answer)
        elif self._asked:
            asked = self._asked[0]
            asked.answers.append(answer)
            if len(asked.answers) == asked.count:
                self._asked.popleft()
                settle(asked.future, asked.answers)

    def _look(self) -> None:
        """Give the connection up where who waits has heard nothing for too long."""
        self._watch = None
        if not self._asked or self._answer is None:
            return
        silent = self._loop.time() - max(self._asked[0].since, self._heard)
        if silent >= self._answer:
            self.end(TimeoutError(f"no answer within {self._answer:g} s"))
        else:
            self._watch = self._loop.call_later(self._answer - silent, self._look)


async def _open(address: Address, place: Place, answer: float | None) -> _Wire:
    loop = asyncio.get_running_loop()
    wire: _Wire
    if isinstance(place, str):
        _, wire = await loop.create_unix_connection(lambda: _Wire(answer), place)
    else:
        _, wire = await loop.create_connection(lambda: _Wire(answer), *place, ssl=address.context())
    try:
        address.check_greeting(await wire.ask(address.greeting) if address.greeting else [])
    except BaseException:
        wire.end(ConnectionError("closed"))
        raise
    return wire


def _heed(opening: asyncio.Task[Any]) -> None:
    """Retrieve the exception of a call whose caller is gone."""
    if not opening.cancelled():
        opening.exception()


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Give a future its value, or its exception, if it still waits for one."""
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
