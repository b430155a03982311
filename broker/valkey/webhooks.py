"""The outboxes of webhook endpoints: events that wait, delivered one at a time per endpoint, and those given up.

A job's end writes its event in the step that writes its result (`includes/outbox.lua`), to the endpoints that its
record names. A router takes an endpoint for a lease; its token fences a router that took it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from broker.valkey import Call
from tasks.webhooks import Notified, WebhookEvent
from taxiway.contract.keys import (
    WEBHOOKS,
    WEBHOOKS_DUE,
    webhook_dead_key,
    webhook_mark_key,
    webhook_outbox_key,
    webhook_state_key,
)


class DeadEvent(msgspec.Struct, frozen=True, array_like=True):
    """An event that was given up: when by the store's clock, after how many attempts, and why."""

    event: WebhookEvent
    at: float
    attempts: int
    fault: str


class Taken(msgspec.Struct, frozen=True):
    """An endpoint leased by this router, the attempts made for its first event, and that event as stored."""

    endpoint: str
    token: str
    attempts: int
    event: bytes


decode_event = msgspec.msgpack.Decoder(WebhookEvent).decode
decode_dead = msgspec.msgpack.Decoder(DeadEvent).decode


def announce_call(notified: Notified, event: str, kind: str, ending: str, name: str) -> Call:
    """Adds the event of something's end to outboxes, unless it was added before."""
    args = (webhook_outbox_key(""), webhook_dead_key(""), notified.most, notified.most_dead, event, kind, ending, name)
    return Call("webhooks/announce", [WEBHOOKS_DUE, webhook_mark_key(event)], [*args, *notified.endpoints[ending]])


def take_call(router: str, lease: float, most: int) -> Call:
    """Takes up to `most` endpoints whose first event is due."""
    return Call("webhooks/take", [WEBHOOKS_DUE], [webhook_outbox_key(""), webhook_state_key(""), lease, most, router])


def take_answer(answer: Sequence[bytes]) -> tuple[float, list[Taken]]:
    """The store's time, and the endpoints taken."""
    parts = zip(answer[1::4], answer[2::4], answer[3::4], answer[4::4], strict=True)
    taken = [Taken(one.decode(), token.decode(), int(tries), raw) for one, token, tries, raw in parts]
    return float(answer[0]), taken


def settle_call(
    endpoint: str,
    token: str,
    outcome: Literal["delivered", "retry", "dead"],
    *,
    pause: float,
    fault: str = "",
    most_dead: int,
) -> Call:
    """Records the outcome of an attempt. `pause` is until the next attempt or, after the event's last, the lease."""
    keys = [WEBHOOKS_DUE, webhook_outbox_key(endpoint), webhook_state_key(endpoint), webhook_dead_key(endpoint)]
    return Call("webhooks/settle", keys, [endpoint, token, outcome, pause, fault, most_dead])


def settle_answer(answer: bytes | None) -> WebhookEvent | None:
    """The next event of the endpoint; None if there is none to send now, or another router has the endpoint."""
    return decode_event(answer) if answer else None


def replay_call(endpoint: str, most: int, events: Sequence[str]) -> Call:
    """Returns dead letters to the outbox, all if no `events` are named; answers how many."""
    keys = [WEBHOOKS_DUE, webhook_outbox_key(endpoint), webhook_dead_key(endpoint)]
    return Call("webhooks/replay", keys, [endpoint, most, *events])


def change_call(endpoint: str, before: bytes, after: bytes) -> Call:
    """Adds, replaces or removes (`after` empty) an endpoint if it is still `before`; answers 1 if so."""
    keys = [
        *(WEBHOOKS, WEBHOOKS_DUE),
        *(webhook_outbox_key(endpoint), webhook_state_key(endpoint), webhook_dead_key(endpoint)),
    ]
    return Call("webhooks/change", keys, [endpoint, before, after])


def view_commands(endpoint: str) -> list[tuple[Any, ...]]:
    """Commands that read how many events wait, how many are dead, and the fault and attempts of the first one."""
    state = webhook_state_key(endpoint)
    return [
        ("LLEN", webhook_outbox_key(endpoint)),
        ("LLEN", webhook_dead_key(endpoint)),
        ("HMGET", state, "fault", "attempts"),
    ]
