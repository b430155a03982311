"""What a test knows of a value and its type does not say: asserted, so that the type checker knows it too."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value, which is there."""
    assert value is not None
    return value


def as_bytes(value: object) -> bytes:
    """An answer of a database: redis-py's types also name text, which only a client that decodes gives."""
    assert isinstance(value, bytes), value
    return value
