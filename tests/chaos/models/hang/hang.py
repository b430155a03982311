"""Never ends: the worker kills its process after `limits.stall`."""

from __future__ import annotations

import time


def call(number: int) -> dict[str, int]:
    """Nothing, after an hour."""
    time.sleep(3600)
    return {"number": int(number)}
