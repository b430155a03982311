"""Every error in the HTTP door's one form: `{"error", "code", "details"}` under the error's status."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from router.service.admission import too_large
from tasks.logs import redacted
from taxiway.errors import InvalidRequestError, RequestError, RequestTooLargeError, TaxiwayError, UnauthenticatedError

logger = logging.getLogger(__name__)

_TOO_LARGE = 413
_LONGEST_FIGURE = 19  # digits of a length that is quoted

UNFORESEEN = "the router failed to answer; its log says why"
"""The message to a caller after an unexpected error."""


def taxiway_error(_request: Request[Any, Any, Any], error: TaxiwayError) -> Response[bytes]:
    """The answer to one of our errors."""
    return _answer(error, error.status)


def protocol_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """The answer to an HTTP-level error: path, method, body, query."""
    path = request.url.path
    if isinstance(error, ValidationException):
        field = next((str(e.get("key")) for e in error.extra or () if isinstance(e, dict)), "query")
        return _answer(InvalidRequestError(f"{field}: {error.detail}", field=field), error.status_code)
    if error.status_code == _TOO_LARGE:
        return _answer(_over_limit(request), _TOO_LARGE)
    return _answer(RequestError(f"{request.method} {path}: {error.detail}", path=path), error.status_code)


def _over_limit(request: Request[Any, Any, Any]) -> RequestTooLargeError:
    """The error for a body that was not read, worded as for messages that arrive by the broker."""
    most = request.app.request_max_body_size
    length = request.headers.get("content-length", "")
    got = int(length) if length.isdecimal() and len(length) < _LONGEST_FIGURE else "more"
    return RequestTooLargeError(too_large(most, got), limit="payload", most=most, got=got)


def unforeseen_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The answer to an unexpected error; the log has the details."""
    shown = unforeseen(request.method, request.url.path, error)
    return _answer(shown, shown.status)


def unforeseen(method: str, path: str, error: Exception) -> TaxiwayError:
    """The error to answer after an unexpected one, which is logged."""
    logger.error("request failed", extra={"method": method, "path": path}, exc_info=error)
    return TaxiwayError(UNFORESEEN)


def headers_of(error: TaxiwayError) -> dict[str, str]:
    """The headers of the answer to `error`."""
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = "Bearer"
    return headers


def body_of(error: TaxiwayError) -> bytes:
    """The JSON body of the answer to `error`."""
    content = {"error": redacted(error.message), "code": error.code, "details": error.details}
    return msgspec.json.encode(content, enc_hook=str)


def _answer(error: TaxiwayError, status: int) -> Response[bytes]:
    return Response(body_of(error), status_code=status, headers=headers_of(error))
