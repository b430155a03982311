"""Keys of tenants for a router's interfaces."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from api.access import Key, Scope, digest_of
from api.keys_file import write_keys


def secret_of(name: str) -> str:
    """What the holder of the key of this name sends."""
    return f"taxiway_{hashlib.sha256(name.encode()).hexdigest()}"


def authorized(name: str) -> dict[str, str]:
    """The headers of a request under the key of this name."""
    return {"authorization": f"Bearer {secret_of(name)}"}


def keys_in(path: Path, tenants: Mapping[str, str] | None = None, **scopes: tuple[Scope, ...]) -> tuple[str, ...]:
    """Write keys of these names, each of the tenant of its name, or its own of `tenants`; a router's options."""
    owners = tenants or {}
    keys = [
        Key(id=name, digest=digest_of(secret_of(name)), tenant=owners.get(name, name), scopes=may)
        for name, may in scopes.items()
    ]
    write_keys(path, keys)
    return ("--keys", str(path))
