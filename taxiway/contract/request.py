"""A producer's request: a model, inputs, and service terms. The same at every interface."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeGuard, get_args

import msgspec

from taxiway.contract.limits import check_values
from taxiway.errors import QUOTED, InvalidRequestError, invalid, unreadable, wrong_field

Priority = Literal["high", "normal", "low"]

EventType = Literal[
    "job.completed",
    "job.failed",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
]
"""What a webhook endpoint can be notified of."""

LONGEST_DEADLINE = 30 * 86400
"""Most seconds of a deadline: the store keeps a job's record until then."""

MAX_NAME = 256
"""Most characters of a tenant, model reference or idempotency key."""


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Service terms: how much the answer matters, and where the data may go."""

    deadline: float | None = None
    """Seconds from acceptance."""
    service: str | None = None
    """A set of defaults in queues.yaml."""
    priority: Priority | None = None
    budget: float | None = None
    """US dollars."""
    tenant: str = "default"
    locality: str | None = None
    """A label that every device on the request's path must carry, such as `edge`; or several, with `+`."""
    min_accuracy: float | None = None
    """Least stated accuracy of the variant, 0 to 1."""
    idempotency_key: str | None = None
    """Requests with the same tenant and key are one job."""
    stream: bool | Literal["rows"] | None = None
    """Stream a generated answer: that of the only row, or by `rows` that of each."""
    webhook: str | None = None
    """An endpoint of the tenant's that is notified of the end."""


class Request(Terms, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The keyword arguments of the task `taxiway.infer`: a model, its inputs and the terms.

    `inputs` is a plain value where the model has one input, a mapping by name, or a list of OIP tensors;
    `outputs` names the outputs to return (all, if empty); `parameters` go to the model (`max_tokens`, …).
    """

    model: str
    inputs: Any
    parameters: dict[str, Any] = {}
    outputs: tuple[str, ...] = ()


TERMS = frozenset(Terms.__struct_fields__)
_FIELDS = frozenset(Request.__struct_fields__)


def parse_request(fields: Mapping[str, Any]) -> Request:
    """The request from plain keyword arguments; None means that a field is not set.

    Raises:
        InvalidRequestError: a field is unknown, missing or out of range; names it.
        RequestTooLargeError: inputs or parameters have too many values.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if not given.keys() <= _FIELDS:
        raise _unknown(next(str(name)[:QUOTED] for name in given if name not in _FIELDS))
    for name in ("model", "inputs"):
        if name not in given:
            raise invalid(name, "a value", "nothing")
    _check(given)
    try:
        request = msgspec.convert(given, Request)
    except msgspec.ValidationError as error:
        raise unreadable(error) from error
    check_content(request)
    return request


def parse_terms(fields: Mapping[str, Any]) -> Terms:
    """Service terms alone, as `parse_request` reads them."""
    given = {name: value for name, value in fields.items() if value is not None}
    _check(given)
    return Terms(**given)


def check_content(request: Request) -> None:
    """Reject inputs and parameters that some part of the fleet could not encode or decode.

    Raises:
        InvalidRequestError: a value is nested too deeply, or has text that UTF-8 cannot encode.
        RequestTooLargeError: there are too many values.
    """
    check_values(request.inputs, "inputs")
    if request.parameters:
        check_values(request.parameters, "parameters")


def check_terms(terms: Terms) -> None:
    """Reject invalid terms.

    Raises:
        InvalidRequestError: names the field, what was expected and what was given.
    """
    _check({name: getattr(terms, name) for name in terms.__struct_fields__})


def _check(given: Mapping[str, Any]) -> None:
    for field, value in given.items():
        if value is not None and field in _MEANS:
            means, expected = _MEANS[field]
            if not means(value):
                raise _invalid(field, expected, value)


def new_id() -> str:
    """A random UUID (version 4), in a third of the time of `uuid.uuid4`."""
    return uuid_of(os.urandom(16).hex(), 4)


def uuid_of(digits: str, version: int) -> str:
    """The UUID of this version with the first 32 of these hexadecimal digits."""
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-{version}{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def _unknown(name: str) -> InvalidRequestError:
    near = difflib.get_close_matches(name, _FIELDS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    message = f"{name or repr(name)}: expected no such field, but one of {sorted(_FIELDS)}{hint}"
    return InvalidRequestError(message, field=name)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_name(value: object) -> TypeGuard[str]:
    """Whether `value` is a valid name: 1 to `MAX_NAME` printable characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


_PRIORITIES = [*get_args(Priority)]

_MEANS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "deadline": (
        lambda it: _is_number(it) and 0 < it <= LONGEST_DEADLINE,
        f"a number of seconds > 0 and at most {LONGEST_DEADLINE} (30 days)",
    ),
    "budget": (lambda it: _is_number(it) and 0 < it <= sys.float_info.max, "a finite number > 0"),
    "min_accuracy": (lambda it: _is_number(it) and 0 <= it <= 1, "a number from 0 to 1"),
    "stream": (lambda it: isinstance(it, bool) or (isinstance(it, str) and it == "rows"), "true or false"),
    "priority": (_PRIORITIES.__contains__, f"one of {_PRIORITIES}"),
    **dict.fromkeys(
        ("tenant", "locality", "service", "idempotency_key", "webhook", "model"),
        (is_name, f"text of 1 to {MAX_NAME} printable characters"),
    ),
}
"""For each field, its validity test and a description of valid values."""


def _invalid(field: str, expected: str, value: object) -> InvalidRequestError:
    if isinstance(value, float) and value.is_integer():  # JSON and Python print it differently
        value = int(value)
    return wrong_field(field, expected, value)
