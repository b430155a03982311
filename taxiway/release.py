"""Versions of what is installed here, found without importing it."""

from __future__ import annotations

import importlib.metadata
from functools import cache


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def release() -> str:
    """The version of taxiway here."""
    return version_of("taxiway") or "unknown"
