"""The ticket: a router's signed permission to run a job, with its expiry and prices, in the message's header.

It is one string, the signature followed by the ticket's JSON, so that no broker or codec can change what was signed.
The signature covers that JSON and the body: a worker runs only what a router signed. It does not cover the queue: a
waiting message may move between the classes that the ticket allows.

A fleet has one key, or several during key rotation: the first one signs, and all of them verify.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import msgspec

from tasks.queues.endpoints import Tariff
from taxiway.contract.keys import INFER
from taxiway.contract.request import Terms, new_id, uuid_of
from taxiway.contract.wire import CLAIMABLE, HEADER, Envelope, key_id, signature, signed_by

_encode = msgspec.json.Encoder(order="deterministic").encode

_SIGNED = 2 * hashlib.sha256().digest_size
"""Characters of a signature."""


def job_id(terms: Terms, secret: bytes) -> str:
    """A new job's id. The same tenant and idempotency key always give the same id, a UUID of version 8.

    Only who has the fleet's secret can compute it: who knows a job's id may read its result. `check_terms` rejects line
    breaks in both, so that no two pairs give the same text.
    """
    if terms.idempotency_key is None:
        return new_id()
    named = f"idempotency key\n{terms.tenant}\n{terms.idempotency_key}".encode()
    return uuid_of(hmac.new(secret, named, hashlib.sha256).hexdigest(), 8)


class TicketError(Exception):
    """A message's ticket is missing, altered or not valid here."""


class Promise(msgspec.Struct, frozen=True, array_like=True):
    """What a placement promised: an answer by `hardware_class`, some seconds after `placed` (the store's clock)."""

    hardware_class: str
    placed: float
    expected: float
    at_most: float


class Ticket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One placement, in the form that a worker needs."""

    job: str
    task: str
    model: str
    variants: dict[str, str]
    """The variant that runs on each hardware class that the job may run on."""
    prices: dict[str, float]
    """US dollars an hour, by class."""
    # Seconds by the store's clock
    accepted: float
    deadline_at: float
    """A later copy is not run, so routers set it on every ticket; 0 means none."""
    level: int
    reason: str
    reply: str = ""
    tariffs: dict[str, Tariff] = {}
    """What use costs, on the classes where it costs something."""
    runs: int = 0
    """Runs that its budget bears; 0 if any number."""
    promise: Promise | None = None
    """By it, workers learn how far to trust the next one."""
    preemptible: bool = False
    """It may be asked to yield while it runs."""

    def attempts(self, most: int) -> int:
        """How often the job may run, where `most` attempts are allowed to every job."""
        return min(most, self.runs) if self.runs else most


_decode = msgspec.json.Decoder(Ticket).decode


def sign(ticket: Ticket, body: bytes, keys: Sequence[bytes]) -> str:
    """The ticket's wire form for `body`, signed with the first of the `keys`."""
    text = _encode(ticket)
    return signature(text, body, keys[0]) + text.decode()


def attach(ticket: Ticket, envelope: Envelope, body: bytes, keys: Sequence[bytes]) -> None:
    """Put a ticket into its message: signed in the header, and first in the properties what a script claims it by.

    A message with an eta is not claimed as a worker takes it: Celery keeps it until then.
    """
    envelope.headers[HEADER] = sign(ticket, body, keys)
    envelope.properties.pop(CLAIMABLE, None)
    if envelope.headers.get("eta") is None:
        claimable = {"job": ticket.job, "deadline_at": ticket.deadline_at}
        envelope.properties = {CLAIMABLE: claimable, **envelope.properties}


def read_ticket(header: Any, body: bytes, keys: Sequence[bytes]) -> Ticket:
    """The ticket in a message's header.

    Raises:
        TicketError: it is missing, malformed, signed by none of the `keys`, or for another body.
    """
    if not isinstance(header, str):
        raise TicketError(
            f"expected a ticket in the message's header, got {'none' if header is None else type(header).__name__}"
        )
    text = header[_SIGNED:].encode(errors="replace")
    if not signed_by(keys, header[:_SIGNED], text, body):
        known = ", ".join(map(key_id, keys))
        raise TicketError(f"expected a ticket signed by a router of this fleet (key {known}), for this body")
    try:
        return _decode(text)
    except msgspec.MsgspecError as error:
        raise TicketError(f"expected a ticket: {error}") from error


def ticket_for(hardware_class: str, task: Any, job: Any, header: Any, body: bytes, keys: Sequence[bytes]) -> Ticket:
    """The ticket in the header of a message that a worker of the class may run, as this task and job.

    Raises:
        TicketError: as `read_ticket`, or it is for another task, job or class.
    """
    ticket = read_ticket(header, body, keys)
    if ticket.task != task or ticket.task != INFER:
        raise TicketError(f"expected a ticket for {task!r}, got one for {ticket.task!r}")
    if ticket.job != job:
        raise TicketError(f"expected a ticket for job {job!r}, got one for {ticket.job!r}")
    if hardware_class not in ticket.variants:
        raise TicketError(f"expected a ticket for {hardware_class}, got {sorted(ticket.variants)}")
    return ticket
