"""Batches as OpenAI describes them: what a router answers and writes, and what the client of an array reads."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
"""States that a batch never leaves."""


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of the input; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(msgspec.Struct, frozen=True):
    """Lines of a batch: all, answered, and those that ended with an error."""

    total: int
    completed: int
    failed: int


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a batch's input."""

    object: Literal["list"] = "list"
    data: list[LineError]


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: Errors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None


class Line(msgspec.Struct, frozen=True):
    """A line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LineResponse(msgspec.Struct, frozen=True):
    """The answer to a line; `request_id` is its job."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineFault(msgspec.Struct, frozen=True):
    """Why a line has no answer."""

    code: str
    message: str


class OutputLine(msgspec.Struct, frozen=True):
    """A line of the output."""

    id: str | None
    custom_id: str
    response: LineResponse | None
    error: LineFault | None
