"""Returns invalid results, of a different kind for each number."""

from __future__ import annotations

from typing import Any

import numpy as np

_WAYS: tuple[Any, ...] = (
    None,
    "garbage",
    {},
    {"other": 1},
    {"number": object()},
    {"number": "text"},
    {"number": np.zeros((2, 3))},
    {"number": float("nan")},
    {"number": [1, [2]]},
    {"number": b"\xff\xfe"},
)


def call(number: int) -> Any:
    """One of the ways."""
    return _WAYS[int(number) % len(_WAYS)]
