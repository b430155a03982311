"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`. Pure.

The SDK retries 408, 409, 429 and 5xx unless `x-should-retry` says otherwise, after `retry-after` seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from api.answers import HttpAnswer
from api.terms import HEADER_OF
from tasks.telemetry import redacted
from taxiway.errors import (
    FleetUnavailable,
    ForbiddenError,
    IdempotencyConflictError,
    InvalidRequestError,
    JobError,
    OverloadedError,
    RateLimitedError,
    RequestError,
    RequestTooLargeError,
    TaxiwayError,
    UnauthenticatedError,
    UnknownModelError,
)

UNSUPPORTED = "unsupported"
"""Key in an error's details: the field is known, but the model or this server does not support it."""

JOB = "job"
"""Key in an error's details: the job that ended with it."""

_RETRY_AFTER = "1"  # seconds, if the fleet cannot estimate them
_OURS = "/v1/scaling/"  # was there before
_FIELDS = {"chat/completions": "messages", "completions": "prompt", "embeddings": "input"}
_RESPONSES = "/v1/responses"
_OF_RESPONSES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
"""What a chat's fields are called in a call for a response."""

_OF_CHAT = re.compile(r"inputs\.[^.\[]+\.([a-z].*)", re.DOTALL)
_OF_ROWS = re.compile(r"inputs(?:\.[^.\[]+)?((?:\.\d+|\[\d+\])?)")

_CODES: Mapping[type[TaxiwayError], str] = {
    UnauthenticatedError: "invalid_api_key",
    ForbiddenError: "insufficient_permissions",
    UnknownModelError: "model_not_found",
    RateLimitedError: "rate_limit_exceeded",
    InvalidRequestError: "invalid_value",
    IdempotencyConflictError: "idempotency_key_reused",
}
"""OpenAI's words for errors that it has too; any other error keeps its own code."""


class ErrorBody(msgspec.Struct, frozen=True):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorContent(msgspec.Struct, frozen=True):
    """The body of an answer to an error."""

    error: ErrorBody


_encode = msgspec.json.Encoder(enc_hook=str).encode


def is_path(path: str) -> bool:
    """Whether a path is one of OpenAI's API."""
    return path.startswith("/v1/") and not path.startswith(_OURS)


def error_form(error: TaxiwayError, path: str, status: int, headers: Mapping[str, str]) -> HttpAnswer:
    """The answer to an error of a request to `path`, under `status` unless OpenAI has another for it."""
    status, more = 400 if _is_context(error) else status, dict[str, str]()
    if status in (429, 503) and error.retry_after is None:
        more["retry-after"] = _RETRY_AFTER
    if isinstance(error, RequestError | JobError):
        more["x-should-retry"] = "false"
    if JOB in error.details:
        more["x-request-id"] = str(error.details[JOB])
    return HttpAnswer(status, {**headers, **more}, (content(error, path, status),))


def content(error: TaxiwayError, path: str, status: int = 0) -> bytes:
    """The body of the answer to an error."""
    param = param_of(error, path)
    message = redacted(error.message)
    field = str(error.details.get("field", ""))
    if param and field and message.startswith((f"{field}:", f"{field}[")):
        message = f"{param}{message[len(field) :]}"
    body = ErrorBody(message, _type_of(error, status or error.status), param, code_of(error, status))
    return _encode(ErrorContent(body))


def param_of(error: TaxiwayError, path: str) -> str | None:
    """The parameter that an error names, as the caller of `path` knows it."""
    if isinstance(error, UnknownModelError):
        return "model"
    asked = error.details.get("asked")  # what no variant honours
    if asked:
        return _named_at(path, str(asked[0]))
    field = str(error.details.get("field", ""))
    if not field or field == "body":
        return None
    chat = _OF_CHAT.fullmatch(field)
    if chat is not None:
        return _named_at(path, chat[1])
    rows = _OF_ROWS.fullmatch(field)
    if rows is not None:
        return _FIELDS.get(path.removeprefix("/v1/"), "input") + rows[1]
    return HEADER_OF.get(field, field.removeprefix("parameters."))


def _named_at(path: str, field: str) -> str:
    """The field of a chat as the caller of `path` knows it."""
    if path != _RESPONSES:
        return field
    head, *rest = re.split(r"(?=[.\[])", field, maxsplit=1)
    return _OF_RESPONSES.get(head, head) + "".join(rest)


def code_of(error: TaxiwayError, status: int = 0) -> str:
    """The error's code: OpenAI's word if it has one."""
    if _is_context(error):
        return "context_length_exceeded"
    if error.details.get("field") == "previous_response_id":
        return "previous_response_not_found"
    if error.details.get(UNSUPPORTED):
        return "unsupported_parameter"
    if isinstance(error, OverloadedError) and "tenant" in error.details:
        return "insufficient_quota"
    if status == 404 and type(error) is RequestError:
        return "unknown_url"
    return _CODES.get(type(error), error.code)


def _type_of(error: TaxiwayError, status: int) -> str:
    if isinstance(error, RateLimitedError):
        return "requests"
    if isinstance(error, OverloadedError) and "tenant" in error.details:
        return "insufficient_quota"
    if isinstance(error, FleetUnavailable) or status >= 500:
        return "server_error"
    return "invalid_request_error"


def _is_context(error: TaxiwayError) -> bool:
    """Whether messages and answer exceed what the model reads at once."""
    return isinstance(error, RequestTooLargeError) and str(error.details.get("field", "")).startswith("inputs")
