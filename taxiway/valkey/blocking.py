"""The blocking connection: one for a thread, or several that any number of threads take turns on."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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

ANSWER = 5.0
"""Seconds within which a server must answer a worker: scripts over a whole batch of large results take some."""


class Connection:
    """One connection, for one thread at a time; opened with the first call, and reopened after it was lost or a fork.

    Raises `OSError` and `ServerError`.
    """

    def __init__(self, where: str | Address, *, answer: float = ANSWER) -> None:
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


class Connections:
    """As many connections as threads call at the same time. Raises `OSError` and `ServerError`."""

    def __init__(self, url: str, *, answer: float = ANSWER) -> None:
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
