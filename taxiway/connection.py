"""A connection to Valkey or Redis: for any number of callers on an event loop, or blocking, one for a thread.

On the event loop, answers are parsed in C, many per iteration; redis-py switches coroutines for each answer, which
takes 8 µs, and as long again per call. A large value is not copied: it is sent from its own memory, and read into
memory of its own.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from taxiway.contract.limits import Buffer
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


class AsyncConnection:
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
        opening = self._opening
        try:
            wire = await asyncio.shield(opening)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if opening.cancelled() and task is not None and not task.cancelling():  # by `close`, not the caller
                raise ConnectionError("closed") from None
            raise
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


BLOCKING_ANSWER = 5.0
"""Seconds within which a server must answer a worker: scripts over a whole batch of large results take some."""


class Connection:
    """One connection, for one thread at a time; opened with the first call, and reopened after it was lost or a fork.

    Raises `OSError` and `ServerError`.
    """

    def __init__(self, where: str | Address, *, answer: float = BLOCKING_ANSWER) -> None:
        self._socket: socket.socket | None = None
        self._address = parse(where) if isinstance(where, str) else where
        self._answer = answer
        self._answers = Answers()
        self._came: deque[Any] = deque()
        self._process = 0

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor that says when an answer has begun to come; -1 where it is not connected."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def connected(self) -> bool:
        """Whether it has a connection, which may have ended by now."""
        return self._socket is not None

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The server's answers to commands that are sent together, in order; an error of the server's as a value."""
        self.send(commands)
        return self.read(len(commands))

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands whose answers are read later."""
        sock = self._ready()
        try:
            _bound(sock, self._answer)
            for piece in pieces(commands):
                sock.sendall(piece)
        except BaseException:
            self.close()
            raise

    def read(self, count: int) -> list[Any]:
        """The next answers."""
        try:
            while len(self._came) < count:
                self._receive(self._answer)
        except BaseException:
            self.close()  # what is still to come would be taken for another answer
            raise
        answers = [self._came.popleft() for _ in range(count)]
        for answer in answers:
            if is_away(answer):
                self.close()
                raise ConnectionError(str(answer))
        return answers

    def hear(self, longest: float) -> Any:
        """The next message of a subscription, None where none comes for so many seconds."""
        try:
            if not self._came:
                self._receive(longest)
        except TimeoutError:
            return None
        except BaseException:
            self.close()
            raise
        return self._came.popleft() if self._came else None

    def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._answers = None, Answers()
        self._came.clear()

    def _ready(self) -> socket.socket:
        """The connected socket; reconnects if the server closed it, or if it belongs to the parent process."""
        if self._socket is not None and (self._process != os.getpid() or _speaks(self._socket)):
            self.close()
        if self._socket is None:
            self._process = os.getpid()
            self._open()
        assert self._socket is not None
        return self._socket

    def _open(self) -> None:
        places = self._address.places
        failed: Exception = OSError()
        for place in places:
            try:
                self._reach(place, self._answer / len(places))
                return
            except BaseException as error:
                self.close()
                if not isinstance(error, (OSError, ServerError)):
                    raise
                failed = error
        raise failed

    def _reach(self, place: Place, patience: float) -> None:
        """Connect to the server at this place, or to the one that the sentinel there names."""
        address = self._address
        if address.service:
            sentinel = Connection(address.sentinel(place), answer=patience)
            try:
                (named,) = checked(sentinel.ask([address.question]))
            finally:
                sentinel.close()
            place = address.named(named)
        self._socket = _reach(address, place, patience)
        if address.greeting:
            self._socket.sendall(b"".join(pieces(address.greeting)))
            address.check_greeting(self.read(len(address.greeting)))

    def _receive(self, longest: float) -> None:
        assert self._socket is not None
        _bound(self._socket, max(longest, 0.001))
        count = self._socket.recv_into(self._answers.buffer())
        if not count:
            raise ConnectionError("closed by the server")
        self._came.extend(self._answers.received(count))


class ConnectionPool:
    """As many connections as threads call at the same time. Raises `OSError` and `ServerError`."""

    def __init__(self, url: str, *, answer: float = BLOCKING_ANSWER) -> None:
        self._url = url
        self._answer = answer
        self._free: deque[Connection] = deque()

    @contextmanager
    def one(self) -> Iterator[Connection]:
        """A connection for the caller alone."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = Connection(self._url, answer=self._answer)
        try:
            yield connection
        finally:
            self._free.append(connection)

    def call(self, *command: Any) -> Any:
        """The server's answer to a command."""
        return self.calls(command)[0]

    def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands that are sent together, as RESP 2 has them. Raises the first error among them."""
        return checked(self.ask(commands))

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands that are sent together, in order; an error of the server's as a value."""
        with self.one() as connection:
            return connection.ask(commands)

    def run(self, script: Script) -> Any:
        """The answer of a script."""
        try:
            return self.call(*script.command)
        except ServerError as error:
            if not is_unknown_script(error):
                raise
        return self.calls(("SCRIPT", "LOAD", script.text), script.command)[1]

    def close(self) -> None:
        """Disconnect."""
        while self._free:
            self._free.pop().close()


def _reach(address: Address, place: Place, patience: float) -> socket.socket:
    """A connection that has said nothing yet."""
    if isinstance(place, str):
        sock = socket.socket(socket.AF_UNIX)
        _bound(sock, patience)
        try:
            sock.connect(place)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(place, patience)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    context = address.context()
    return sock if context is None else context.wrap_socket(sock, server_hostname=place[0])


def _bound(sock: socket.socket, seconds: float) -> None:
    """Bound each call's time; saying it again would cost a call of the system's."""
    if sock.gettimeout() != seconds:
        sock.settimeout(seconds)


def _speaks(sock: socket.socket) -> bool:
    """Whether the server says something unasked: mostly, that it ended the connection."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))
