"""A job: its states, its record, its result in the format of Celery's result backend, and its stream.

A worker appends the pieces of a generated answer to `keys.stream_key`, or what a callable reports. Each piece has its
start position, so that a reader detects gaps. The stream is bounded and short-lived: the job's result has the complete
text.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from taxiway.contract.deltas import Delta
from taxiway.contract.progress import RunProgress, read_progress
from taxiway.contract.values import from_wire
from taxiway.errors import (
    DeadLetteredError,
    DeadlineExceededError,
    ExecutionError,
    JobCancelledError,
    ResultExpiredError,
    TaxiwayError,
    UnknownJobError,
    cut,
    error_from,
    quoted,
)

_TAG = b'"__type__"'

TEXT = "text"
"""The output that is streamed."""

MOST_PIECES = 1024
"""Approximate number of pieces that a stream keeps; a slower reader loses the oldest."""

KEEP = 120
"""Seconds that a stream is kept after its last piece, for readers that reconnect."""

_ATTEMPT, _AT, _TEXT, _ROW, _BESIDE, _TOKENS, _PROGRESS = b"a", b"i", b"t", b"r", b"d", b"n", b"p"


class JobState(StrEnum):
    """A job's state. `ACCEPTED` is durable but not yet placed."""

    ACCEPTED = "accepted"
    QUEUED = "queued"
    HELD = "held"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DEAD = "dead"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED, JobState.DEAD})
"""States that a job never leaves."""

CELERY_STATUS = {
    JobState.ACCEPTED: "PENDING",
    JobState.QUEUED: "PENDING",
    JobState.HELD: "PENDING",
    JobState.RUNNING: "PENDING",
    JobState.SUCCEEDED: "SUCCESS",
    JobState.FAILED: "FAILURE",
    JobState.EXPIRED: "FAILURE",
    JobState.CANCELLED: "REVOKED",
    JobState.DEAD: "FAILURE",
}
"""Celery's `AsyncResult.status` for each state. `STARTED` is not written: it would cost one write per job."""


class Tokens(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens as an engine counts them: `input`, of which it had `cached`, and `output`."""

    input: int = 0
    cached: int = 0
    output: int = 0

    def plus(self, more: Tokens) -> Tokens:
        """The sum of both."""
        return Tokens(self.input + more.input, self.cached + more.cached, self.output + more.output)


class GenerationPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run of a generation that was cut, or its last one: where it ran, and what it used."""

    hardware_class: str
    variant: str
    device: str
    text: int = 0
    """Characters of the answer that it added."""
    tokens: Tokens = Tokens()
    seconds: float = 0.0
    cost: float = 0.0
    """US dollars."""
    seam: str = ""
    """How it went on from the part before; empty for the first."""
    ended: str = ""
    """Why it was cut; empty if it was not."""


_decode_parts = msgspec.json.Decoder(tuple[GenerationPart, ...]).decode


def read_parts(text: str | bytes) -> tuple[GenerationPart, ...]:
    """Parse the parts in a job's record, oldest first.

    Raises:
        msgspec.MsgspecError: another release wrote them.
    """
    return _decode_parts(text) if text else ()


class RunReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a job ran, what it took and what it cost."""

    hardware_class: str
    variant: str
    device: str
    emulated: bool
    batch: int
    """Rows that ran together."""
    queue_wait: float
    """Seconds."""
    run_time: float
    """Seconds."""
    cost: float
    """US dollars."""
    reason: str
    tokens: Tokens | None = None
    """Of a job that ran on an endpoint which counts them."""
    parts: tuple[GenerationPart, ...] = ()
    """The runs of a generation that was cut and went on; times, cost and tokens are of all, the rest of the last."""
    load_time: float = 0.0
    """The seconds of `queue_wait` for which the device was loading the variant."""
    redone: float = 0.0
    """Seconds of a callable's earlier runs that were lost with their devices and ran again."""
    checkpoints: str = ""
    """What became of the checkpoints that it wrote, or could go on from."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job's answer: outputs by name (one value for a request of one row, else a list), and how it ran.

    `single` means that the request came without a batch axis; None if unknown.
    """

    model: str
    outputs: dict[str, Any]
    report: RunReport
    single: bool | None = None


class MoveRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One move of a waiting job between hardware classes, at a time by the store's clock."""

    at: float
    source: str
    target: str
    kind: str
    reason: str


_decode_moves = msgspec.json.Decoder(tuple[MoveRecord, ...]).decode


def read_moves(text: str) -> tuple[MoveRecord, ...]:
    """Parse the moves in a job's record, oldest first.

    Raises:
        msgspec.MsgspecError: another release wrote them.
    """
    return _decode_moves(text) if text else ()


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job's record in the state store."""

    id: str
    state: JobState
    model: str = ""
    tenant: str = ""
    hardware_class: str = ""
    variant: str = ""
    device: str = ""
    reason: str = ""
    level: int = 0
    """Priority level of its queue; 0 is the most urgent."""
    attempts: int = 0
    """Runs so far."""
    # Seconds since the epoch by the store's clock, 0 if not reached
    accepted: float = 0.0
    placed: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    deadline_at: float = 0.0
    progress: RunProgress | None = None
    """What its callable last reported, also in an earlier run."""


class JobFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job ended without an answer: its error's code, message and details (`taxiway.errors`)."""

    code: str
    message: str
    details: dict[str, Any] = {}


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job's status for a poller: its record, its progress if known, and its error if any."""

    record: JobRecord
    position: int | None = None
    eta: float | None = None
    error: JobFailure | None = None

    @property
    def state(self) -> JobState:
        """The job's state."""
        return self.record.state


class ResultMeta(msgspec.Struct, frozen=True, kw_only=True):
    """A result as Celery's backend stores it."""

    task_id: str
    status: str
    result: Any = None
    traceback: str | None = None
    children: list[Any] = []
    date_done: str | None = None


class _Success(msgspec.Struct, frozen=True):
    """A stored result whose values need no untagging."""

    status: Literal["SUCCESS"]
    result: Result


class _Reported(msgspec.Struct, frozen=True):
    report: RunReport


class _Ran(msgspec.Struct, frozen=True):
    """A stored result without its outputs."""

    result: _Reported


class _Status(msgspec.Struct, frozen=True):
    """How the job of a stored result ended."""

    status: str


_decode_status = msgspec.json.Decoder(_Status).decode
_decode_ran = msgspec.json.Decoder(_Ran).decode
_decode_success = msgspec.json.Decoder(_Success).decode


def unknown(job: str) -> UnknownJobError:
    """The error for a job without a record and a result."""
    why = "no router has recorded it, or its record has expired"
    return UnknownJobError(f"no job {quoted(job)} is known: {why}", job=cut(job))


def expired(job: str) -> ResultExpiredError:
    """The error for a job that ended and whose result has expired."""
    return ResultExpiredError(f"the result of job {quoted(job)} has expired", job=cut(job))


def record_from(job: str, fields: Mapping[str, str]) -> JobRecord:
    """The record from the store's hash; an empty hash is a job that no router has placed yet."""
    progress = read_progress(fields["progress"]) if "progress" in fields else None
    known = {"state": JobState.ACCEPTED, **fields, "id": job, "progress": progress}
    return msgspec.convert(known, JobRecord, strict=False)


def success_meta(job: str, result: Result) -> bytes:
    """A result that Celery reads as SUCCESS."""
    return _meta(job, JobState.SUCCEEDED, result)


def failure_meta(job: str, error: TaxiwayError) -> bytes:
    """An error that Celery raises by its name, also where taxiway is not installed."""
    named = {
        "exc_type": type(error).__name__,
        "exc_message": [error.message],
        "exc_module": type(error).__module__,
        "details": error.details,
    }
    try:
        return _meta(job, state_of(error), named)
    except (TypeError, ValueError, RecursionError):  # a detail that JSON cannot hold
        return _meta(job, state_of(error), named | {"details": {}})


def accepted_meta(submission: str, job: str) -> bytes:
    """The message under a `submission` id that tells the submitter which job its request is."""
    return _meta(submission, JobState.SUCCEEDED, job)


def read_accepted(raw: bytes) -> str:
    """The job in the message under a submission id.

    Raises:
        TaxiwayError: the message is a refusal; of its own class.
    """
    meta = read_meta(raw)
    if meta.status != CELERY_STATUS[JobState.SUCCEEDED]:
        read_result(meta)
    return str(meta.result)


def state_of(error: TaxiwayError) -> JobState:
    """The final state of a job that ended with `error`."""
    if isinstance(error, JobCancelledError):
        return JobState.CANCELLED
    if isinstance(error, DeadlineExceededError):
        return JobState.EXPIRED
    if isinstance(error, DeadLetteredError):
        return JobState.DEAD
    return JobState.FAILED


def report_of(meta: bytes) -> RunReport | None:
    """How the job of a stored result ran; None if it has no answer."""
    try:
        return _decode_ran(meta).result.report
    except msgspec.MsgspecError:
        return None


def read_meta(raw: bytes | str) -> ResultMeta:
    """The stored result in `raw`."""
    return msgspec.json.decode(raw, type=ResultMeta)


def is_answer(raw: bytes) -> bool:
    """Whether a stored result's bytes are an answer, not an error."""
    return _decode_status(raw).status == CELERY_STATUS[JobState.SUCCEEDED]


def read_answer(raw: bytes) -> Result:
    """The answer in a stored result's bytes; raises as `read_result` does."""
    if _TAG not in raw:
        with suppress(msgspec.ValidationError):  # a failure, or another's result
            return _decode_success(raw).result
    return read_result(read_meta(raw))


def read_result(meta: ResultMeta) -> Result:
    """The answer in a stored result.

    Raises:
        TaxiwayError: the error that the job ended with, of its own class.
    """
    if meta.status == "SUCCESS":
        return _read_success(meta)
    named = meta.result if isinstance(meta.result, dict) else {}
    text = named.get("exc_message") or "the job ended without an error message"
    message = " ".join(map(str, text)) if isinstance(text, list) else str(text)
    details = named.get("details")
    details = details if isinstance(details, dict) else {}
    if meta.status == "REVOKED":
        raise JobCancelledError(message, **details)
    raise error_from(str(named.get("exc_type", ExecutionError.__name__)), message, details)


def failure_of(meta: ResultMeta) -> JobFailure | None:
    """The error in a stored result; None where that is an answer."""
    if meta.status == CELERY_STATUS[JobState.SUCCEEDED]:
        return None
    try:
        read_result(meta)
    except TaxiwayError as error:
        return JobFailure(code=error.code, message=error.message, details=error.details)
    return None


def _read_success(meta: ResultMeta) -> Result:
    try:
        return msgspec.convert(from_wire(meta.result), Result)
    except (msgspec.ValidationError, TaxiwayError) as error:
        raise ExecutionError(f"{meta.task_id}: expected a result of taxiway: {error}") from error


def _meta(job: str, state: JobState, result: Any) -> bytes:
    now = datetime.now(UTC).isoformat()
    return msgspec.json.encode(ResultMeta(task_id=job, status=CELERY_STATUS[state], result=result, date_done=now))


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

EventStream = AsyncGenerator[Event | Result, None]
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

    @property
    def entry(self) -> str:
        """The last entry of the stream that was read."""
        return self.position.entry

    def take(self, entry: str, piece: StreamEntry) -> list[Event]:
        """The events of the stream's next entry; none if its attempt is superseded, or it is not of the first row."""
        was = self.position
        self.position = replace(was, entry=entry)
        if isinstance(piece, RunProgress):
            return [piece]
        if piece.row or piece.attempt < was.attempt:
            return []
        events: list[Event] = []
        if self._goes_on(piece):
            self.position = replace(self.position, attempt=piece.attempt)
        elif piece.attempt > was.attempt or piece.at == 0:
            events += [Restarted(piece.attempt)] if was.at else []
            self.position = Position(entry, piece.attempt)
        if piece.at > self.position.at:
            events.append(Lost(piece.at - self.position.at))
            self.position = replace(self.position, at=piece.at, checksum=-1)
        return events + self._tell(piece.text[self.position.at - piece.at :])

    def _goes_on(self, piece: Piece) -> bool:
        """Whether the piece repeats what was read: a generation that was cut goes on after it."""
        read = piece.text[: self.position.at]
        return not piece.at and len(read) == self.position.at and _checksum(read) == self.position.checksum

    def take_all(self, entries: Iterable[tuple[str, StreamEntry]]) -> Iterator[Event]:
        """The events of the stream's next pieces, each given with its entry id."""
        for entry, piece in entries:
            yield from self.take(entry, piece)

    def end(self, result: Result) -> list[Event]:
        """The events for the text that the result adds."""
        output, position = result.outputs.get(TEXT), self.position
        text = output[0] if isinstance(output, list) and len(output) == 1 else output  # one row, sent as rows
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
        for task in (ended, reading):
            if task is not None:
                task.cancel()
        await asyncio.gather(*filter(None, (ended, reading)), return_exceptions=True)


def read_piece(fields: Mapping[bytes, bytes]) -> StreamEntry:
    """What a stream entry holds."""
    if _PROGRESS in fields:
        return read_progress(fields[_PROGRESS])
    sent, beside = _decode_beside(fields[_BESIDE]) if _BESIDE in fields else (0, ())
    text = fields[_TEXT].decode()
    row, tokens = int(fields.get(_ROW, 0)), int(fields.get(_TOKENS, 0))
    return Piece(int(fields[_ATTEMPT]), int(fields[_AT]), text, row, sent, beside, tokens)


_decode_beside = msgspec.json.Decoder(tuple[int, tuple[dict[str, Any], ...]]).decode


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
