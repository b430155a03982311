"""Commands as bytes, and bytes as answers or errors: in C (hiredis), and large values without copies.

A library copies a value into the command that carries it, and an answer out of the received bytes: each time into new
memory of the process, which costs more than the copy itself. Source: the Redis serialization protocol (RESP2).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import hiredis

from taxiway.contract.blobs import Buffer
from taxiway.contract.durability import refusal

_AWAY = ("READONLY", "LOADING", "MASTERDOWN", "UNBLOCKED", "ERR max number of clients")


class ServerError(Exception):
    """An error that the server answered, as its text: its code first."""


def is_away(answer: Any) -> bool:
    """Whether the server answers that it is not a primary, or not yet: another connection may reach one."""
    return isinstance(answer, ServerError) and str(answer).startswith(_AWAY)


def is_unknown_script(error: ServerError) -> bool:
    """Whether the server does not know a script by its digest: it was not loaded there, or was dropped."""
    return str(error).startswith("NOSCRIPT")


def checked(answers: Sequence[Any]) -> list[Any]:
    """The answers. Raises the first error among them."""
    for answer in answers:
        if isinstance(answer, ServerError):
            raise answer
    return [*answers]


class fleet_errors(AbstractContextManager[None]):
    """Raises a `FleetUnavailable`, naming `server`, for every error that means that it did not answer, or is full.

    A class, because a generator costs 2 % of a call more.
    """

    __slots__ = ("_server",)

    def __init__(self, server: str) -> None:
        self._server = server

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (ServerError, OSError)):
            raise refusal(self._server, error) from error


LARGE = 2**16
"""Bytes above which a value is not copied."""

READ = 2**18
"""Bytes of an answer that are read at once: with redis-py's 64 KiB, a large answer takes four times the CPU time."""

END = b"\r\n"

_VALUE = ord("$")
_LONGEST_HEAD = 24  # of a value: its length has 20 digits at most


class Value:
    """A value that is read into its own memory; `missing` is the rest of it and of the line end after it."""

    def __init__(self, length: int, begin: Buffer) -> None:
        whole = memoryview(bytearray(length + len(END)))
        self.content = whole[:length].toreadonly()
        self.missing = whole[len(begin) :]
        whole[: len(begin)] = begin

    def came(self, count: int) -> None:
        """So many bytes were written to `missing`."""
        self.missing = self.missing[count:]


def packed(command: Sequence[Any]) -> Iterator[Buffer]:
    """The bytes of a command; each large value separately, without a copy."""
    if not any(map(is_large, command)):
        yield hiredis.pack_command(tuple(command))
        return
    text = b"*%d" % len(command)
    for argument in command:
        value = argument if isinstance(argument, Buffer) else str(argument).encode()
        text += b"\r\n$%d\r\n" % len(value)
        if is_large(value):
            yield text
            yield memoryview(value)
            text = b""
        else:
            text += value
    yield text + END


def is_large(argument: Any) -> bool:
    """Whether it is a value that is not copied."""
    return isinstance(argument, Buffer) and len(argument) > LARGE


def pieces(commands: Iterable[Sequence[Any]]) -> Iterator[Buffer]:
    """The bytes of commands that are sent together, in as few pieces as possible without copying a large value."""
    parts = (piece for command in commands for piece in packed(command))
    for large, some in groupby(parts, is_large):
        if large:
            yield from some
        else:
            yield b"".join(some)


class Answers:
    """Parses what a server sends into answers; a server's error is a value."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(replyError=ServerError)
        self._read = memoryview(bytearray(READ))
        self._large: Value | None = None
        self._midway = False  # the reader has the start of an answer, and may have no byte of it left to parse

    def buffer(self) -> memoryview:
        """The buffer for the next bytes."""
        return self._read if self._large is None else self._large.missing

    def received(self, count: int) -> Iterator[Any]:
        """The answers that are complete after so many bytes were written to `buffer`.

        Raises:
            ConnectionError: not the protocol.
        """
        if self._large is None:
            at = yield from self._values(count)
            if self._large is None:
                yield from self._parsed(at, count)
        else:
            self._large.came(count)
        if self._large is not None and not self._large.missing:
            content, self._large = self._large.content, None
            yield content

    def _values(self, count: int) -> Generator[Any, None, int]:
        """Yield the leading values, up to a large incomplete one; returns where the rest begins."""
        at = 0
        while at < count and self._read[at] == _VALUE and not self._midway:
            head, found, _ = bytes(self._read[at : min(at + _LONGEST_HEAD, count)]).partition(END)
            length, begin = int(head[1:]) if found else 0, at + len(head) + len(END)
            end = begin + length + len(END)
            if end > count and length > LARGE:
                self._large = Value(length, self._read[begin:count])
            if not found or end >= count or length < 0:
                break
            yield bytes(self._read[begin : begin + length])
            at = end
        return at

    def _parsed(self, at: int, count: int) -> Iterator[Any]:
        if at == count:
            return
        try:
            self._reader.feed(self._read, at, count - at)  # type: ignore[arg-type]  # it takes any buffer
            self._midway = True
            while (answer := self._reader.gets()) is not False:
                self._midway = self._reader.has_data()
                yield answer
        except hiredis.HiredisError as error:
            raise ConnectionError(str(error)) from error
