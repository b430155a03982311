"""Service terms of a call: OpenAI's `service_tier` names a service of queues.yaml, and headers give the rest. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tasks.topology import Topology
from taxiway.errors import InvalidRequestError, quoted

HEADERS: Mapping[str, str] = {
    "X-Taxiway-Deadline": "deadline",
    "X-Taxiway-Budget": "budget",
    "X-Taxiway-Locality": "locality",
    "Idempotency-Key": "idempotency_key",
    "X-Taxiway-Webhook": "webhook",
}
"""The term that each header gives: seconds from acceptance, US dollars, a label, and text."""

_NUMBERS = ("deadline", "budget")
_AUTO = "auto"


def read_terms(headers: Mapping[str, str], tier: str | None, topology: Topology) -> dict[str, Any]:
    """The terms that a call's headers and its tier give.

    Raises:
        InvalidRequestError: names the header or parameter.
    """
    terms: dict[str, Any] = {"service": service_of(tier, topology)}
    for header, term in HEADERS.items():
        text = headers.get(header.lower())
        if text is not None:
            terms[term] = _number(header, text) if term in _NUMBERS else text
    return terms


def service_of(tier: str | None, topology: Topology) -> str:
    """The service that a tier selects.

    Raises:
        InvalidRequestError: queues.yaml has no service for it.
    """
    tiers = {service.tier: name for name, service in topology.service.items() if service.tier is not None}
    if tier in (None, _AUTO):
        return tiers.get("default", topology.default_service)
    known = {"default": topology.default_service, **tiers}
    if tier not in known:
        expected = f"one of {sorted([_AUTO, *known])}"
        message = f"service_tier: expected {expected}, got {quoted(tier)}"
        raise InvalidRequestError(message, field="service_tier", unsupported=True)
    return known[tier]


def tier_for_later(tier: str | None, topology: Topology) -> str | None:
    """The tier of work that nobody waits for: `flex` unless it asks for another, if there is a service for that."""
    tiers = {service.tier for service in topology.service.values()}
    return "flex" if tier in (None, _AUTO) and "flex" in tiers else tier


def tier_of(service: str, topology: Topology) -> str:
    """The tier that serves a job of a service."""
    return topology.service[service].tier or "default"


def _number(header: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise InvalidRequestError(f"{header}: expected a number > 0, got {quoted(text)}", field=header)
    return number
