"""Takes its time: 63 ns a sample, as a small simulation would, and no processor."""

from __future__ import annotations

import time
from pathlib import Path

OVER = Path(__file__).parents[2] / "over"
"""The file that ends calls of less than no samples, beside the folder of models."""


def call(samples: int, seed: int) -> dict[str, float]:
    """A number that depends on both; no samples are a division by zero."""
    estimate = float(seed) / int(samples)
    while samples < 0 and not OVER.exists():
        time.sleep(0.01)
    time.sleep(max(int(samples), 0) * 63e-9)
    return {"estimate": estimate}
