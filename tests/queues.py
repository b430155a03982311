"""The text of a queues.yaml for tests, by what matters in them."""

import json
from collections.abc import Mapping
from typing import Any

STANDARD = {"standard": {"deadline": 60}}


def engine_class(url: Any, *, slots: int = 4, price: float = 1, **endpoint: Any) -> dict[str, Any]:
    """A class of endpoints at an address, or some, that speak OpenAI's protocol unless it is given."""
    fields = {"protocol": "openai", "url": url, "slots": slots, **endpoint}
    return {"device": "endpoint", "endpoint": fields, "price": {"usd_per_hour": price}}


def queues_of(
    classes: Mapping[str, Any] | Any, services: Mapping[str, Any] = STANDARD, limits: Mapping[str, Any] | None = None
) -> str:
    """Classes by name; the first service is the default."""
    document = {"hardware": classes, "service": services, "default_service": next(iter(services))}
    return json.dumps(document | ({"limits": limits} if limits else {}), indent=1)
