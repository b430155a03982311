"""Leaks 128 MiB of address space per call."""

from __future__ import annotations

import numpy as np

_KEPT: list[np.ndarray] = []


def call(number: int) -> dict[str, int]:
    """The number."""
    _KEPT.append(np.empty(2**27, np.uint8))
    return {"number": int(number)}
