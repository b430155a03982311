"""The error classes, grouped by cause: request, fleet or job.

A `RequestError` is the request's fault: a retry gives the same answer. `FleetUnavailable` is the fleet's: a retry may
succeed. A `JobError` ended a job that was accepted.

A class's `status` is the HTTP status, `exit_code` the command line's exit code, and `code` its name at every interface.
`docs/errors.md` says what to do about each.

Errors quote values of a request shortened (`quoted`), without reading all of a large one.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar

import msgspec

QUOTED = 200
"""Most characters that an error quotes of one value."""

_DIGITS = 14_000
"""Integers up to this many bits are printed: Python refuses to print more than 4,300 digits."""


class _Short(reprlib.Repr):
    """`reprlib` for types of which it reads the whole value: bytes, mappings (it sorts them), large integers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 3, 3, 120, 120

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= _DIGITS else f"an integer of {x.bit_length()} bits"

    def repr_bytes(self, x: bytes | bytearray | memoryview, level: int) -> str:
        return repr(bytes(x)) if len(x) <= self.maxother else f"{bytes(x[: self.maxother])!r}…"

    repr_bytearray = repr_memoryview = repr_bytes

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(x.items(), self.maxdict)]
        return "{" + ", ".join([*shown, *(["..."] if len(x) > self.maxdict else [])]) + "}"


_short = _Short()


def cut(text: str, most: int = QUOTED) -> str:
    """`text`, truncated to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def quoted(value: object) -> str:
    """A value's repr in at most `QUOTED` characters."""
    return cut(_short.repr(value))


def flaw(error: OSError | UnicodeError) -> str:
    """Why a file or a text cannot be read, without the file's name: `no such file or directory`."""
    match error:
        case UnicodeDecodeError():
            return f"the byte 0x{error.object[error.start]:02x} at position {error.start}"
        case UnicodeEncodeError():
            return f"a lone surrogate ({error.object[error.start]!a}) at character {error.start}"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


MAX_ERROR = 4096
"""Maximum UTF-8 bytes of an error's text, and of each text in its details, when stored or sent."""


def bounded(text: str) -> str:
    """`text` made storable: at most `MAX_ERROR` bytes of UTF-8, with lone surrogates escaped."""
    encoded = text[: MAX_ERROR + 1].encode(errors="backslashreplace")
    if len(encoded) <= MAX_ERROR:
        return encoded.decode()
    return encoded[: MAX_ERROR - len("…".encode())].decode(errors="ignore") + "…"


class TaxiwayError(Exception):
    """Base class of all errors; `details` holds plain values (field names, similar names, seconds).

    The text may quote a model, a library or a producer, so it is `bounded`.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, *, code: str = "", status: int = 0, exit_code: int = 0) -> None:
        """A class gives those of the three in which it differs from its base."""
        if code:
            cls.code = code
        if status:
            cls.status = status
        if exit_code:
            cls.exit_code = exit_code

    def __init__(self, message: str, /, **details: Any) -> None:
        self.message = bounded(message)
        super().__init__(self.message)
        self.details: dict[str, Any] = {name: _bounded_detail(value) for name, value in details.items()}

    @property
    def retry_after(self) -> float | None:
        """Seconds after which to retry, if the fleet can estimate them."""
        return self.details.get("retry_after")


class RequestError(TaxiwayError, code="request_error", status=400, exit_code=2):
    """The request cannot succeed unchanged."""


class InvalidRequestError(RequestError, code="invalid_request"):
    """A field of the request is invalid; `details["field"]` names it."""


class UnauthenticatedError(RequestError, code="unauthenticated", status=401):
    """The request has no API key, or one that is unknown or expired."""


class ForbiddenError(RequestError, code="forbidden", status=403):
    """Its key lacks the required scope (`details["scope"]`), or belongs to another tenant than the request names."""


class UnknownModelError(RequestError, code="unknown_model", status=404):
    """No model, version or alias of that name; `details["near"]` lists similar names."""


class UnknownJobError(RequestError, code="unknown_job", status=404):
    """No job of that id is known to the fleet."""


class UnknownLetterError(RequestError, code="unknown_letter", status=404):
    """No dead letter of that id is kept."""


class UnknownObjectError(RequestError, code="unknown_object", status=404):
    """No file, batch, response or webhook endpoint of that id is known to the fleet, or it is another tenant's."""


class ResultExpiredError(RequestError, code="result_expired", status=410):
    """The job ended and its result has expired."""


class RequestTooLargeError(RequestError, code="too_large", status=413):
    """The request is over a limit; `details["limit"]` names it."""


class IdempotencyConflictError(RequestError, code="idempotency_conflict", status=409):
    """Its idempotency key was first used for another request: `details["first"]` and `["got"]` are their digests."""


class UnsupportedEncodingError(RequestError, code="unsupported_encoding", status=415):
    """Its body has an unsupported content encoding; `details["accepted"]` lists the supported ones."""


class UnplaceableError(RequestError, code="unplaceable", status=422):
    """No device class of this fleet can run it; `details["refusals"]` has the reason for each candidate."""


class SealedError(RequestError, code="sealed", status=403):
    """A payload is sealed with `details["keys"]`, of which one is not here, or it was altered."""


class FleetUnavailable(TaxiwayError, code="unavailable", status=503, exit_code=4):
    """The fleet cannot accept or answer the request now."""


class BrokerUnavailableError(FleetUnavailable, code="broker_unavailable"):
    """The state store, which Celery calls the broker, or a router did not answer in time."""


class BrokerFullError(BrokerUnavailableError, code="broker_full"):
    """The state store is out of `details["resource"]`, memory or disk; no accepted job is lost."""


class NoDeviceError(FleetUnavailable, code="no_device"):
    """Suitable devices are configured, but none is live."""


class ModelUnavailableError(FleetUnavailable, code="model_unavailable"):
    """The model is in the fleet's catalogue but disabled; `details["reason"]` says why."""


class DeviceFaultError(FleetUnavailable, code="device_fault"):
    """The device failed, not the job, for all retries too: it was out of memory, or an endpoint gave no answer."""


class OverloadedError(FleetUnavailable, code="overloaded", status=429):
    """The queues cannot drain in time, or its tenant has spent its daily budget: `details["tenant"]`."""


class RateLimitedError(FleetUnavailable, code="rate_limited", status=429):
    """The tenant (`details["tenant"]`) exceeded its request or byte rate; the body was not read."""


class ResultTimeoutError(FleetUnavailable, TimeoutError, code="result_timeout", status=504):
    """The caller's timeout passed; the job continues and its id stays valid."""


class JobError(TaxiwayError, code="job_error"):
    """An accepted job ended without an answer."""


class DeadlineExceededError(JobError, code="deadline_exceeded", status=504):
    """The job's deadline passed before it had an answer."""


class JobCancelledError(JobError, code="cancelled", status=409):
    """The job was cancelled."""


class ExecutionError(JobError, code="execution_failed"):
    """The model failed while running the job."""


class DeadLetteredError(JobError, code="dead_lettered"):
    """The job was given up after repeated deliveries."""


def invalid(field: str, expected: str, got: object = "", **details: Any) -> InvalidRequestError:
    """The error for a field: what was expected of it, and what it is, in words."""
    shown = "" if got == "" else f", got {got}"
    return InvalidRequestError(f"{cut(field)}: expected {expected}{shown}", field=cut(field), **details)


def wrong_field(field: str, expected: str, value: object, **details: Any) -> InvalidRequestError:
    """The error for a field with an unexpected value."""
    return invalid(field, expected, quoted(value), **details)


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes or values that it cannot decode."""

_PLACE = re.compile(r"(?:`key` in )?`\$([^`]*)`")
_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*)`", re.DOTALL)


def unreadable(error: Exception, within: str = "", root: str = "") -> InvalidRequestError:
    """The error for one of `UNREADABLE`, which names the field, below `within`; `root` is where msgspec's paths begin.

    The only place that knows how msgspec words its errors, beside `tasks.document`.
    """
    if not isinstance(error, msgspec.ValidationError):
        field = within or "body"
        return InvalidRequestError(f"{field}: expected JSON: {cut(str(error))}", field=field)
    what, _, place = str(error).rpartition(" - at ")  # a pattern for both would try every place in a long name
    found = _PLACE.fullmatch(place) if what else None
    what, path = (what, found[1].removeprefix(root)) if found else (str(error), "")
    if named := _FIELD.fullmatch(what):
        path = f"{path}.{named[1]}"
        what = "expected a value, got nothing" if "missing" in what else "expected no such field"
    field = cut(f"{within}{path}".strip(".") or "body")
    return InvalidRequestError(f"{field}: {what[0].lower()}{cut(what[1:])}", field=field)


def _bounded_detail(value: Any) -> Any:
    """The detail with its texts bounded."""
    if isinstance(value, str):
        return bounded(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_bounded_detail, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {name: _bounded_detail(below) for name, below in value.items()}
    return value


def _tree(root: type[TaxiwayError]) -> dict[str, type[TaxiwayError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def error_from(name: str, message: str, details: dict[str, Any] | None = None) -> TaxiwayError:
    """The error of class `name`, or an `ExecutionError` naming a class that is not ours."""
    known = _tree(TaxiwayError).get(name)
    if known is None:
        return ExecutionError(f"{name}: {message}", **(details or {}))
    return known(message, **(details or {}))


def error_of_code(code: str, message: str, details: dict[str, Any] | None = None) -> TaxiwayError:
    """The error of the class with this `code`; an unknown code gives the base class."""
    by_code = {kind.code: kind for kind in _tree(TaxiwayError).values() if "code" in vars(kind)}
    return by_code.get(code, TaxiwayError)(message, **(details or {}))
