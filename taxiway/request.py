"""What a producer asks for: a model, inputs, and service terms. The same at every door."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from taxiway.errors import InvalidRequestError

Priority = Literal["high", "normal", "low"]

_NAMESPACE = uuid.UUID("6b0f6a4e-6f0e-5f7e-9a52-1f3f3f5f2d11")
MAX_NAME = 256
"""Most characters of a tenant, model reference or idempotency key."""


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How much the answer matters, and where the data may go.

    `deadline` counts seconds from acceptance; `budget` is in US dollars; `locality` names a label that every device on the
    way must carry (`edge`); `service` names a set of defaults in queues.yaml.
    """

    deadline: float | None = None
    service: str | None = None
    priority: Priority | None = None
    budget: float | None = None
    tenant: str = "default"
    locality: str | None = None
    idempotency_key: str | None = None


class Request(Terms, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The keyword arguments of the task `taxiway.infer`: a model, its inputs and the terms.

    `inputs` is a plain value where the model has one input, a mapping by name, or a list of OIP tensors;
    `outputs` names the outputs wanted (all, when empty); `parameters` are the model's own (`max_tokens`, …).
    """

    model: str
    inputs: Any
    parameters: dict[str, Any] = {}
    outputs: tuple[str, ...] = ()


TERMS = frozenset(Terms.__struct_fields__)


def parse_request(fields: Mapping[str, Any]) -> Request:
    """The request that plain keyword arguments describe.

    Raises:
        InvalidRequestError: a field is unknown, missing or out of range; names it.
    """
    try:
        request = msgspec.convert(dict(fields), Request)
    except msgspec.ValidationError as error:
        raise _named(error) from error
    check_terms(request)
    return request


def check_terms(terms: Terms) -> None:
    """Refuse terms that mean nothing.

    Raises:
        InvalidRequestError: names the field, what was expected and what came.
    """
    for field in ("deadline", "budget"):
        number = getattr(terms, field)
        if number is not None and not (math.isfinite(number) and number > 0):
            raise _invalid(field, "a finite number > 0", number)
    if terms.priority is not None and terms.priority not in get_args(Priority):
        raise _invalid("priority", f"one of {list(get_args(Priority))}", terms.priority)
    for field in ("tenant", "locality", "service", "idempotency_key", "model"):
        text = getattr(terms, field, None)
        if text is not None and not (0 < len(text) <= MAX_NAME):
            raise _invalid(field, f"1 to {MAX_NAME} characters", text[:MAX_NAME])


def job_id(terms: Terms) -> str:
    """A new job's id; the same tenant and idempotency key always give the same one."""
    if terms.idempotency_key is None:
        return str(uuid.uuid4())
    return str(uuid.uuid5(_NAMESPACE, f"{terms.tenant}\n{terms.idempotency_key}"))


def _invalid(field: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: expected {expected}, got {value!r}", field=field)


def _named(error: msgspec.ValidationError) -> InvalidRequestError:
    """The validation error with its field in front, in our words."""
    what, _, where = str(error).partition(" - at `$")
    field = where.rstrip("`").lstrip(".") or what.rpartition("`")[0].rpartition("`")[2] or "request"
    return InvalidRequestError(f"{field}: {what[0].lower()}{what[1:]}", field=field)
