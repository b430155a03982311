"""Keys of the HTTP door, known by their digests alone. Pure.

A key is 256 random bits, so one SHA-256 is enough: nobody can guess what it was made of. A slow hash is for passwords,
which people choose; here it would only let a flood of wrong keys hold the router up.
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
"""What every key begins with, so that people, logs and scanners of source code recognise one."""

_FIRST = 8  # bytes of a digest that find its key; all of it is then compared, in constant time


class KeysError(ValueError):
    """The keys file is wrong. The text names the line, and never what stands in it."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One line of the keys file: the key's SHA-256 in hexadecimal, whose it is, and what it may do."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    tenant: TenantName
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Tenant None is anybody: a door without keys trusts whoever reaches it. `expires` is in Unix time."""

    key: str = ""
    tenant: str | None = None
    scopes: frozenset[Scope] = frozenset(SCOPES)
    expires: float = float("inf")


ANYBODY = Caller()
"""Who asks at a door without keys."""

NOBODY = Caller(tenant="", scopes=frozenset())
"""Who asks without a key what needs none."""


class Keyring:
    """The keys that a door knows.

    Raises:
        KeysError: an id or a digest stands there twice.
    """

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.keys = tuple(keys)
        self._known = {bytes.fromhex(key.digest)[:_FIRST]: (bytes.fromhex(key.digest), _caller(key)) for key in keys}
        if len(self._known) < len(self.keys) or len({key.id for key in self.keys}) < len(self.keys):
            raise KeysError("expected each id and each digest once")

    def caller(self, secret: bytes, now: float) -> Caller | None:
        """Whose key `secret` is; None where it is nobody's, or its time is over. `now` is Unix time."""
        digest = hashlib.sha256(secret).digest()
        known, caller = self._known.get(digest[:_FIRST], (b"", None))
        if caller is None or not hmac.compare_digest(known, digest) or now >= caller.expires:
            return None
        return caller


def digest_of(secret: str) -> str:
    """What the keys file holds of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_keys(text: str, file: str) -> Keyring:
    """The keys in JSON lines; `file` is only named in errors.

    Raises:
        KeysError: a line is no key.
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
    """The text of a keys file."""
    return "".join(msgspec.json.encode(key).decode() + "\n" for key in keys)


def _caller(key: Key) -> Caller:
    expires = float("inf") if key.expires is None else key.expires.timestamp()
    return Caller(key.id, key.tenant, frozenset(key.scopes), expires)
