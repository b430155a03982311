"""Every error taxiway raises, and whose fault each is.

    TaxiwayError
    ├── RequestError               the request's fault: sending it again gives the same answer
    │   ├── InvalidRequestError        a field is wrong
    │   ├── UnauthenticatedError       no key came with it, or none that is good
    │   ├── ForbiddenError             its key may not ask for that
    │   ├── UnknownModelError          no such model, version or alias
    │   ├── UnknownJobError            no such job
    │   ├── UnknownLetterError         no such dead letter
    │   ├── ResultExpiredError         the job's result was kept for its time and is gone
    │   ├── RequestTooLargeError       over a named limit
    │   ├── IdempotencyConflictError   its key was first used for another request
    │   ├── UnsupportedEncodingError   its body is compressed in a way that the door does not read
    │   └── UnplaceableError           no device of this fleet can ever run it
    ├── FleetUnavailable           the fleet's fault: the same request may succeed later
    │   ├── BrokerUnavailableError     the broker, the state store or a router does not answer
    │   │   └── BrokerFullError            it has no memory, or no disk, left
    │   ├── NoDeviceError              the devices that could run it are not there now
    │   ├── ModelUnavailableError      the model's description or files are wrong: an operator repairs them
    │   ├── DeviceFaultError           the device failed while it ran the job, and so did its retries
    │   ├── OverloadedError            the queues cannot drain in time, or its tenant spent its day's money
    │   ├── RateLimitedError           its tenant asks a router too often
    │   └── ResultTimeoutError         the caller's own wait ran out; the job goes on
    └── JobError                   an accepted job ended without an answer
        ├── DeadlineExceededError      its deadline passed before it was answered
        ├── JobCancelledError          somebody cancelled it
        ├── ExecutionError             the model failed while running it
        └── DeadLetteredError          it was given up after repeated deliveries

A class's `status` is the answer of the HTTP door and `exit_code` the command line's; `code` is the same word at every
door. `docs/errors.md` says what to do about each.
"""

from __future__ import annotations

from typing import Any, ClassVar

from taxiway.contract.quoting import cut, quoted

MAX_ERROR = 4096
"""Most bytes, in UTF-8, of an error's text and of each text in its details, wherever they are stored or sent."""


def bounded(text: str) -> str:
    """`text` as it can be stored and sent: at most `MAX_ERROR` bytes of UTF-8, with lone surrogates escaped."""
    encoded = text[: MAX_ERROR + 1].encode(errors="backslashreplace")
    if len(encoded) <= MAX_ERROR:
        return encoded.decode()
    return encoded[: MAX_ERROR - len("…".encode())].decode(errors="ignore") + "…"


class TaxiwayError(Exception):
    """Base of all errors; `details` holds plain values (field names, near names, seconds).

    What a model, a library or a producer wrote may be part of the text, so it is `bounded`.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, /, **details: Any) -> None:
        self.message = bounded(message)
        super().__init__(self.message)
        self.details: dict[str, Any] = {name: _bounded_detail(value) for name, value in details.items()}

    @property
    def retry_after(self) -> float | None:
        """Seconds after which trying again makes sense, where the fleet could tell."""
        return self.details.get("retry_after")


class RequestError(TaxiwayError):
    """The request cannot succeed as it is."""

    code = "request_error"
    status = 400
    exit_code = 2


class InvalidRequestError(RequestError):
    """A field of the request is wrong; `details["field"]` names it."""

    code = "invalid_request"


class UnauthenticatedError(RequestError):
    """The request came without a key that this door knows and whose time is not over."""

    code = "unauthenticated"
    status = 401


class ForbiddenError(RequestError):
    """Its key lacks the scope for that (`details["scope"]`), or is another tenant's than it names."""

    code = "forbidden"
    status = 403


class UnknownModelError(RequestError):
    """No model, version or alias of that name; `details["near"]` lists close names."""

    code = "unknown_model"
    status = 404


class UnknownJobError(RequestError):
    """No job of that id is known to the fleet."""

    code = "unknown_job"
    status = 404


class UnknownLetterError(RequestError):
    """No dead letter of that id is kept."""

    code = "unknown_letter"
    status = 404


class ResultExpiredError(RequestError):
    """The job ended and its result was kept for its time; it is gone."""

    code = "result_expired"
    status = 410


class RequestTooLargeError(RequestError):
    """The request is over a limit; `details["limit"]` names it."""

    code = "too_large"
    status = 413


class IdempotencyConflictError(RequestError):
    """Its idempotency key was first used for another request: `details["first"]` and `["got"]` are their digests."""

    code = "idempotency_conflict"
    status = 409


class UnsupportedEncodingError(RequestError):
    """Its body has a content encoding that the door does not read; `details["accepted"]` names what it reads."""

    code = "unsupported_encoding"
    status = 415


class UnplaceableError(RequestError):
    """No device of this fleet can ever run it; `details["refusals"]` has each candidate's reason."""

    code = "unplaceable"
    status = 422


class FleetUnavailable(TaxiwayError):
    """The fleet cannot take or answer it now."""

    code = "unavailable"
    status = 503
    exit_code = 4


class BrokerUnavailableError(FleetUnavailable):
    """The broker, the state store or a router did not answer in time."""

    code = "broker_unavailable"


class BrokerFullError(BrokerUnavailableError):
    """The broker or the state store has no memory or no disk left for more; nothing that was accepted is lost."""

    code = "broker_full"


class NoDeviceError(FleetUnavailable):
    """Devices that could run it are configured, and none is live."""

    code = "no_device"


class ModelUnavailableError(FleetUnavailable):
    """The model is in the fleet's catalogue and disabled; `details["reason"]` says what is wrong with it."""

    code = "model_unavailable"


class DeviceFaultError(FleetUnavailable):
    """The device that ran the job failed, not the job: it was out of memory, and stayed so for all retries."""

    code = "device_fault"


class OverloadedError(FleetUnavailable):
    """The queues cannot drain in time for it, or its tenant has spent what it may today: `details["tenant"]`."""

    code = "overloaded"
    status = 429


class RateLimitedError(FleetUnavailable):
    """The tenant (`details["tenant"]`) asks a router too often, or for too much at once; no body was read."""

    code = "rate_limited"
    status = 429


class ResultTimeoutError(FleetUnavailable, TimeoutError):
    """The caller waited as long as it said; the job goes on and its id stays good."""

    code = "result_timeout"
    status = 504


class JobError(TaxiwayError):
    """An accepted job ended without an answer."""

    code = "job_error"


class DeadlineExceededError(JobError):
    """The job's deadline passed before it was answered."""

    code = "deadline_exceeded"
    status = 504


class JobCancelledError(JobError):
    """The job was cancelled."""

    code = "cancelled"
    status = 409


class ExecutionError(JobError):
    """The model failed while running the job."""

    code = "execution_failed"


class DeadLetteredError(JobError):
    """The job was given up after repeated deliveries."""

    code = "dead_lettered"


def wrong_field(field: str, expected: str, value: object) -> InvalidRequestError:
    """The error for a field with a value that was not expected."""
    return InvalidRequestError(f"{cut(field)}: expected {expected}, got {quoted(value)}", field=cut(field))


def _bounded_detail(value: Any) -> Any:
    """A detail whose texts are bounded."""
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
    """The error whose class has `code` as its own; unknown codes give the base class."""
    by_code = {kind.code: kind for kind in _tree(TaxiwayError).values() if "code" in vars(kind)}
    return by_code.get(code, TaxiwayError)(message, **(details or {}))
