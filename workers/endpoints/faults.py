"""Whose fault it is when an endpoint does not answer: its own, or the request's. Pure."""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError, cut

LONGEST_WAIT = 300.0
"""Most seconds for which a `Retry-After` is obeyed before the endpoint is asked again."""

BUSY_FOR = 1.0
"""Seconds until an endpoint is asked again that was busy and did not say for how long."""

_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
"""The `code` of OpenAI and vLLM, and the `type` of llama.cpp, for a prompt that does not fit."""

_OWN_FAULT = re.compile(
    r"(Expected '|Missing (?!model)|[Uu]nsupported |Invalid |Failed to parse (messages|tools|grammar)|"
    r"JSON schema conversion failed|\[json\.exception)"
)
"""How llama.cpp refuses a chat's fields with the status 500. Source: its common/chat.cpp, and its JSON reader."""

_MOST = 500  # characters of an engine's message


class FaultKind(StrEnum):
    """What became of the request: it never ran, the endpoint had no capacity for it, or it may have run."""

    UNREACHED = "unreached"
    BUSY = "busy"
    BROKEN = "broken"


class EndpointError(Exception):
    """An endpoint failed, not the request: the job may run elsewhere. `retry_after` is seconds, of one that is busy."""

    def __init__(self, kind: FaultKind, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.retry_after = retry_after


def refused(status: int, headers: Mapping[str, str], body: bytes, now: float) -> EndpointError | TaxiwayError:
    """What a status other than 200 means; `now` is Unix time.

    An endpoint that refuses the worker itself (its key, its path, the model's name) is wrongly configured, and the
    request never ran there.
    """
    said, marks = _message(body)
    text = f"{status}{': ' if said else ''}{said}"
    if status == 413 or (status in (400, 422) and any(mark in _TOO_LONG for mark in marks)):
        return RequestTooLargeError(f"the endpoint refuses the request: {text}")
    if status in (400, 422) or (status == 500 and "server_error" in marks and _OWN_FAULT.match(said)):
        return InvalidRequestError(f"the endpoint refuses the request: {text}")
    if status == 429 or (status == 503 and "Retry-After" in headers):
        wait = retry_after(headers.get("Retry-After", ""), now)
        return EndpointError(FaultKind.BUSY, f"the endpoint is busy: {text}", wait)
    if status >= 500 or status == 408:
        return EndpointError(FaultKind.BROKEN, f"the endpoint failed: {text}")
    return EndpointError(FaultKind.UNREACHED, f"the endpoint does not accept the worker's requests: {text}")


def retry_after(text: str, now: float) -> float:
    """Seconds of a `Retry-After` header (RFC 9110, 10.2.3): a number or a date; `BUSY_FOR` if it is neither."""
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), LONGEST_WAIT)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return BUSY_FOR
    return min(max(at - now, 0.0), LONGEST_WAIT)


def _message(body: bytes) -> tuple[str, tuple[Any, ...]]:
    """The error's text in the forms that engines have, and the marks that tell what it is about."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body[:_MOST].decode(errors="replace").strip(), ()
    error = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return cut(str(error), _MOST), ()
    text = error.get("message", error.get("detail", ""))
    return cut(str(text), _MOST), (error.get("code"), error.get("type"))
