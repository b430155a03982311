"""An answer that is told as it is generated: the pieces in a job's stream, and what a reader makes of them.

A worker appends pieces to `keys.stream_key`; each says where it begins, so that a reader knows what it has missed. The
stream is bounded and forgotten soon: the job's result has the whole text.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from taxiway.contract.job import Result

TEXT = "text"
"""The output that is told as it comes."""

MOST_PIECES = 1024
"""Pieces that a stream keeps, about; a reader that is slower than that loses the oldest."""

KEEP = 120
"""Seconds that a stream stays after its last piece, for readers who come back."""

_ATTEMPT, _AT, _TEXT = b"a", b"i", b"t"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer: `at` is its first character's place there, `attempt` counts the claims of its job."""

    attempt: int
    at: int
    text: str

    def fields(self) -> dict[Any, Any]:
        """What the stream holds, for redis-py."""
        return {_ATTEMPT: self.attempt, _AT: self.at, _TEXT: self.text.encode(errors="replace")}


@dataclass(frozen=True, slots=True)
class Restarted:
    """The answer begins anew, for its worker was lost: what was told before counts no more."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Lost:
    """So many characters are missing here: the reader was too slow, or came too late. The result has them."""

    characters: int


Event = str | Restarted | Lost
"""What a reader is told: some text, or what became of it."""

Told = AsyncGenerator[Event | Result, None]
"""All that a reader is told, the result at last."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a reader has come: the last entry it read, and the attempt, length and checksum of the text so far.

    The checksum (CRC-32) is -1 where some of the text was lost. As text it is `entry:attempt:at:checksum`.
    """

    entry: str = "0-0"
    attempt: int = 0
    at: int = 0
    checksum: int = 0

    def __str__(self) -> str:
        return f"{self.entry}:{self.attempt}:{self.at}:{self.checksum}"


class Progress:
    """What a reader has heard of an answer, from `position` on."""

    def __init__(self, position: Position = Position()) -> None:
        self.position = position

    def take(self, entry: str, piece: Piece) -> list[Event]:
        """What the stream's next piece tells. A piece of an attempt that another has replaced tells nothing."""
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
        """What the stream's next pieces, each with its entry, tell."""
        for entry, piece in entries:
            yield from self.take(entry, piece)

    def end(self, result: Result) -> list[Event]:
        """What the result adds to the text so far."""
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
    """What is told of an answer, as it comes, and its result at last.

    Args:
        read: the pieces after an entry, each with its entry; it may wait for them.
        result: raises what the job ended with; this raises it too.
        progress: from where on.
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
    """The piece that a stream's entry holds."""
    return Piece(int(fields[_ATTEMPT]), int(fields[_AT]), fields[_TEXT].decode())


def read_position(text: str) -> Position:
    """The position that `str` wrote.

    Raises:
        ValueError: it is none.
    """
    entry, attempt, at, checksum = text.split(":")
    if not all(part.isdecimal() for part in entry.split("-", 1)):
        raise ValueError(f"expected the id of a stream's entry, got {entry!r}")
    return Position(entry, int(attempt), int(at), int(checksum))


def _checksum(text: str, before: int = 0) -> int:
    return zlib.crc32(text.encode(errors="replace"), before)
