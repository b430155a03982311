"""A random walk in small steps, with a checkpoint now and then: every answer depends on all steps before it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from taxiway import Run

HELD = Path(__file__).parents[2] / "held"
"""While this file exists, beside the folder of models, walks stand still after half of their steps."""


def call(steps: int, seed: int, every: int, run: Run) -> dict[str, float]:
    """Where a walk of so many steps ends, with a checkpoint `every` so many (0 = none, -1 = it does not yield)."""
    random = np.random.default_rng(int(seed))
    state = run.restored or {"step": 0, "at": 0.0, "random": random.bit_generator.state}
    random.bit_generator.state, at = state["random"], state["at"]
    for step in range(state["step"], int(steps)):
        if (every > 0 and step % every == 0) or (every >= 0 and run.should_yield):
            run.checkpoint({"step": step, "at": at, "random": random.bit_generator.state})
        at = 0.999 * at + random.normal()
        run.report((step + 1) / steps, f"{step + 1} steps", {"at": at})
        time.sleep(0.001)
        while step == steps // 2 and HELD.exists() and (every < 0 or not run.should_yield):
            time.sleep(0.01)
    return {"end": at, "resumed": float(state["step"])}
