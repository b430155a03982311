"""Large values on their way to and from a Valkey or Redis server, without copies.

A library copies a value into the command that carries it, and an answer out of the bytes that came: each time into
memory that is new to the process, which costs more than the copy. Source: the Redis serialization protocol (RESP2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import hiredis

from taxiway.contract.blobs import Buffer

LARGE = 2**16
"""Bytes of a value from which on it is not copied."""

READ = 2**18
"""Bytes of an answer that are read at once: with redis-py's 64 KiB, a large one takes four times the processor time."""

END = b"\r\n"


class Value:
    """A value that is read into memory of its own; of it and the line's end behind it `missing` is still to come."""

    def __init__(self, length: int, begin: Buffer) -> None:
        whole = memoryview(bytearray(length + len(END)))
        self.content = whole[:length].toreadonly()
        self.missing = whole[len(begin) :]
        whole[: len(begin)] = begin

    def came(self, count: int) -> None:
        """So many bytes were put into `missing`."""
        self.missing = self.missing[count:]


def packed(command: Sequence[Any]) -> Iterator[Buffer]:
    """The bytes of a command; each large value of it by itself, where it lies."""
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
    """Whether it is a value that is not to be copied."""
    return isinstance(argument, Buffer) and len(argument) > LARGE
