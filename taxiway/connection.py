"""Connections to Valkey or Redis: one for asyncio, shared by any number of callers, and a blocking one for a thread.

On the event loop, answers are parsed in C, many per iteration, where redis-py switches coroutines for each answer. A
large value is not copied: it is sent from its own memory, and read into memory of its own.

redis-py 8.1 with hiredis in this module's place cost 1.13 times the processor time of a W0 item and of an idle round
trip, which took 1.18 times as long (medians of 18 alternating rounds on two busy cores, 30 November 2026): client and
router took 1.20 to 1.26 times theirs. The worker's blocking connections took only 1.07 times theirs; they are kept for
large values: 8 MiB written and read back cost 16.6 ms instead of 2.3, and on the event loop 18.9 instead of 10.3.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from taxiway.contract.limits import Buffer
from taxiway.valkey import (
    Address,
    AnswerParser,
    Command,
    Place,
    Script,
    ServerError,
    checked,
    fleet_errors,
    is_unavailable,
    is_unknown_script,
    parse,
    pieces,
)

ANSWER_WITHIN = 1.5
"""Seconds within which a server must answer: a caller learns of an outage within two."""

CHECKS = 3
"""How often in that time it is checked whether the server has answered, or read more of a large command."""

OnAnswer = Callable[[Any], None]
"""Called with each answer."""


class AsyncConnection:
    """One connection, opened by the first call and reopened by the first call after a failure.

    Callers share it, and each gets its own answers; the commands of one call are sent in one write. The connection is
    closed once the server has neither answered nor read for `answer` seconds while a call waits. With `answer` None,
    for commands that block, it is closed when a waiting call is cancelled. `connect_timeout` covers passwords and TLS.
    Raises `OSError` and `ServerError`; with `server`, its name in messages, `FleetUnavailable` instead.
    """

    def __init__(
        self,
        url: str,
        *,
        server: str = "",
        answer: float | None = ANSWER_WITHIN,
        connect_timeout: float = ANSWER_WITHIN,
    ) -> None:
        self._address = parse(url)
        self._errors = fleet_errors(server)
        self._answer = answer
        self.connect_timeout = connect_timeout
        self._wire: _Wire | None = None
        self._opening: asyncio.Task[_Wire] | None = None

    @property
    def connected(self) -> bool:
        """Whether it is connected."""
        return self._wire is not None and not self._wire.ended

    async def connect(self) -> None:
        """Connect, unless connected."""
        await self._connected()

    async def call(self, *command: Any) -> Any:
        """The server's answer to a command."""
        return (await self.calls(command))[0]

    async def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands that are sent together, as RESP 2 has them. Raises the first error among them."""
        with self._errors:
            return checked(await self._ask(commands))

    async def transaction(self, *commands: Command) -> list[Any]:
        """The answers to commands that the server runs atomically."""
        with self._errors:
            return checked(checked(await self._ask((("MULTI",), *commands, ("EXEC",))))[-1])

    async def run(self, script: Script) -> Any:
        """The answer of a script."""
        answers = await self.ask([script.command])
        if is_unknown_script(answers[0]):
            answers = await self.ask([("SCRIPT", "LOAD", script.text), script.command])
        with self._errors:
            return checked(answers)[-1]

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands that are sent together, in order; an error from the server is a value."""
        with self._errors:
            return await self._ask(commands)

    async def listen(self, commands: Sequence[Command], on_answer: OnAnswer) -> None:
        """Send commands, and call `on_answer` with each answer until the connection ends; raises why it ended."""
        wire = await self._connected()
        try:
            await wire.listen(commands, on_answer)
        finally:
            wire.end(ConnectionError("closed"))

    def send(self, *commands: Command) -> None:
        """Send commands whose answers `listen` receives; does nothing without a connection."""
        if self._wire is not None:
            self._wire.send(commands)

    def close(self, error: Exception | None = None) -> None:
        """Disconnect; pending calls and `listen` raise `error`."""
        if self._opening is not None:
            self._opening.cancel()
        if self._wire is not None:
            self._wire.end(error or ConnectionError("closed"))
            self._wire = None

    async def _ask(self, commands: Sequence[Command]) -> list[Any]:
        if not commands:
            return []
        wire = await self._connected()
        try:
            return await wire.ask(commands)
        except asyncio.CancelledError:
            if self._answer is None:
                wire.end(ConnectionError("closed"))  # else the command would go on blocking
            raise

    async def _connected(self) -> _Wire:
        if self._wire is not None and not self._wire.ended:
            return self._wire
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())
            # Marks an exception as retrieved, for when no caller waits any more
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
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
                async with asyncio.timeout(self.connect_timeout / len(places)):
                    self._wire = await self._reach(place)  # set here, because the caller may have been cancelled
                    return self._wire
            except (OSError, ServerError) as error:
                failed = error if str(error) else TimeoutError(f"no connection within {self.connect_timeout:g} s")
        raise failed

    async def _reach(self, place: Place) -> _Wire:
        """A connection to the server at this place, or to the one that the sentinel there names."""
        address = self._address
        if not address.service:
            return await _open(address, place, self._answer)
        sentinel = await _open(address.sentinel(place), place, None)
        try:
            (answered,) = checked(await sentinel.ask([address.question]))
        finally:
            sentinel.end(ConnectionError("closed"))
        return await _open(address, address.primary_of(answered), self._answer)


class _Pipeline:
    """Commands that were sent together, and the answers received so far."""

    __slots__ = ("answers", "count", "future", "sent_at")

    def __init__(self, count: int, future: asyncio.Future[list[Any]], sent_at: float) -> None:
        self.count, self.future, self.sent_at = count, future, sent_at
        self.answers: list[Any] = []


class _Wire(asyncio.BufferedProtocol):
    """One connection, from opening to close."""

    def __init__(self, answer: float | None) -> None:
        self._answer = answer
        self._answers = AnswerParser()
        self._pipelines: deque[_Pipeline] = deque()
        self._on_answer: OnAnswer | None = None
        self._listening_ended: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._last_progress = 0.0
        self._unsent = 0  # bytes, at the last check
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when the next check is due
        self.ended = False

    def ask(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """The answers to commands, once all have been received."""
        sent = [*pieces(commands)]  # first: a command that cannot be encoded gets no answer
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        self._pipelines.append(_Pipeline(len(commands), future, self._loop.time()))
        if self._timer is None and self._answer is not None:
            self._check_later(self._answer / CHECKS)
        self._write(sent)
        return future

    def listen(self, commands: Sequence[Command], on_answer: OnAnswer) -> asyncio.Future[None]:
        """Ends with the connection; until then `on_answer` is called with each answer."""
        self._on_answer, self._listening_ended = on_answer, self._loop.create_future()
        self.send(commands)
        return self._listening_ended

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands."""
        self._write([*pieces(commands)])

    def end(self, error: Exception) -> None:
        """Close the connection, and raise `error` in all that wait."""
        if self.ended:
            return
        self.ended = True
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        for pipeline in self._pipelines:
            settle(pipeline.future, error)
        if self._listening_ended is not None:
            settle(self._listening_ended, error)

    def connection_made(self, transport: Any) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of `asyncio.BufferedProtocol`."""
        return self._answers.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Part of `asyncio.BufferedProtocol`."""
        self._last_progress = self._loop.time()
        try:
            for answer in self._answers.received(nbytes):
                self._receive(answer)
        except ConnectionError as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self.end(ConnectionError(str(error or "closed by the server")))

    def _write(self, sent: Sequence[Buffer]) -> None:
        if not self._transport.is_closing():  # `connection_lost` reports it
            for piece in sent:
                self._transport.write(piece)

    def _receive(self, answer: Any) -> None:
        if self.ended:
            return
        if is_unavailable(answer):
            raise ConnectionError(str(answer))
        if self._on_answer is not None:
            self._on_answer(answer)
        elif self._pipelines:
            pipeline = self._pipelines[0]
            pipeline.answers.append(answer)
            if len(pipeline.answers) == pipeline.count:
                self._pipelines.popleft()
                settle(pipeline.future, pipeline.answers)

    def _check_silence(self) -> None:
        """Close the connection if the server has been silent for too long while a call waits.

        Time for which the event loop stood still, by which this check is late, does not count.
        """
        self._timer = None
        if not self._pipelines or self._answer is None:
            self._unsent = 0
            return
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._last_progress = now
        self._unsent = unsent
        silent_since = max(self._pipelines[0].sent_at, self._last_progress) + max(now - self._due, 0.0)
        left = self._answer - (now - silent_since)
        if left <= 0:
            self.end(TimeoutError(f"no answer within {self._answer:g} s"))
        else:
            self._last_progress = min(silent_since, now)
            self._check_later(min(left, self._answer / CHECKS))

    def _check_later(self, pause: float) -> None:
        self._due = self._loop.time() + pause
        self._timer = self._loop.call_at(self._due, self._check_silence)


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


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Set a future's value or exception, unless it is done."""
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
        future.exception()  # avoids asyncio's warning if nothing awaits it
    else:
        future.set_result(answer)


BLOCKING_ANSWER = 5.0
"""Seconds within which a server must answer a worker: scripts on a whole batch of large results take a while."""


class Connection:
    """One connection, for one thread at a time; opened by the first call, and reopened after a failure or a fork.

    Raises `OSError` and `ServerError`.
    """

    def __init__(self, where: str | Address, *, answer: float = BLOCKING_ANSWER) -> None:
        self._socket: socket.socket | None = None
        self._answers = AnswerParser()
        self._received: deque[Any] = deque()
        self._address = parse(where) if isinstance(where, str) else where  # if it raises, `close` has all that it needs
        self._answer = answer
        self._process = 0

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, readable once an answer begins to arrive; -1 if not connected."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def connected(self) -> bool:
        """Whether it was connected; the server may have closed the connection since."""
        return self._socket is not None

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The server's answers to commands that are sent together, in order; an error from the server is a value."""
        self.send(commands)
        return self.read(len(commands))

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands whose answers are read later."""
        sock = self._ready()
        try:
            _set_timeout(sock, self._answer)
            for piece in pieces(commands):
                sock.sendall(piece)
        except BaseException:
            self.close()
            raise

    def read(self, count: int) -> list[Any]:
        """The next answers."""
        try:
            while len(self._received) < count:
                self._receive(self._answer)
        except BaseException:
            self.close()  # the remaining answers would be taken for those of the next call
            raise
        answers = [self._received.popleft() for _ in range(count)]
        for answer in answers:
            if is_unavailable(answer):
                self.close()
                raise ConnectionError(str(answer))
        return answers

    def next_message(self, timeout: float) -> Any:
        """The next message of a subscription; None if none arrives within `timeout` seconds."""
        try:
            if not self._received:
                self._receive(timeout)
        except TimeoutError:
            return None
        except BaseException:
            self.close()
            raise
        return self._received.popleft() if self._received else None

    def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._answers = None, AnswerParser()
        self._received.clear()

    def _ready(self) -> socket.socket:
        """The connected socket; reconnects if the server closed it, or if it belongs to the parent process."""
        if self._socket is not None and (self._process != os.getpid() or _is_readable(self._socket)):
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

    def _reach(self, place: Place, connect_timeout: float) -> None:
        """Connect to the server at this place, or to the one that the sentinel there names."""
        address = self._address
        if address.service:
            sentinel = Connection(address.sentinel(place), answer=connect_timeout)
            try:
                (answered,) = checked(sentinel.ask([address.question]))
            finally:
                sentinel.close()
            place = address.primary_of(answered)
        self._socket = _reach(address, place, connect_timeout)
        if address.greeting:
            self._socket.sendall(b"".join(pieces(address.greeting)))
            address.check_greeting(self.read(len(address.greeting)))

    def _receive(self, timeout: float) -> None:
        assert self._socket is not None
        _set_timeout(self._socket, max(timeout, 0.001))
        count = self._socket.recv_into(self._answers.buffer())
        if not count:
            raise ConnectionError("closed by the server")
        self._received.extend(self._answers.received(count))


class ConnectionPool:
    """As many connections as threads call at once. Raises what `AsyncConnection` does."""

    def __init__(self, url: str, *, server: str = "", answer: float = BLOCKING_ANSWER) -> None:
        self._url = url
        self._errors = fleet_errors(server)
        self._answer = answer
        self._free: deque[Connection] = deque()

    def call(self, *command: Any) -> Any:
        """The server's answer to a command."""
        return self.calls(command)[0]

    def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands that are sent together, as RESP 2 has them. Raises the first error among them."""
        with self._errors:
            return checked(self.ask(commands))

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands that are sent together, in order; an error from the server is a value."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = Connection(self._url, answer=self._answer)
        try:
            with self._errors:
                return connection.ask(commands)
        finally:
            self._free.append(connection)

    def run(self, script: Script, *before: Command) -> Any:
        """The answer of a script, which is sent together with the commands `before` it."""
        answers = self.ask([*before, script.command])
        if is_unknown_script(answers[-1]):
            answers = [*answers[:-1], *self.ask([("SCRIPT", "LOAD", script.text), script.command])]
        with self._errors:
            return checked(answers)[-1]

    def close(self) -> None:
        """Disconnect."""
        while self._free:
            self._free.pop().close()


def _reach(address: Address, place: Place, connect_timeout: float) -> socket.socket:
    """A connected socket, before any greeting."""
    if isinstance(place, str):
        sock = socket.socket(socket.AF_UNIX)
        _set_timeout(sock, connect_timeout)
        try:
            sock.connect(place)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(place, connect_timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    context = address.context()
    return sock if context is None else context.wrap_socket(sock, server_hostname=place[0])


def _set_timeout(sock: socket.socket, seconds: float) -> None:
    """Limit the time of each call; setting the same limit again would cost a system call."""
    if sock.gettimeout() != seconds:
        sock.settimeout(seconds)


def _is_readable(sock: socket.socket) -> bool:
    """Whether the server sent something before it was asked: usually, that it closed the connection."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))
