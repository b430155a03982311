"""A job: its states, its record, and its result in the format of Celery's result backend."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

import msgspec

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
_CELERY_STATE = b'{"status":"PROGRESS",'  # a result begins with its job


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


class RunProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What a run last reported (`taxiway.Run.report`), on its job's record and in its stream."""

    fraction: float
    """Of the work, 0 to 1."""
    message: str = ""
    partial: Any = None
    """A first result."""
    left: float | None = None
    """Estimated seconds to the end, as of the report; None if nothing tells."""

    @property
    def text(self) -> str:
        """It in a line: `62 %: 1,240 steps`."""
        return f"{self.fraction:.0%}".replace("%", " %") + (f": {self.message}" if self.message else "")


class _CeleryState(msgspec.Struct):
    status: str
    result: RunProgress
    task_id: str
    traceback: None = None
    children: tuple[()] = ()


decode_progress = msgspec.json.Decoder(RunProgress).decode
"""Decodes the report in a job's record or stream."""


def celery_state(job: str, progress: RunProgress) -> bytes:
    """The job's state as Celery's `AsyncResult` reads it under the result's key, with the report as `info`."""
    return msgspec.json.encode(_CeleryState("PROGRESS", progress, job))


def result_in(raw: bytes | None) -> bytes | None:
    """What was read under a result's key, if it is a result; None if it is a state, or nothing."""
    return None if raw is None or raw.startswith(_CELERY_STATE) else raw


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


decode_parts = msgspec.json.Decoder(tuple[GenerationPart, ...]).decode
"""Decodes the parts in a job's record, oldest first."""


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


decode_moves = msgspec.json.Decoder(tuple[MoveRecord, ...]).decode
"""Decodes the moves in a job's record, oldest first."""


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


class JobStatus(JobRecord, frozen=True, kw_only=True):
    """A job's status for a poller: its record, and what else is known."""

    position: int | None = None
    """Jobs before it."""
    eta: float | None = None
    """Seconds until it may be done."""
    error: JobFailure | None = None

    @property
    def record(self) -> JobRecord:
        """The record: the status has its fields."""
        return self


class ResultMeta(msgspec.Struct, frozen=True, kw_only=True):
    """A result as Celery's backend stores it."""

    task_id: str
    status: str
    result: Any = None
    traceback: str | None = None
    children: list[Any] = []
    date_done: str | None = None


class _Success(msgspec.Struct, frozen=True):
    """A stored result, whose values are not untagged."""

    status: Literal["SUCCESS"]
    result: Result


class _Head(msgspec.Struct, frozen=True):
    """The job of a stored result, and how it ended."""

    task_id: str
    status: str


_decode_head = msgspec.json.Decoder(_Head).decode
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
    progress = decode_progress(fields["progress"]) if "progress" in fields else None
    known = {"state": JobState.ACCEPTED, **fields, "id": job, "progress": progress}
    return msgspec.convert(known, JobRecord, strict=False)


def status_of(
    record: JobRecord, *, position: int | None = None, eta: float | None = None, error: JobFailure | None = None
) -> JobStatus:
    """The status of a job with that record."""
    return JobStatus(**msgspec.structs.asdict(record), position=position, eta=eta, error=error)


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
        return _decode_success(meta).result.report
    except msgspec.MsgspecError:
        return None


def read_meta(raw: bytes | str) -> ResultMeta:
    """The stored result in `raw`."""
    return msgspec.json.decode(raw, type=ResultMeta)


def is_answer(raw: bytes) -> bool:
    """Whether a stored result's bytes are an answer, not an error."""
    return _decode_head(raw).status == CELERY_STATUS[JobState.SUCCEEDED]


def job_in(raw: bytes) -> str:
    """The job of a stored result's bytes. Raises `msgspec.MsgspecError` if they are none."""
    return _decode_head(raw).task_id


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
        try:
            return msgspec.convert(from_wire(meta.result), Result)
        except (msgspec.ValidationError, TaxiwayError) as error:
            raise ExecutionError(f"{meta.task_id}: expected a result of taxiway: {error}") from error
    named = meta.result if isinstance(meta.result, dict) else {}
    text = named.get("exc_message") or "the job ended without an error message"
    message = " ".join(map(str, text)) if isinstance(text, list) else str(text)
    details = named.get("details")
    details = details if isinstance(details, dict) else {}
    if meta.status == "REVOKED":
        raise JobCancelledError(message, **details)
    raise error_from(str(named.get("exc_type", ExecutionError.__name__)), message, details)


def ended_as(meta: ResultMeta) -> JobState:
    """The final state in a stored result, where its job's record has expired or is not final yet."""
    try:
        read_result(meta)
    except TaxiwayError as error:
        return state_of(error)
    return JobState.SUCCEEDED


def failure_of(meta: ResultMeta) -> JobFailure | None:
    """The error in a stored result; None where that is an answer."""
    if meta.status == CELERY_STATUS[JobState.SUCCEEDED]:
        return None
    try:
        read_result(meta)
    except TaxiwayError as error:
        return JobFailure(code=error.code, message=error.message, details=error.details)
    return None


def _meta(job: str, state: JobState, result: Any) -> bytes:
    now = datetime.now(UTC).isoformat()
    return msgspec.json.encode(ResultMeta(task_id=job, status=CELERY_STATUS[state], result=result, date_done=now))
