"""Signatures over a text and a message's body: HMAC-SHA-256, with one key, or several during key rotation."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache

SHORTEST = 16
"""Minimum bytes of a key."""


def read_key(text: str) -> bytes:
    """The key from hexadecimal `text`.

    Raises:
        ValueError: not hexadecimal, or too short.
    """
    key = bytes.fromhex(text)
    if len(key) < SHORTEST:
        raise ValueError(f"expected at least {2 * SHORTEST} hexadecimal digits")
    return key


def key_id(key: bytes) -> str:
    """A key's name for logs and errors, which reveals nothing of the key."""
    return hashlib.sha256(b"taxiway key\n" + key).hexdigest()[:8]


def signature(text: bytes, body: bytes, key: bytes) -> str:
    """Sign both together. JSON has no line breaks outside strings, so that no two pairs give the same bytes."""
    code = _keyed(key).copy()
    code.update(text)
    code.update(b"\n")
    code.update(body)
    return code.hexdigest()


def signed_by(keys: Sequence[bytes], given: str, text: bytes, body: bytes) -> bool:
    """Whether the signature matches one of the `keys`; compared in constant time."""
    told = given.encode(errors="replace")
    return any(hmac.compare_digest(told, signature(text, body, key).encode()) for key in keys)


@lru_cache(maxsize=8)
def _keyed(key: bytes) -> hmac.HMAC:
    """Created once: with cold caches, looking up the algorithm takes ten times as long as a signature."""
    return hmac.new(key, digestmod="sha256")
