"""Webhooks: which endpoints are notified, of what, how it is signed, when it is tried again, and where to.

Signatures follow the Standard Webhooks specification, https://github.com/standard-webhooks/standard-webhooks: a message
is its id, its time and its body; a receiver accepts any of the signatures in its header.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import msgspec

from tasks.topology import Webhooks
from tasks.webhooks import Notified, WebhookEvent
from taxiway.backoff import Backoff
from taxiway.contract.job import failure_of, read_meta
from taxiway.contract.request import EventType
from taxiway.errors import wrong_field

SECRET = "whsec_"
"""Prefix of a secret; base64 follows."""

Kind = Literal["job", "batch", "response"]
"""What ends."""

_TYPES: Mapping[tuple[str, str], EventType] = {
    **{tuple(one.split(".")): one for one in get_args(EventType)},
    ("job", "cancelled"): "job.failed",
}
"""The event of each ending of each kind of thing."""


class Secret(msgspec.Struct, frozen=True, omit_defaults=True):
    """A secret of an endpoint, and the time until which it signs; 0: indefinitely."""

    text: str
    until: float = 0.0


class WebhookEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tenant's events go."""

    id: str
    tenant: str
    name: str
    url: str
    event_types: tuple[EventType, ...]
    """The events that it is notified of."""
    only_named: bool = False
    """Whether it is notified only of requests that name it."""
    secrets: tuple[Secret, ...] = ()
    """Newest first."""
    # Unix seconds
    created_at: int
    updated_at: int

    def signing(self, now: float) -> list[str]:
        """The secrets that sign at `now`, the newest first."""
        return [one.text for one in self.secrets if not one.until or now < one.until]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """All endpoints of the fleet; `rules` has their limits."""

    rules: Webhooks = field(default_factory=Webhooks)
    by_tenant: Mapping[str, tuple[WebhookEndpoint, ...]] = field(default_factory=dict)
    _known: dict[tuple[str, str | None], str] = field(default_factory=dict)  # what `record` answers

    def __bool__(self) -> bool:
        return bool(self.by_tenant)

    def record(self, tenant: str, named: str | None) -> str:
        """What the record of a tenant's job says of this; empty if none is notified. Raises as `notified` does."""
        if not self.by_tenant and named is None:
            return ""
        known = self._known.get((tenant, named))
        if known is None:
            notified = self.notified("job", tenant, named)
            known = self._known[tenant, named] = "" if notified is None else msgspec.json.encode(notified).decode()
        return known

    def notified(self, kind: Kind, tenant: str, named: str | None) -> Notified | None:
        """Which endpoints are notified when something of this kind ends; None if none is.

        `named` is the endpoint that a request of the tenant named, by its id, its name or its address.

        Raises:
            InvalidRequestError: the tenant has no such endpoint.
        """
        own = self.by_tenant.get(tenant, ())
        chosen = [one for one in own if not one.only_named]
        if named is not None:
            found = [one for one in own if named in (one.id, one.name, one.url)]
            if not found:
                raise wrong_field("webhook", "the name, id or address of an endpoint of the tenant", named)
            chosen += [one for one in found if one.only_named]
        by_ending = {
            ending: ids
            for (of, ending), type in _TYPES.items()
            if of == kind and (ids := [one.id for one in chosen if type in one.event_types])
        }
        return Notified(by_ending, self.rules.waiting, self.rules.dead) if by_ending else None


def event_id(*parts: str) -> str:
    """The id of the event of what these name: the same whenever, and by whichever router, it is announced."""
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()[:32]


class WebhookMessage(msgspec.Struct, frozen=True):
    """What is sent: its id and body, the same at each attempt."""

    id: str
    body: bytes


def message_of(event: WebhookEvent) -> WebhookMessage:
    """The message for an event, in OpenAI's form. It says what ended, and not what came out."""
    data: dict[str, Any] = {"id": event.name}
    if event.kind == "job":
        data |= {"model": event.model, "state": event.state}
        with contextlib.suppress(msgspec.MsgspecError):  # empty where it succeeded, or the reason is too long
            failure = failure_of(read_meta(event.meta))
            data |= {} if failure is None else {"error": {"code": failure.code}}  # the text may quote inputs
    name, type = f"evt_{event.id}", _TYPES[event.kind, event.ending]
    content = {"object": "event", "id": name, "type": type, "created_at": int(event.at), "data": data}
    return WebhookMessage(name, msgspec.json.encode(content))


def headers_of(message: WebhookMessage, secrets: Iterable[str], now: float) -> dict[str, str]:
    """The headers of an attempt at `now`, a Unix time, signed with each of the secrets."""
    at = str(int(now))
    signed = f"{message.id}.{at}.".encode() + message.body
    return {
        "content-type": "application/json",
        "user-agent": "taxiway",
        "webhook-id": message.id,
        "webhook-timestamp": at,
        "webhook-signature": " ".join(f"v1,{_signature(secret, signed)}" for secret in secrets),
    }


def _signature(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET))
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of an attempt: the status of the answer, 0 if there was none, and why not.

    `retry_after` is the number of seconds that the answer asks to wait.
    """

    status: int
    fault: str = ""
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True)
class AttemptVerdict:
    """What follows from an attempt; `pause` is the time until the next one, `fault` why there is one, or none."""

    outcome: Literal["delivered", "retry", "dead"]
    pause: float = 0.0
    fault: str = ""


_GONE = 410


def judge(attempt: Attempt, *, before: int, begun: float, now: float, draw: float, rules: Webhooks) -> AttemptVerdict:
    """What follows from an attempt for an event that was tried `before` times, from `begun` on.

    The last attempt is made when `rules.retry` seconds are over. `draw`, from 0 to 1, is the jitter.
    """
    if 200 <= attempt.status < 300:
        return AttemptVerdict("delivered")
    fault = attempt.fault or f"the endpoint answered {attempt.status}"
    left = begun + rules.retry - now
    if attempt.status == _GONE or left <= 0:
        return AttemptVerdict("dead", fault=fault)
    pause = Backoff(rules.pause, rules.longest_pause, spread=0.2).pause(before + 1, draw)
    pause = max(pause, min(attempt.retry_after, rules.longest_pause))
    return AttemptVerdict("retry", min(pause, left), fault)


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_NEVER_PUBLIC = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "fec0::/10", "64:ff9b:1::/48")))
"""Networks that `ipaddress` of some release takes for public: Azure's service for its own machines, those of IETF
protocols, site-local, local NAT64."""


def forbidden(host: str, networks: Sequence[str]) -> str:
    """Why events must not go to an IP address; empty if they may, because it is public, or in one of `networks`."""
    address = ipaddress.ip_address(host.partition("%")[0])
    for one in _meant(address):
        public = one.is_global and not one.is_multicast and not any(one in network for network in _NEVER_PUBLIC)
        if not public and not any(one in ipaddress.ip_network(network) for network in networks):
            return f"{host} is not a public address, and in no network that webhooks.networks allows"
    return ""


def _meant(address: _Address) -> list[_Address]:
    """The addresses to one of which a packet may go: also the IPv4 addresses that an IPv6 address embeds."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    mapped = address.ipv4_mapped
    if mapped is not None:
        return [mapped]
    embedded = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    inner: list[_Address] = [one for one in embedded if one is not None]
    return [*inner] if address in _NAT64 else [address, *inner]
