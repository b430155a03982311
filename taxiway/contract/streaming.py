"""Streaming of generated answers: the pieces in a job's stream, and the events that a reader derives from them.

A worker appends pieces to `keys.stream_key`. Each piece has its start position, so that a reader detects gaps. The
stream is bounded and short-lived: the job's result has the complete text.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from taxiway.contract.job import Result

TEXT = "text"
"""The output that is streamed."""

MOST_PIECES = 1024
"""Approximate number of pieces that a stream keeps; a slower reader loses the oldest."""

KEEP = 120
"""Seconds that a stream is kept after its last piece, for readers that reconnect."""

_ATTEMPT, _AT, _TEXT = b"a", b"i", b"t"


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer's text: `at` is the index of its first character, `attempt` the number of the job's claim."""

    attempt: int
    at: int
    text: str

    def fields(self) -> dict[Any, Any]:
        """The stream entry's fields, for redis-py."""
        return {_ATTEMPT: self.attempt, _AT: self.at, _TEXT: self.text.encode(errors="replace")}


@dataclass(frozen=True, slots=True)
class Restarted:
    """Generation restarted because the worker was lost: earlier text is superseded."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Characters missing here, because the reader was too slow or connected too late. The result contains them."""

    characters: int


Event = str | Restarted | Lost
"""An event for a reader: text, a restart or a gap."""

Told = AsyncGenerator[Event | Result, None]
"""All events for a reader, then the result."""


@dataclass(frozen=True, slots=True)
class Position:
    """A reader's position: the last entry it read, and the attempt, length and checksum of the text so far.

    The checksum (CRC-32) is -1 if part of the text was lost. Serialised as `entry:attempt:at:checksum`.
    """

    entry: str = "0-0"
    attempt: int = 0
    at: int = 0
    checksum: int = 0

    def __str__(self) -> str:
        return f"{self.entry}:{self.attempt}:{self.at}:{self.checksum}"


class Progress:
    """A reader's progress through an answer, from `position` on."""

    def __init__(self, position: Position = Position()) -> None:
        self.position = position

    def take(self, entry: str, piece: Piece) -> list[Event]:
        """The events of the stream's next piece; none if its attempt is superseded."""
        was = self.position
        self.position = replace(was, entry=entry)
        if piece.attempt < was.attempt:
            return []
        events: list[Event] = []
        if was.at and (piece.attempt > was.attempt or piece.at == 0):
            events.append(Restarted(piece.attempt))
        if piece.attempt > was.attempt or piece.at == 0:
            self.position = Position(entry, piece.attempt)
        if piece.at > self.position.at:
            events.append(Lost(piece.at - self.position.at))
            self.position = replace(self.position, at=piece.at, checksum=-1)
        return events + self._tell(piece.text[self.position.at - piece.at :])

    def take_all(self, entries: Iterable[tuple[str, Piece]]) -> Iterator[Event]:
        """The events of the stream's next pieces, each given with its entry id."""
        for entry, piece in entries:
            yield from self.take(entry, piece)

    def end(self, result: Result) -> list[Event]:
        """The events for the text that the result adds."""
        told, position = result.outputs.get(TEXT), self.position
        text = told[0] if isinstance(told, list) and len(told) == 1 else told  # a request of one row, sent as rows
        if not isinstance(text, str):
            return []
        if position.checksum in (-1, _checksum(text[: position.at])):
            return self._tell(text[position.at :])
        self.position = Position(position.entry, position.attempt + 1)
        return [Restarted(position.attempt + 1), *self._tell(text)]

    def _tell(self, text: str) -> list[Event]:
        if not text:
            return []
        position = self.position
        checksum = -1 if position.checksum == -1 else _checksum(text, position.checksum)
        self.position = replace(position, at=position.at + len(text), checksum=checksum)
        return [text]


async def follow(
    read: Callable[[str], Coroutine[Any, Any, list[tuple[str, Piece]]]], result: Awaitable[Result], progress: Progress
) -> Told:
    """Yield an answer's events as they come, then its result.

    Args:
        read: returns the pieces after an entry, each with its entry id; may wait for them.
        result: returns the job's result, or raises its error, which this raises too.
        progress: where to start.
    """
    ended, reading = asyncio.ensure_future(result), None
    try:
        while not ended.done():
            reading = asyncio.create_task(read(progress.position.entry))
            await asyncio.wait((ended, reading), return_when=asyncio.FIRST_COMPLETED)
            for event in progress.take_all(reading.result() if reading.done() else ()):
                yield event
        for event in progress.end(ended.result()):
            yield event
        yield ended.result()
    finally:
        for task in (ended, reading):
            if task is not None:
                task.cancel()
        await asyncio.gather(*filter(None, (ended, reading)), return_exceptions=True)


def read_piece(fields: Mapping[bytes, bytes]) -> Piece:
    """The piece in a stream entry."""
    return Piece(int(fields[_ATTEMPT]), int(fields[_AT]), fields[_TEXT].decode())


def read_position(text: str) -> Position:
    """Parse a position's `str`.

    Raises:
        ValueError: malformed.
    """
    entry, attempt, at, checksum = text.split(":")
    if not all(part.isdecimal() for part in entry.split("-", 1)):
        raise ValueError(f"expected the id of a stream's entry, got {entry!r}")
    return Position(entry, int(attempt), int(at), int(checksum))


def _checksum(text: str, before: int = 0) -> int:
    return zlib.crc32(text.encode(errors="replace"), before)
