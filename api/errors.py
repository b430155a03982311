"""Every error under its status: in OpenAI's form at that protocol's paths, elsewhere `{"error", "code", "details"}`."""

from __future__ import annotations

import logging
import math
from collections.abc import Set
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from api import openai_errors as openai
from api.answers import JSON, HttpAnswer
from router.service.admission import too_large
from tasks.telemetry import redacted
from taxiway.errors import InvalidRequestError, RequestError, RequestTooLargeError, TaxiwayError, UnauthenticatedError

logger = logging.getLogger(__name__)

_NOT_FOUND, _TOO_LARGE = 404, 413

UNFORESEEN = "the router failed to answer; its log says why"
"""The message to a caller after an unexpected error."""


def error_answer(error: TaxiwayError, path: str, status: int = 0) -> HttpAnswer:
    """The answer to `error` of a request to `path`; `status` if another than the error's own."""
    if openai.is_path(path):
        return openai.error_form(error, path, status or error.status, headers_of(error))
    return HttpAnswer(status or error.status, headers_of(error), (body_of(error),))


def taxiway_error(request: Request[Any, Any, Any], error: TaxiwayError, status: int = 0) -> Response[bytes]:
    """The answer to one of our errors; `status` if another than the error's own."""
    answered = error_answer(error, request.url.path, status)
    return Response(b"".join(answered.pieces), status_code=answered.status, headers=answered.headers)


def protocol_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """The answer to an HTTP-level error: path, method, body, query."""
    path = request.url.path
    if isinstance(error, ValidationException):
        wrong: dict[str, Any] = next((one for one in error.extra or () if isinstance(one, dict)), {})
        field = str(wrong.get("key", "query"))
        message = f"{field}: {wrong.get('message', error.detail)}"
        return taxiway_error(request, InvalidRequestError(message, field=field), error.status_code)
    if error.status_code == _TOO_LARGE:
        most: Any = request.app.request_max_body_size
        length = request.headers.get("content-length", "")  # of a body that was not read
        return taxiway_error(request, over_limit(most, int(length) if length else "more"), _TOO_LARGE)
    message = f"{request.method} {path}: {error.detail}"
    if error.status_code == _NOT_FOUND:
        message += _hint(path, {route.path for route in request.app.routes})
    return taxiway_error(request, RequestError(message, path=path), error.status_code)


def _hint(path: str, known: Set[str]) -> str:
    """What the caller of an unknown path may have meant: a base URL often lacks `/v1`, or has it twice."""
    for near in (f"/v1{path.rstrip('/')}", path.rstrip("/").removeprefix("/v1")):
        if near in known:
            return f"; did you mean {near}?"
    return "; /docs lists all paths"


def over_limit(limit: int, got: int | str) -> RequestTooLargeError:
    """The error for a body of `got` bytes, worded as for messages that arrive by the broker."""
    return RequestTooLargeError(too_large(limit, got), limit="payload", most=limit, got=got)


def unforeseen_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The answer to an unexpected error; the log has the details."""
    return taxiway_error(request, unforeseen(request.method, request.url.path, error))


def unforeseen(method: str, path: str, error: Exception) -> TaxiwayError:
    """The error to answer after an unexpected one, which is logged."""
    logger.error("request failed", extra={"method": method, "path": path}, exc_info=error)
    return TaxiwayError(UNFORESEEN)


def headers_of(error: TaxiwayError) -> dict[str, str]:
    """The headers of the answer to `error`."""
    headers = dict(JSON)
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = "Bearer"
    return headers


def body_of(error: TaxiwayError) -> bytes:
    """The JSON body of the answer to `error`."""
    content = {"error": redacted(error.message), "code": error.code, "details": error.details}
    return msgspec.json.encode(content, enc_hook=str)
