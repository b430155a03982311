"""Service terms of a request in its headers and its body: the same at every endpoint that makes jobs. Pure.

A header `X-Taxiway-…` that names no term is refused, because its job would run without what it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from taxiway.contract.request import TERMS
from taxiway.errors import InvalidRequestError, cut, wrong_field


class Header(NamedTuple):
    """The term that a header sets, and its meaning."""

    term: str
    meaning: str


HEADERS: Mapping[str, Header] = {
    "X-Taxiway-Deadline": Header("deadline", "Seconds from acceptance, instead of the service's deadline."),
    "X-Taxiway-Budget": Header("budget", "The most that the request may cost, in US dollars."),
    "X-Taxiway-Locality": Header("locality", "A label that every device on the way must have."),
    "X-Taxiway-Service": Header("service", "The service of queues.yaml whose terms are the defaults."),
    "X-Taxiway-Priority": Header("priority", "`high`, `normal` or `low`."),
    "X-Taxiway-Min-Accuracy": Header("min_accuracy", "The least stated accuracy of the variant, from 0 to 1."),
    "Idempotency-Key": Header("idempotency_key", "Calls with the same key are one job."),
    "X-Taxiway-Webhook": Header("webhook", "A webhook endpoint that is notified of the end: its name, id or address."),
}
"""The headers that give terms."""

HEADER_OF: Mapping[str, str] = {its.term: header for header, its in HEADERS.items()}
"""The header that gives a term."""

BODY_TERMS = TERMS - {"stream"}
"""Fields of OpenAI's bodies that are terms, as an SDK's `extra_body` gives them; a call's `stream` is its own."""

_BY_NAME = {header.lower().encode(): (header, its.term) for header, its in HEADERS.items()}
_HEADER_PREFIX = b"x-taxiway-"
_DIGITS = frozenset("+-.0123456789Ee")  # `float` reads more, such as underscores
_NUMBERS = ("deadline", "budget", "min_accuracy")


def terms_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The terms among the fields of one of OpenAI's bodies."""
    return {name: fields[name] for name in BODY_TERMS & fields.keys() if fields[name] is not None}


def add_terms(headers: Iterable[tuple[bytes, bytes]], given: dict[str, Any], refused: Mapping[str, str] = {}) -> None:
    """Add the terms in a request's headers to those `given` in its body.

    `refused` says of terms that the endpoint does not read what it reads instead.

    Raises:
        InvalidRequestError: a header names no term, or has no such value; a term is given twice, or is refused.
    """
    for name, value in headers:
        if name.startswith(_HEADER_PREFIX) or name in _BY_NAME:
            header, term = _BY_NAME.get(name) or _unknown(name)
            text = value.decode("latin-1")
            if given.get(term) is not None:
                raise wrong_field(term, f"it once, in the body or as {header}", text)
            given[term] = _number(header, text) if term in _NUMBERS else text
    for term, instead in refused.items():
        if given.get(term) is not None:
            raise wrong_field(term, instead, given[term])


def _unknown(name: bytes) -> tuple[str, str]:
    field = cut(name.decode("latin-1"))
    message = f"{field}: expected no such header, but one of {', '.join(HEADERS)}"
    raise InvalidRequestError(message, field=field)


def _number(header: str, text: str) -> float:
    try:
        number = float(text) if _DIGITS.issuperset(text) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise wrong_field(header, "a number", text)
    return number
