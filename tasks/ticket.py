"""A router's order to a worker: what to run, until when, at what price. Signed, and carried in the message's header.

The signature covers all that decides what runs, the body's digest among it, so a worker runs nothing that no router
ordered. It does not cover the queue: a waiting message may move between the classes that the ticket allows.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import msgspec

_canonical = msgspec.json.Encoder(order="deterministic")


class TicketError(Exception):
    """A message's ticket is missing, altered or not for this place."""


class Ticket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One placement as a worker needs it.

    `variants` maps every hardware class that the job may run on to the variant it runs there. `accepted` and
    `deadline_at` are seconds by the store's clock, `deadline_at` 0 where there is none; `prices` are in US dollars an
    hour.
    """

    job: str
    task: str
    model: str
    variants: dict[str, str]
    prices: dict[str, float]
    accepted: float
    deadline_at: float
    level: int
    reason: str
    reply: str = ""
    digest: str = ""
    signature: str = ""


def sign(ticket: Ticket, body: bytes, key: bytes) -> Ticket:
    """The ticket with `body`'s digest and a signature by `key`."""
    unsigned = msgspec.structs.replace(ticket, digest=hashlib.sha256(body).hexdigest(), signature="")
    return msgspec.structs.replace(unsigned, signature=_signature(unsigned, key))


def read_ticket(header: Mapping[str, Any] | str | None, body: bytes, key: bytes) -> Ticket:
    """The ticket in a message's header: a mapping, or the same as JSON text where a broker rounds numbers.

    Raises:
        TicketError: it is missing, malformed, signed by another key, or for another body.
    """
    if header is None:
        raise TicketError("expected a ticket in the message's header, got none")
    try:
        ticket = (
            msgspec.json.decode(header, type=Ticket) if isinstance(header, str) else msgspec.convert(header, Ticket)
        )
        expected = _signature(msgspec.structs.replace(ticket, signature=""), key)
        ours = hmac.compare_digest(ticket.signature.encode(), expected.encode())
    except (ValueError, OverflowError) as error:
        raise TicketError(f"expected a ticket: {error}") from error
    if not ours:
        raise TicketError("expected a ticket signed by a router of this fleet")
    if ticket.digest != hashlib.sha256(body).hexdigest():
        raise TicketError("expected the body that the ticket was signed for")
    return ticket


def _signature(unsigned: Ticket, key: bytes) -> str:
    return hmac.new(key, _canonical.encode(unsigned), hashlib.sha256).hexdigest()
