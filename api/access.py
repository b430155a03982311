"""Who may use the HTTP API, and how often: keys, and limits per tenant at one router. Pure, except for counters.

Keys are known only by their digests.
A key is 256 random bits, so one SHA-256 suffices: a key cannot be guessed. Slow hashes are for passwords, which people
choose; here one would only let a flood of wrong keys slow the router down.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, get_args

import msgspec

from tasks.topology import TenantName, Topology
from taxiway.errors import FleetUnavailable, RateLimitedError

Scope = Literal["submit", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "taxiway_"
"""Prefix of every key, so that people, logs and secret scanners recognise one."""

_FIRST = 8  # bytes of a digest used to look up its key; the whole is then compared in constant time

BURST = 2.0
"""Seconds' worth of requests that may arrive at once after a pause."""

_ROUNDING = 1e-6  # seconds: tolerance for rounding in sums of times

RETRY_AFTER = 1.0
"""Seconds after which a refused request may be retried: small bodies go sooner, large ones take longer to send."""


class KeysError(ValueError):
    """The keys file is invalid. The message names the line but never quotes it."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One line of the keys file, in JSON."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """What operators call it. Example: shop-2026"""
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """The SHA-256 of the key in hexadecimal."""
    tenant: TenantName
    """Whose it is. Example: shop"""
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    """What it may do: submit jobs, read the fleet, change it. Example: [submit]"""
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    """When it ends; not given: never. Example: 2027-01-31T00:00:00Z"""


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request. Tenant None means any: an API without keys trusts everyone. `expires` is Unix time."""

    key: str = ""
    tenant: str | None = None
    scopes: frozenset[Scope] = frozenset(SCOPES)
    expires: float = float("inf")


TRUSTED = Caller()
"""The caller at an API without keys."""

UNAUTHENTICATED = Caller(tenant="", scopes=frozenset())
"""The caller without a key, at a path that needs none."""


class Keyring:
    """The keys that an API knows.

    Raises:
        KeysError: duplicate id or digest.
    """

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.keys = tuple(keys)
        self._known = {bytes.fromhex(key.digest)[:_FIRST]: (bytes.fromhex(key.digest), _caller(key)) for key in keys}
        if len(self._known) < len(self.keys) or len({key.id for key in self.keys}) < len(self.keys):
            raise KeysError("expected each id and each digest once")

    def caller(self, secret: bytes, now: float) -> Caller | None:
        """The caller whose key `secret` is; None if it is unknown or expired. `now` is Unix time."""
        digest = hashlib.sha256(secret).digest()
        known, caller = self._known.get(digest[:_FIRST], (b"", None))
        if caller is None or not hmac.compare_digest(known, digest) or now >= caller.expires:
            return None
        return caller


def digest_of(secret: str) -> str:
    """The digest of a key, as stored in the keys file."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_keys(text: str, file: str) -> Keyring:
    """The keys in JSON lines; `file` is only named in errors.

    Raises:
        KeysError: a line is not a key.
    """
    keys = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            keys.append(msgspec.json.decode(line, type=Key))
        except msgspec.MsgspecError as error:
            where = str(error).rpartition(" - at ")[2] if " - at " in str(error) else "the line"
            raise KeysError(f"{file}: line {number}: expected a key as `taxiway keys new` writes it: {where}") from None
    try:
        return Keyring(keys)
    except KeysError as error:
        raise KeysError(f"{file}: {error}") from error


def written(keys: Iterable[Key]) -> str:
    """The content of a keys file."""
    return "".join(msgspec.json.encode(key).decode() + "\n" for key in keys)


def _caller(key: Key) -> Caller:
    expires = float("inf") if key.expires is None else key.expires.timestamp()
    return Caller(key.id, key.tenant, frozenset(key.scopes), expires)


def spend(full_at: float, now: float, rate: float) -> tuple[float, float]:
    """Take one request out of a token bucket that fills at `rate` per second and holds `BURST` seconds' worth.

    The bucket is one number, the time at which it is full again.

    Returns:
        The number after the request, and 0; or the unchanged number, and the seconds until a request may be taken.

    Source: the generic cell rate algorithm, ITU-T I.371 annex A.
    """
    after = max(full_at, now) + 1 / rate
    wait = after - now - max(BURST, 1 / rate)
    return (full_at, wait) if wait > _ROUNDING else (after, 0.0)


class TenantRates:
    """Each tenant's token bucket."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._full_at: dict[str, float] = {}

    def wait(self, tenant: str, now: float) -> float:
        """Count a request of `tenant`. Returns 0, or the seconds after which it may retry."""
        full_at, wait = spend(self._full_at.get(tenant, 0.0), now, self.limit(tenant))
        self._full_at[tenant] = full_at
        return wait

    def left(self, tenant: str, now: float) -> tuple[int, int, float]:
        """A tenant's largest number of requests at once, how many it may make now, and the seconds until all again."""
        rate = self.limit(tenant)
        most = max(int(BURST * rate), 1)
        full_in = max(self._full_at.get(tenant, 0.0) - now, 0.0)
        return most, max(int(most - full_in * rate + _ROUNDING), 0), full_in

    def limit(self, tenant: str) -> float:
        """Requests per second that `tenant` may make at this router."""
        return self._topology.rules_of(tenant).requests_per_second or self._topology.limits.requests_per_second


class Bodies:
    """The bytes of each tenant's bodies: those received, and those declared and not yet received."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._held: defaultdict[str, int] = defaultdict(int)
        self._all = 0

    def take(self, tenant: str, size: int) -> None:
        """Count `size` more bytes of `tenant`; every call that returns needs a `give_back`.

        Raises:
            RateLimitedError: the tenant's bodies would exceed `bodies`.
            FleetUnavailable: all bodies would exceed `all_bodies`.
        """
        own, limits = self._topology.rules_of(tenant).bodies, self._topology.limits
        most = limits.bodies if own is None else own
        held = self._held.get(tenant, 0)
        if held + size > most:
            message = f"tenant {tenant!r} has {held} bytes of request bodies in progress (limit {most}, bodies)"
            raise RateLimitedError(f"{message}; this one has {size}", tenant=tenant, retry_after=RETRY_AFTER)
        if self._all + size > limits.all_bodies:
            message = (
                f"the router has {self._all} bytes of request bodies in progress "
                f"(limit {limits.all_bodies}, all_bodies)"
            )
            raise FleetUnavailable(f"{message}; this one has {size}", retry_after=RETRY_AFTER)
        self._held[tenant] += size
        self._all += size

    def give_back(self, tenant: str, size: int) -> None:
        """Stop counting them."""
        self._all -= size
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]
