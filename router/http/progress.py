"""What a job's answers tell as they are generated, by row, and each part once. Pure.

OpenAI's events have no way to take anything back. After a restart or a gap nothing of a row is sent until the result is
there; then follows the rest, if the result begins with what was sent. Else the stream ends with an error, never with
two answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from taxiway.contract.deltas import Delta, Message, OtherMessageError
from taxiway.contract.job import TEXT, Piece, Result
from taxiway.errors import DeviceFaultError


class Part(NamedTuple):
    """What the message of a row has more."""

    row: int
    delta: Delta


class Answers:
    """The progress of a reader through a job's stream (`taxiway.contract.job.Following`)."""

    def __init__(self) -> None:
        self.entry = "0-0"
        self._rows: dict[int, _Answer] = {}

    def take_all(self, entries: Iterable[tuple[str, Piece]]) -> Iterator[Part]:
        """The parts in the stream's next pieces."""
        for entry, piece in entries:
            self.entry = entry
            for delta in self._row(piece.row).take(piece):
                yield Part(piece.row, delta)

    def end(self, result: Result) -> Iterator[Part]:
        """The parts that the result adds.

        Raises:
            DeviceFaultError: part of an answer was sent, and the one that came after a restart begins differently.
        """
        for row, message in enumerate(messages_of(result)):
            try:
                delta = self._row(row).said.rest(message)
            except OtherMessageError as error:
                text = "the answer was restarted on another device, and is not the one that began here: ask again"
                raise DeviceFaultError(text, retry_after=1.0) from error
            if delta:
                yield Part(row, delta)

    def _row(self, row: int) -> _Answer:
        return self._rows.setdefault(row, _Answer())


class _Answer:
    """The answer to one row. `whole` means that nothing of it was missed or superseded."""

    def __init__(self) -> None:
        self.said = Message()
        self._whole = True
        self._attempt = 0
        self._at = 0
        self._sent = 0

    def take(self, piece: Piece) -> list[Delta]:
        """What the next piece adds; nothing once something is missing."""
        if not self._whole or piece.attempt < self._attempt:
            return []
        begun = bool(self._at or self._sent)
        if not begun:
            self._attempt = piece.attempt
        again = begun and not (piece.at or piece.sent)
        if again or piece.attempt > self._attempt or piece.at > self._at or (piece.beside and piece.sent > self._sent):
            self._whole = False
            return []
        text = piece.text[self._at - piece.at :]
        beside = piece.beside[self._sent - piece.sent :] if piece.beside else ()
        self._at, self._sent = self._at + len(text), self._sent + len(beside)
        deltas = _deltas(text, [*beside])
        for delta in deltas:
            self.said.add(delta)
        return deltas


def _deltas(text: str, beside: list[Delta]) -> list[Delta]:
    if text and beside:
        return [{"content": text, **beside[0]}, *beside[1:]]
    return [{"content": text}] if text else beside


def messages_of(result: Result) -> list[Mapping[str, Any]]:
    """The message of each row. A model that continues prompts has texts."""
    if "message" in result.outputs:
        return column(result, "message")
    texts = column(result, TEXT)
    logprobs = column(result, "logprobs") if "logprobs" in result.outputs else [None] * len(texts)
    return [{"content": text, "logprobs": tokens} for text, tokens in zip(texts, logprobs, strict=True)]


def column(result: Result, name: str) -> list[Any]:
    """An output's values, one per row."""
    value = result.outputs[name]
    return value if isinstance(value, list) else [value]
