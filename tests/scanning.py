"""Looks for a text in what sites keep: every value of a database, log files, and what a worker or router says."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import redis

from tests.narrowing import as_bytes


def forms(text: str) -> list[bytes]:
    """The text as bytes, and within base64: once, and again as a message's body has it."""
    plain = text.encode()
    once = [coded for shift in range(3) if (coded := _within(plain, shift))]
    return [plain, *once, *(_within(coded, shift) for coded in once for shift in range(3))]


def _within(plain: bytes, shift: int) -> bytes:
    """What base64 has of the bytes wherever they stand `shift` bytes after a multiple of three."""
    whole = base64.b64encode(bytes(shift) + plain)
    return whole[4 if shift else 0 : len(whole) // 4 * 4 - 4]


def hits(content: bytes, sought: Iterable[bytes]) -> int:
    """How often any of the forms is there."""
    return sum(content.count(form) for form in sought)


def values_of(store: redis.Redis) -> Iterator[bytes]:
    """Every key of a database with its whole value, as bytes."""
    for key in store.scan_iter(count=1000):
        yield as_bytes(key)
        yield from _flat(_value_of(store, as_bytes(key)))


def _value_of(store: redis.Redis, key: bytes) -> Any:
    match store.type(key):
        case b"string":
            return store.get(key)
        case b"list":
            return store.lrange(key, 0, -1)
        case b"hash":
            return store.hgetall(key)
        case b"set":
            return store.smembers(key)
        case b"zset":
            return store.zrange(key, 0, -1)
        case b"stream":
            return store.xrange(key)
    return None


def _flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for name, below in value.items():
            yield from (*_flat(name), *_flat(below))
    elif isinstance(value, list | tuple | set):
        for below in value:
            yield from _flat(below)


def files_in(folder: Path) -> Iterator[bytes]:
    """The files of a folder."""
    return (path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
