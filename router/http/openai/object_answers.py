"""Files and batches in OpenAI's form. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from router.http.openai.batches import Batch, LineError
from router.http.openai.objects import FileRecord


class FileAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


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


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_answer(record: FileRecord) -> FileAnswer:
    """A file as it is told."""
    return msgspec.convert(record, FileAnswer, from_attributes=True)


def batch_answer(batch: Batch) -> BatchAnswer:
    """A batch as it is told."""
    ended: dict[str, Any] = {f"{status}_at": batch.ended_at if batch.status == status else None for status in _ENDS}
    return BatchAnswer(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=Errors(data=batch.errors) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id or None,
        error_file_id=batch.error_file_id or None,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at or None,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at or None,
        cancelling_at=batch.cancelling_at or None,
        request_counts=Counts(batch.lines, batch.completed, batch.failed),
        metadata=batch.metadata,
        **ended,
    )


_ENDS = ("completed", "failed", "expired", "cancelled")


def page_of(found: Sequence[Any], limit: int) -> Page:
    """The first `limit` of the objects as a page."""
    data = [*found[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return Page(data=data, first_id=first, last_id=last, has_more=len(found) > limit)
