"""Gives back what it gets."""

from __future__ import annotations

from typing import Any


def call(value: Any) -> dict[str, Any]:
    """The value."""
    return {"value": value}
