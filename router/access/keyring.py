"""Keys of the HTTP door, known only by their digests. Pure.

A key is 256 random bits, so one SHA-256 suffices: a key cannot be guessed. Slow hashes are for passwords, which people
choose; here one would only let a flood of wrong keys slow the router down.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, get_args

import msgspec

from tasks.topology import TenantName

Scope = Literal["submit", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "taxiway_"
"""Prefix of every key, so that people, logs and secret scanners recognise one."""

_FIRST = 8  # bytes of a digest used to look up its key; the whole is then compared in constant time


class KeysError(ValueError):
    """The keys file is invalid. The message names the line but never quotes it."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One line of the keys file: the key's SHA-256 in hexadecimal, its tenant, and its scopes."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    tenant: TenantName
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request. Tenant None means any: a door without keys trusts everyone. `expires` is Unix time."""

    key: str = ""
    tenant: str | None = None
    scopes: frozenset[Scope] = frozenset(SCOPES)
    expires: float = float("inf")


TRUSTED = Caller()
"""The caller at a door without keys."""

UNAUTHENTICATED = Caller(tenant="", scopes=frozenset())
"""The caller without a key, at a path that needs none."""


class Keyring:
    """The keys that a door knows.

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
