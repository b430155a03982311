"""A job's stream: what a worker appends to `keys.stream_key`, and how a reader follows it.

It holds the pieces of a generated answer, or what a callable reports. Each piece has its start position, so that a
reader detects gaps. The stream is bounded and short-lived: the job's result has the complete text.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import msgspec

from taxiway.contract.job import GenerationPart, Result, RunProgress, Tokens, decode_progress
from taxiway.running import end

Delta = Mapping[str, Any]
"""New parts of a chat's message by name, as an engine sends them.

They are texts (`TEXTS`), `tool_calls` in OpenAI's form, each with its `index` and a piece of its arguments, and in
`logprobs` a list of facts about tokens. Source: https://platform.openai.com/docs/api-reference/chat/streaming.
"""

TEXTS = ("reasoning_content", "content", "refusal")
"""The texts of a message, in the order in which models send them."""


class OtherMessageError(ValueError):
    """A message does not begin with what was sent of it."""


class SentMessage:
    """What was sent of a message so far."""

    def __init__(self) -> None:
        self.logprobs: list[Any] = []
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, dict[str, Any]] = {}  # without their functions
        self._functions: dict[int, dict[str, list[str]]] = {}  # in pieces: joining at each would take quadratic time

    def add(self, delta: Delta) -> None:
        """Take in the next part."""
        for name in TEXTS:
            if text := delta.get(name):
                self._texts.setdefault(name, []).append(text)
        for call in delta.get("tool_calls") or ():
            self._add_call(call)
        self.logprobs += delta.get("logprobs") or ()

    @property
    def is_plain(self) -> bool:
        """Whether it has no more than its content."""
        return not (self.logprobs or self._calls or self._texts.keys() - {"content"})

    def text(self, name: str) -> str:
        """A text of it."""
        return "".join(self._texts.get(name, ()))

    def call(self, index: int) -> dict[str, Any]:
        """The tool call of that index."""
        function = {name: "".join(pieces) for name, pieces in self._functions[index].items()}
        return {**self._calls[index], "function": function}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Its tool calls."""
        return [self.call(index) for index in sorted(self._calls)]

    def rest(self, whole: Mapping[str, Any]) -> Delta:
        """What the whole message has more; empty if all of it was sent.

        Raises:
            OtherMessageError: it does not begin with what was sent.
        """
        delta: dict[str, Any] = {}
        for name in TEXTS:
            if more := _after(self.text(name), whole.get(name) or ""):
                delta[name] = more
        if calls := [*self._rest_of_calls(whole.get("tool_calls") or ())]:
            delta["tool_calls"] = calls
        tokens = (whole.get("logprobs") or {}).get("content") or []
        if more_tokens := tokens[len(self.logprobs) :]:
            delta["logprobs"] = more_tokens
        return delta

    def _add_call(self, call: Mapping[str, Any]) -> None:
        index = call.get("index", 0)
        whole = self._calls.setdefault(index, {"id": "", "type": "function"})
        whole |= {name: call[name] for name in ("id", "type") if call.get(name)}
        function = self._functions.setdefault(index, {})
        for name, value in (call.get("function") or {}).items():
            if isinstance(value, str):
                function.setdefault(name, []).append(value)

    def _rest_of_calls(self, calls: Any) -> Iterator[dict[str, Any]]:
        if len(calls) <= max(self._calls, default=-1):
            raise OtherMessageError("it has fewer tool calls")
        for index, call in enumerate(calls):
            if index not in self._calls:
                yield {"index": index, **call}
            elif self._calls[index]["id"] != call.get("id"):
                raise OtherMessageError("its tool calls are others")
            elif more := _rest_of(self.call(index)["function"], call.get("function") or {}):
                yield {"index": index, "function": more}


def _rest_of(sent: Mapping[str, str], function: Mapping[str, str]) -> dict[str, str]:
    rest = {name: _after(sent.get(name, ""), text) for name, text in function.items()}
    return {name: more for name, more in rest.items() if more or name not in sent}


def _after(sent: str, text: str) -> str:
    if not text.startswith(sent):
        raise OtherMessageError("its text is another one")
    return text[len(sent) :]


TEXT = "text"
"""The output that is streamed."""

MOST_PIECES = 1024
"""Approximate number of pieces that a stream keeps; a slower reader loses the oldest."""

KEEP = 120
"""Seconds that a stream is kept after its last piece, for readers that reconnect."""

_ATTEMPT, _AT, _TEXT, _ROW, _BESIDE, _TOKENS, _PROGRESS = b"a", b"i", b"t", b"r", b"d", b"n", b"p"


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of the answer to a `row` of a request, under the number of the job's claim, its `attempt`.

    `at` is the index of its text's first character. `beside` are deltas of a message besides its text, which came with
    the text or after it; `sent` of them came in earlier pieces. `tokens` is the answer's length up to the piece's
    end, 0 if unknown.
    """

    attempt: int
    at: int
    text: str = ""
    row: int = 0
    sent: int = 0
    beside: Sequence[Delta] = ()
    tokens: int = 0

    def fields(self) -> dict[Any, Any]:
        """The stream entry's fields, for redis-py."""
        fields = {_ATTEMPT: self.attempt, _AT: self.at, _TEXT: self.text.encode(errors="replace")}
        if self.row:
            fields[_ROW] = self.row
        if self.tokens:
            fields[_TOKENS] = self.tokens
        return {**fields, _BESIDE: msgspec.json.encode((self.sent, self.beside))} if self.beside else fields

    def joined(self, after: Piece) -> Piece | None:
        """This piece and the one `after` it as one; None if that does not continue it."""
        ends = (self.row, self.attempt, self.at + len(self.text), self.sent + len(self.beside))
        if ends != (after.row, after.attempt, after.at, after.sent if after.beside else ends[-1]):
            return None
        if self.beside and after.text:
            return None
        sent = self.sent if self.beside else after.sent
        beside = (*self.beside, *after.beside)
        return replace(self, text=self.text + after.text, sent=sent, beside=beside, tokens=after.tokens)


@dataclass(frozen=True, slots=True)
class Restarted:
    """Generation restarted, as it was cut and could not go on: earlier text is superseded."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Characters missing here, because the reader was too slow or connected too late. The result contains them."""

    characters: int


StreamEntry = Piece | RunProgress
"""An entry of a job's stream."""

Event = str | Restarted | Lost | RunProgress
"""An event for a reader: text, a restart, a gap, or a report."""

EVENT_KINDS: Mapping[str, type[Restarted | Lost | RunProgress]] = {
    "restarted": Restarted,
    "lost": Lost,
    "progress": RunProgress,
}
"""Events besides text, as a router names them in its answers."""

EventStream = AsyncGenerator[Event | Result, None]
"""All events for a reader, then the result."""


@dataclass(slots=True)
class Progress:
    """A reader's progress: the last entry that it read, and the attempt, length and checksum of the text so far.

    The checksum (CRC-32) is -1 if part of the text was lost. Serialised as `entry:attempt:at:checksum`.
    """

    entry: str = "0-0"
    attempt: int = 0
    at: int = 0
    checksum: int = 0

    def __str__(self) -> str:
        return f"{self.entry}:{self.attempt}:{self.at}:{self.checksum}"

    def take(self, entry: str, piece: StreamEntry) -> list[Event]:
        """The events of the stream's next entry; none if its attempt is superseded, or it is not of the first row."""
        self.entry = entry
        if isinstance(piece, RunProgress):
            return [piece]
        if piece.row or piece.attempt < self.attempt:
            return []
        events: list[Event] = []
        if not self._goes_on(piece) and (piece.attempt > self.attempt or piece.at == 0):
            events += [Restarted(piece.attempt)] if self.at else []
            self.at = self.checksum = 0
        self.attempt = piece.attempt
        if piece.at > self.at:
            events.append(Lost(piece.at - self.at))
            self.at, self.checksum = piece.at, -1
        return events + self._tell(piece.text[self.at - piece.at :])

    def _goes_on(self, piece: Piece) -> bool:
        """Whether the piece repeats what was read: a generation that was cut goes on after it."""
        read = piece.text[: self.at]
        return not piece.at and len(read) == self.at and _checksum(read) == self.checksum

    def take_all(self, entries: Iterable[tuple[str, StreamEntry]]) -> Iterator[Event]:
        """The events of the stream's next pieces, each given with its entry id."""
        for entry, piece in entries:
            yield from self.take(entry, piece)

    def end(self, result: Result) -> list[Event]:
        """The events for the text that the result adds."""
        output = result.outputs.get(TEXT)
        text = output[0] if isinstance(output, list) and len(output) == 1 else output  # one row, sent as rows
        if not isinstance(text, str):
            return []
        if self.checksum in (-1, _checksum(text[: self.at])):
            return self._tell(text[self.at :])
        self.attempt += 1
        self.at = self.checksum = 0
        return [Restarted(self.attempt), *self._tell(text)]

    def _tell(self, text: str) -> list[Event]:
        if not text:
            return []
        self.at += len(text)
        if self.checksum != -1:
            self.checksum = _checksum(text, self.checksum)
        return [text]


Part_co = TypeVar("Part_co", covariant=True)
Part = TypeVar("Part")


class Following(Protocol[Part_co]):
    """A reader's progress through a job's stream, in parts of its own kind."""

    @property
    def entry(self) -> str:
        """The last entry that was read."""

    def take_all(self, entries: Iterable[tuple[str, StreamEntry]]) -> Iterator[Part_co]:
        """The parts in the stream's next pieces, each given with its entry id."""

    def end(self, result: Result) -> Iterable[Part_co]:
        """The parts that the result adds."""


async def follow(
    read: Callable[[str], Coroutine[Any, Any, list[tuple[str, StreamEntry]]]],
    result: Awaitable[Result],
    progress: Following[Part],
) -> AsyncGenerator[Part | Result, None]:
    """Yield an answer's events as they come, then its result.

    Args:
        read: returns the pieces after an entry, each with its entry id; may wait for them.
        result: returns the job's result, or raises its error, which this raises too.
        progress: where to start.
    """
    ended, reading = asyncio.ensure_future(result), None
    try:
        while not ended.done():
            reading = asyncio.create_task(read(progress.entry))
            await asyncio.wait((ended, reading), return_when=asyncio.FIRST_COMPLETED)
            for event in progress.take_all(reading.result() if reading.done() else ()):
                yield event
        for event in progress.end(ended.result()):
            yield event
        yield ended.result()
    finally:
        await end((ended, reading))


def read_entries(entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[tuple[str, StreamEntry]]:
    """What the entries of a stream hold, each with its id."""
    return [(entry.decode(), read_piece(dict(zip(flat[::2], flat[1::2], strict=True)))) for entry, flat in entries]


def read_piece(fields: Mapping[bytes, bytes]) -> StreamEntry:
    """What a stream entry holds."""
    if _PROGRESS in fields:
        return decode_progress(fields[_PROGRESS])
    sent, beside = _decode_beside(fields[_BESIDE]) if _BESIDE in fields else (0, ())
    text = fields[_TEXT].decode()
    row, tokens = int(fields.get(_ROW, 0)), int(fields.get(_TOKENS, 0))
    return Piece(int(fields[_ATTEMPT]), int(fields[_AT]), text, row, sent, beside, tokens)


_decode_beside = msgspec.json.Decoder(tuple[int, tuple[dict[str, Any], ...]]).decode


def read_progress_at(text: str) -> Progress:
    """Parse the `str` of a reader's progress.

    Raises:
        ValueError: malformed.
    """
    entry, attempt, at, checksum = text.split(":")
    if not all(part.isdecimal() for part in entry.split("-", 1)):
        raise ValueError(f"expected the id of a stream's entry, got {entry!r}")
    return Progress(entry, int(attempt), int(at), int(checksum))


def _checksum(text: str, before: int = 0) -> int:
    return zlib.crc32(text.encode(errors="replace"), before)


class CutGeneration(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of the answer of a generation that is cut and goes on.

    A *part* is one run on one endpoint. The *seam* between two parts is where the first was cut: the next one reads
    prompt and text, and goes on after it, or begins again if the endpoint cannot.
    """

    attempt: int = 0
    """The number of the claim that wrote it."""
    text: str = ""
    tokens: int = 0
    """The text's length."""
    seed: int | None = None
    """The request's own."""
    parts: tuple[GenerationPart, ...] = ()
    """The runs so far."""


NOTHING = CutGeneration()
"""What is kept of an answer that begins."""

decode_kept = msgspec.json.Decoder(CutGeneration).decode


def total(parts: Iterable[GenerationPart]) -> Tokens:
    """The tokens that parts used."""
    used = Tokens()
    for part in parts:
        used = used.plus(part.tokens)
    return used


def with_streamed(kept: CutGeneration, pieces: Iterable[Piece]) -> CutGeneration:
    """What is kept, and what readers got of the answer beyond that, by the pieces of its stream in order.

    A worker that is lost may have sent text that it had not kept. Its reader goes on from there, so the next part must.
    A stream that has more than text, or lacks some, adds nothing.
    """
    attempt, text, tokens = kept.attempt, kept.text, kept.tokens
    for piece in pieces:
        if piece.row or piece.beside:
            return kept
        if piece.attempt > attempt:
            attempt, text, tokens = piece.attempt, "", 0
        end = piece.at + len(piece.text)
        if piece.attempt == attempt and piece.at <= len(text) < end and piece.tokens:
            text, tokens = text[: piece.at] + piece.text, piece.tokens
    more = attempt > kept.attempt or len(text) > len(kept.text)
    return msgspec.structs.replace(kept, attempt=attempt, text=text, tokens=tokens) if more and text else kept
