"""The parts of a job's answers as they are generated, by row, each part once. Pure.

OpenAI's events cannot take back what was sent. What a generation that was cut repeats of it is not sent again. After
another restart or a gap nothing of a row is sent until the result has arrived; then the rest follows, if the result
begins with what was sent. Otherwise the stream ends with an error, never with two answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from taxiway.contract.job import Result
from taxiway.contract.stream import TEXT, Delta, OtherMessageError, Piece, SentMessage, StreamEntry
from taxiway.errors import DeviceFaultError


class MessagePart(NamedTuple):
    """What is new in the message of a row."""

    row: int
    delta: Delta


class StreamProgress:
    """The progress of a reader through a job's stream (`taxiway.contract.job.Following`)."""

    def __init__(self) -> None:
        self.entry = "0-0"
        self._rows: dict[int, _Answer] = {}

    def take_all(self, entries: Iterable[tuple[str, StreamEntry]]) -> Iterator[MessagePart]:
        """The parts in the stream's next pieces."""
        for entry, piece in entries:
            self.entry = entry
            if not isinstance(piece, Piece):
                continue
            for delta in self._row(piece.row).take(piece):
                yield MessagePart(piece.row, delta)

    def end(self, result: Result) -> Iterator[MessagePart]:
        """The parts that the result adds.

        Raises:
            DeviceFaultError: part of an answer was sent, and the answer after a restart begins differently.
        """
        for row, message in enumerate(messages_of(result)):
            try:
                delta = self._row(row).sent.rest(message)
            except OtherMessageError as error:
                text = (
                    "the answer was restarted on another device and differs from what was sent: send the request again"
                )
                raise DeviceFaultError(text, retry_after=1.0) from error
            if delta:
                yield MessagePart(row, delta)

    def _row(self, row: int) -> _Answer:
        return self._rows.setdefault(row, _Answer())


class _Answer:
    """The answer to one row: what was `sent` of it, unless something was missed or superseded (not `whole`)."""

    def __init__(self) -> None:
        self.sent = SentMessage()
        self._whole = True
        self._attempt = 0
        self._at = 0
        self._beside = 0

    def take(self, piece: Piece) -> list[Delta]:
        """The deltas of the next piece; none once something was missed."""
        if not self._whole or piece.attempt < self._attempt:
            return []
        begun = bool(self._at or self._beside)
        goes_on = not begun or self._goes_on(piece)
        if goes_on:
            self._attempt = piece.attempt
        again = not (goes_on or piece.at or piece.sent)
        gap = piece.at > self._at or (piece.beside and piece.sent > self._beside)
        if again or gap or piece.attempt > self._attempt:
            self._whole = False
            return []
        text = piece.text[self._at - piece.at :]
        beside = piece.beside[self._beside - piece.sent :] if piece.beside else ()
        self._at, self._beside = self._at + len(text), self._beside + len(beside)
        deltas = _deltas(text, [*beside])
        for delta in deltas:
            self.sent.add(delta)
        return deltas

    def _goes_on(self, piece: Piece) -> bool:
        """Whether the piece repeats the text that was sent: a generation that was cut goes on after it."""
        return not (piece.at or piece.beside or self._beside) and piece.text.startswith(self.sent.text("content"))


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
