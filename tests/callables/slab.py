"""Takes its time: 63 ns a sample, what the model `monte-carlo` took on a calm machine, and no processor."""

from __future__ import annotations

import time


def call(samples: int, seed: int) -> dict[str, float]:
    """A number that depends on both; no samples are a division by zero."""
    estimate = float(seed) / int(samples)
    time.sleep(int(samples) * 63e-9)
    return {"estimate": estimate}
