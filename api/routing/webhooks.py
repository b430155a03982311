"""Webhook endpoints as operators and readers see and change them. `router.upkeep.webhooks` delivers to them."""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from broker.valkey.webhooks import DeadEvent, announce_call, decode_dead, replay_call, view_commands
from router.decide.webhooks import SECRET, Kind, Secret, WebhookEndpoint, event_id, forbidden, message_of
from router.service.admission import Rules
from router.service.store import StoreClock
from router.upkeep.webhooks import WebhookDelivery
from tasks.topology import Webhooks
from tasks.webhooks import WebhookEvent
from taxiway.contract.keys import webhook_dead_key
from taxiway.contract.request import EventType
from taxiway.errors import InvalidRequestError, UnknownObjectError, quoted, wrong_field

SECRET_BYTES = 32
"""Random bytes of a secret: the specification asks for 24 to 64."""

MOST_URL = 2048
"""Most characters of an endpoint's address."""

_encode = msgspec.json.Encoder().encode


class WebhookRegistry:
    """All endpoints of the fleet."""

    def __init__(self, delivery: WebhookDelivery, rules: Rules, clock: StoreClock) -> None:
        self._delivery = delivery
        self._rules = rules
        self._limits = rules.topology.webhooks
        self._clock = clock

    async def announce(self, kind: Kind, ending: str, name: str, tenant: str, named: str | None = None) -> None:
        """Notify the tenant's endpoints that a batch or response ended; `named` is the one that its request named.

        It may be repeated, also by other routers: each end is announced once.

        Raises:
            BrokerUnavailableError: the state store does not answer.
        """
        try:
            notified = self._rules.webhooks.notified(kind, tenant, named)
        except InvalidRequestError:  # it was removed since
            notified = self._rules.webhooks.notified(kind, tenant, None)
        if notified is not None and notified.endpoints.get(ending):
            call = announce_call(notified, event_id(kind, name, ending), kind, ending, name)
            await self._delivery.connection.run(call)

    async def add(
        self, *, tenant: str, name: str, url: str, event_types: Sequence[EventType], only_named: bool = False
    ) -> WebhookEndpoint:
        """Register an endpoint, with a new secret.

        Raises:
            InvalidRequestError: its address is not allowed, or the tenant has as many as it may.
        """
        check_url(url, self._limits)
        await self._delivery.read()
        most = self._limits.endpoints
        if len(self._rules.webhooks.by_tenant.get(tenant, ())) >= most:
            message = f"tenant {quoted(tenant)} has {most} webhook endpoints (limit webhooks.endpoints)"
            raise InvalidRequestError(message, field="tenant")
        now = self._clock.stored_now()
        endpoint = WebhookEndpoint(
            id=f"we_{secrets.token_hex(12)}",
            tenant=tenant,
            name=name,
            url=url,
            event_types=tuple(event_types),
            only_named=only_named,
            secrets=(Secret(_new_secret()),),
            created_at=int(now),
            updated_at=int(now),
        )
        await self._delivery.change(endpoint.id, b"", _encode(endpoint))
        return endpoint

    async def replace(self, name: str, tenant: str | None, /, **fields: Any) -> WebhookEndpoint:
        """Change fields of an endpoint. Raises as `get` and `add` do."""
        if "url" in fields:
            check_url(fields["url"], self._limits)
        now = int(self._clock.stored_now())
        return await self._changed(name, tenant, lambda one: msgspec.structs.replace(one, updated_at=now, **fields))

    async def rotate(self, name: str, tenant: str | None, *, overlap: bool = True) -> WebhookEndpoint:
        """Give an endpoint a new secret; the one before signs too for `webhooks.overlap` seconds, with `overlap`."""
        seconds = self._limits.overlap if overlap else 0.0
        now, secret = self._clock.stored_now(), _new_secret()
        return await self._changed(name, tenant, lambda one: rotated(one, secret, now, seconds))

    async def remove(self, name: str, tenant: str | None) -> str:
        """Remove an endpoint with its events; returns its id. Raises as `get` does."""
        id = (await self.get(name, tenant)).id
        while id in self._delivery.known and not await self._delivery.change(id, self._delivery.raw[id], b""):
            pass
        return id

    async def get(self, name: str, tenant: str | None) -> WebhookEndpoint:
        """An endpoint that a caller of `tenant` may see, by its id, or by a name that no other has; None may see all.

        Raises:
            UnknownObjectError: no such endpoint.
            InvalidRequestError: several have the name.
        """
        seen = await self.all(tenant)
        found = [one for one in seen if one.id == name] or [one for one in seen if one.name == name]
        if not found:
            raise UnknownObjectError(f"no webhook endpoint {quoted(name)} is known", webhook_endpoint=name)
        if len(found) > 1:
            ids = ", ".join(f"{one.id} of tenant {one.tenant}" for one in found)
            raise InvalidRequestError(f"endpoint: expected an id, as {ids} have this name, got {quoted(name)}")
        return found[0]

    async def all(self, tenant: str | None) -> list[WebhookEndpoint]:
        """The endpoints of a tenant, or of all, the latest first."""
        await self._delivery.read()
        found = [one for one in self._delivery.known.values() if tenant in (None, one.tenant)]
        return sorted(found, key=lambda one: (-one.created_at, one.id))

    async def view(self, endpoints: Sequence[WebhookEndpoint]) -> list[tuple[int, int, str]]:
        """How many events wait for each endpoint, how many dead letters it has, and why the first event waits."""
        answers = await self._delivery.connection.calls(*(part for one in endpoints for part in view_commands(one.id)))
        trios = zip(answers[::3], answers[1::3], answers[2::3], strict=True)
        return [(int(waiting), int(dead), (fault or b"").decode()) for waiting, dead, (fault, _) in trios]

    async def figures(self) -> tuple[int, int]:
        """How many events wait in the fleet, and how many are dead letters."""
        found = await self.view([*self._delivery.known.values()])
        return sum(waiting for waiting, _, _ in found), sum(dead for _, dead, _ in found)

    async def dead(self, name: str, most: int) -> list[DeadEvent]:
        """An endpoint's dead letters, the latest first."""
        return [*map(decode_dead, await self._delivery.connection.call("LRANGE", webhook_dead_key(name), 0, most - 1))]

    async def replay(self, name: str, events: Sequence[str]) -> int:
        """Send dead letters again, all if no `events` are named; returns how many."""
        return int(await self._delivery.connection.run(replay_call(name, self._limits.waiting, events)))

    async def test(self, endpoint: WebhookEndpoint, type: EventType) -> int:
        """Send a sample event at once, beside the outbox; returns the status of the answer.

        Raises:
            InvalidRequestError: there was no answer.
        """
        kind, _, ending = type.partition(".")
        now = self._clock.stored_now()
        name = f"{'resp' if kind == 'response' else kind}_test"
        attempt = await self._delivery.post(
            endpoint, message_of(WebhookEvent(secrets.token_hex(16), kind, ending, now, name))
        )
        if not attempt.status:
            raise InvalidRequestError(f"url: {attempt.fault}", field="url")
        return attempt.status

    async def _changed(
        self, name: str, tenant: str | None, change: Callable[[WebhookEndpoint], WebhookEndpoint]
    ) -> WebhookEndpoint:
        while True:
            before = await self.get(name, tenant)
            after = change(before)
            if await self._delivery.change(before.id, self._delivery.raw[before.id], _encode(after)):
                return after


def rotated(endpoint: WebhookEndpoint, secret: str, now: float, overlap: float) -> WebhookEndpoint:
    """The endpoint with a new secret; the one before signs for `overlap` seconds more."""
    until = now + overlap
    kept = [Secret(one.text, min(one.until or until, until)) for one in endpoint.secrets]
    secrets = (Secret(secret), *(one for one in kept if one.until > now))
    return msgspec.structs.replace(endpoint, secrets=secrets, updated_at=int(now))


def _new_secret() -> str:
    return SECRET + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def hint_of(endpoint: WebhookEndpoint) -> str:
    """What may be shown of an endpoint's secret."""
    return f"{SECRET}…{endpoint.secrets[0].text[-4:]}" if endpoint.secrets else ""


def check_url(url: str, rules: Webhooks) -> None:
    """Check the address of an endpoint, as far as that is possible without resolving its name.

    Raises:
        InvalidRequestError: it is malformed, not https:// where that is required, or names a forbidden address.
    """
    expected = "https:// or http://" if rules.http else "https://"
    wrong = wrong_field("url", f"an address that begins with {expected}", url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise wrong from error
    schemes = ("https", "http") if rules.http else ("https",)
    if parts.scheme not in schemes or not host or len(url) > MOST_URL or not url.isascii() or not url.isprintable():
        raise wrong
    if parts.username is not None or parts.fragment:
        raise InvalidRequestError("url: expected one without a user and a fragment", field="url")
    with contextlib.suppress(ValueError):  # a name: its addresses are checked when it is connected to
        if why := forbidden(host, rules.networks):
            raise InvalidRequestError(f"url: {why}", field="url")
