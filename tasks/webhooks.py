"""What the store keeps for webhooks: who is notified of an end, and the events that wait."""

from __future__ import annotations

import msgspec

from taxiway.contract.keys import job_key

HOOKS = "webhooks"
"""The field of a job's record that says which endpoints are notified of its end: `Notified` as JSON."""


class Notified(msgspec.Struct, frozen=True):
    """The endpoints that are notified of each ending of something, and the limits of their outboxes."""

    endpoints: dict[str, list[str]]
    most: int
    most_dead: int


class WebhookEvent(msgspec.Struct, frozen=True, array_like=True):
    """A waiting event: what ended and how."""

    id: str
    kind: str
    ending: str
    at: float
    """When it ended, by the store's clock."""
    about: str
    # Of a job's event, from its record
    model: str = ""
    state: str = ""
    meta: str = ""
    """The stored result, unless the job succeeded."""
    since: float = 0.0
    """Delivery is attempted from then on; 0: from `at`. A replay sets it."""

    @property
    def name(self) -> str:
        """The id of what ended."""
        return self.about.removeprefix(job_key(""))

    @property
    def begun(self) -> float:
        """The time from which on delivery is attempted."""
        return self.since or self.at
