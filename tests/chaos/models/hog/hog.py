"""Allocates more memory than its process may have."""

from __future__ import annotations

import numpy as np


def call(number: int) -> dict[str, int]:
    """The number, if 64 GiB can be allocated."""
    return {"number": int(np.ones(2**33)[0]) * int(number)}
