"""Signatures over a text and a message's body together: HMAC-SHA-256, by one key, or several while it is replaced."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache

SHORTEST = 16
"""Bytes that a key has at least."""


def read_key(text: str) -> bytes:
    """The key that `text` writes as hexadecimal digits.

    Raises:
        ValueError: it is none, or too short.
    """
    key = bytes.fromhex(text)
    if len(key) < SHORTEST:
        raise ValueError(f"expected at least {2 * SHORTEST} hexadecimal digits")
    return key


def key_id(key: bytes) -> str:
    """A key's name, for logs and errors: nothing of the key follows from it."""
    return hashlib.sha256(b"taxiway key\n" + key).hexdigest()[:8]


def signature(text: bytes, body: bytes, key: bytes) -> str:
    """Of both together: JSON has no line break outside its texts, so that no other pair gives the same bytes."""
    code = _keyed(key).copy()
    code.update(text)
    code.update(b"\n")
    code.update(body)
    return code.hexdigest()


def signed_by(keys: Sequence[bytes], given: str, text: bytes, body: bytes) -> bool:
    """Whether one of the `keys` gives this signature; compared in constant time."""
    told = given.encode(errors="replace")
    return any(hmac.compare_digest(told, signature(text, body, key).encode()) for key in keys)


@lru_cache(maxsize=8)
def _keyed(key: bytes) -> hmac.HMAC:
    """Made once: looking the algorithm up takes ten times as long as a signature where nothing is in the caches."""
    return hmac.new(key, digestmod="sha256")
